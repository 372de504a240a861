"""The images for `tinymim distill`: how they are read, split and labelled."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping

import numpy as np

from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError, class_summary, labelled
from tinymim_jax.data.sources.layout import IMAGE_EXTENSIONS
from tinymim_jax.data.sources.sources import is_place, open_source, splits
from tinymim_jax.data.views.decoding import Picture, Undecodable

log = logging.getLogger(__name__)

FEWEST = 20
"""Smallest number of training images."""

_TRAIN = ("train", "training", "trn")
_EVALUATED = ("validation", "val", "valid", "dev", "test", "testing", "tst")
_FEW = 1000  # below this, a fifth is held out instead of a tenth
_SAMPLED = 24
_SHARDS = {".tar": "tar", ".parquet": "parquet", ".array_record": "array_record", ".arrayrecord": "array_record"}
_ARCHIVES = (".zip", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz", ".zst")


@dataclasses.dataclass(frozen=True)
class Data:
    """A source of images with its splits.

    source, train_split, eval_split: values of data.source, data.train_split and data.eval_split.
    train_images, eval_images: numbers of images.
    class_names: empty for images without labels.
    per_class: median number of training images of a class; 0 without labels.
    short_side: median over a sample of the images, in pixels.
    why_split: how the splits were found, in words.
    sample: a few encoded images.
    """

    source: str
    train_split: str
    eval_split: str
    train_images: int
    eval_images: int
    class_names: tuple[str, ...]
    per_class: int
    short_side: int
    why_split: str
    sample: tuple[bytes, ...]


def find_data(
    given: str, *, data_dir: str | None = None, labels: bool = True, overrides: Mapping[str, object] | None = None
) -> Data:
    """Opens the images.

    Args:
      given: a folder, with a folder for each class or without classes; a folder of shards; what data.source takes.
      labels: False ignores labels.
      overrides: data.train_split and data.eval_split in it replace the splits that would be chosen.

    Raises ValueError or OSError, with a remedy, for no images, too few, none that can be decoded, or only one class.
    """
    source = source_name(given)
    train, evaluated, why = _splits(source, data_dir)
    overrides = overrides or {}
    if "data.train_split" in overrides or "data.eval_split" in overrides:
        train = str(overrides.get("data.train_split", train))
        evaluated, why = str(overrides.get("data.eval_split", evaluated)), "as given"
    opened = open_source(source, split=train, data_dir=data_dir)
    held_out = open_source(source, split=evaluated, data_dir=data_dir)
    if len(opened) < FEWEST or not len(held_out):
        raise ValueError(
            f"{given} holds {len(opened)} training and {len(held_out)} evaluation images, and at least {FEWEST} and 1 "
            "are needed; some thousands give a useful student. Give a larger folder; labels are not needed"
        )
    names, per_class = _classes(given, opened, held_out) if labels else ((), 0)
    sample, sides = _sample(opened)
    log.info("%s: %d training and %d evaluation images (%s)", source, len(opened), len(held_out), why)
    log.info("%s: %s", source, class_summary(opened) if labels else "labels are ignored")
    return Data(
        source=source,
        train_split=train,
        eval_split=evaluated,
        train_images=len(opened),
        eval_images=len(held_out),
        class_names=names,
        per_class=per_class,
        short_side=int(np.median(sides)),
        why_split=why,
        sample=sample,
    )


def source_name(given: str) -> str:
    """The value of data.source for a folder, file, URL or name. Paths become absolute."""
    if is_place(given) or "://" in given:
        return given if is_place(given) else f"folder:{given}"
    path = pathlib.Path(given).expanduser()
    if path.is_dir():
        return f"{_kind_of(path)}:{path.resolve()}"
    if path.is_file():
        if path.suffix.lower() in _SHARDS:
            return f"{_SHARDS[path.suffix.lower()]}:{path.resolve()}"
        what = "an archive: unpack it" if path.suffix.lower() in _ARCHIVES else "a file"
        raise ValueError(f"{given} is {what}; give a folder of images, with a folder for each class or without")
    if "/" in given and (given.startswith((".", "/", "~")) or given.count("/") > 1):
        raise FileNotFoundError(f"{given}: there is no such folder; give one of images, or the name of a TFDS data set")
    return given


def _kind_of(folder: pathlib.Path) -> str:
    """'folder', or the kind of shards if the folder contains shards and no images."""
    for path in sorted(folder.rglob("*"))[:10_000] if _only_shards(folder) else ():
        if path.suffix.lower() in _SHARDS:
            return _SHARDS[path.suffix.lower()]
    return "folder"


def _only_shards(folder: pathlib.Path) -> bool:
    names = [path.name.lower() for path in folder.iterdir()]
    inner = folder / "data"  # Parquet sets of the Hugging Face hub
    names += [path.name.lower() for path in inner.iterdir()] if inner.is_dir() else []
    return any(name.endswith(tuple(_SHARDS)) for name in names) and not any(n.endswith(IMAGE_EXTENSIONS) for n in names)


def _splits(source: str, data_dir: str | None) -> tuple[str, str, str]:
    """(training split, evaluation split, how they were found)."""
    found = splits(source, data_dir)
    lowered = {name.lower(): name for name in found}
    train = next((lowered[name] for name in _TRAIN if name in lowered), None)
    evaluated = next((lowered[name] for name in _EVALUATED if name in lowered), None)
    if train and evaluated:
        return train, evaluated, f"splits {train} and {evaluated}"
    whole = train or ("all" if len(found) != 1 else next(iter(found)))
    images = found[whole] if whole in found else sum(found.values())
    share = 20 if images < _FEW else 10
    return f"{whole}[:{100 - share}%]", f"{whole}[{100 - share}%:]", f"{share} % of {whole} are held out"


def _classes(given: str, train: Source, held_out: Source) -> tuple[tuple[str, ...], int]:
    """(class names, median images of a class), or ((), 0) for images without labels."""
    if train.classes == 0:
        return (), 0
    if train.classes == 1:
        raise ValueError(
            f"{given} has only one class, {train.class_names[0]!r}, so there is nothing to tell apart: give the folder "
            "above it, in which each class has a folder; or add --no_labels to distil without classes"
        )
    try:
        for source in (train, held_out):
            labelled(source, "classes are used for k-NN and fine-tuning")
    except LabelError as error:
        raise LabelError(f"{error}. Or add --no_labels to distil without classes") from error
    known = train.known_labels()
    if known is None:
        return train.class_names, max(1, len(train) // train.classes)
    return train.class_names, int(np.median(np.bincount(known, minlength=train.classes)))


def _sample(source: Source) -> tuple[tuple[bytes, ...], list[int]]:
    """(encoded images, their short sides) of a few examples. Raises ValueError if none can be decoded."""
    images, sides, reason = [], [], ""
    for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int).tolist():
        try:
            data = source[index]["image"]
            picture = Picture(data)
            sides.append(min(picture.pixels().shape[:2]))
            images.append(data)
        except (Undecodable, OSError, ValueError) as error:
            reason = f"{source.describe(index)}: {error}"
    if not images:
        raise ValueError(f"none of {_SAMPLED} sampled images can be decoded, such as {reason}: repair or replace them")
    if reason:
        log.warning("not all images can be decoded, such as %s", reason)
    return tuple(images), sides
