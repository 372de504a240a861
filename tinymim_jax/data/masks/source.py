"""MaskSource: the records of a source with the class of every pixel, checked before anything is trained."""

import logging

from tinymim_jax.data.masks.class_files import read_classes
from tinymim_jax.data.masks.classes import class_colours, class_names, numbered_from_one
from tinymim_jax.data.masks.known import KNOWN, KnownSet, known_set
from tinymim_jax.data.masks.report import describe_masks
from tinymim_jax.data.masks.rules import MaskRules
from tinymim_jax.data.sources import files
from tinymim_jax.data.sources.examples import Example, MaskClass, Source
from tinymim_jax.data.sources.labels import LabelError, shown

log = logging.getLogger(__name__)

# TFDS sets whose masks mean something else than their name promises.
_REFUSED = {
    "scene_parse150": (
        "TFDS reads the instance masks of scene_parse150, whose values are numbers of objects and not the 150 classes "
        "of ADE20K. Download ADEChallengeData2016.zip and use data.source=pairs:DIR/ADEChallengeData2016"
    )
}


class MaskSource(Source):
    """The records of `source` with `pixel_labels` in place of `mask`; labels are -1.

    `class_names` are those of the masks' classes, and `class_colours` their colours. Reading a record raises
    LabelError, with its name, where a mask is missing or holds values that are no class.
    """

    def __init__(self, source: Source, rules: MaskRules, classes: tuple[MaskClass, ...]):
        self.name, self.split = source.name, source.split
        self.mask_classes = classes
        self.class_names = class_names(classes)
        self.class_colours = class_colours(classes)
        self.rules = rules
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        if not (mask := example.get("mask")):
            raise LabelError(f"{self.describe(index)} has {'no mask, or an empty one' if mask == b'' else 'no mask'}")
        try:
            labels = self.rules.labels(mask)
        except LabelError as error:
            raise LabelError(f"{self.describe(index)}: {error}") from error
        return {"image": example["image"], "label": -1, "pixel_labels": labels}

    def describe(self, index: int) -> str:
        return self._source.describe(index)


def open_masks(
    source: Source,
    *,
    classes: str | int = "",
    ignore: int | tuple[int, ...] | None = None,
    label_map: tuple[tuple[int, int], ...] | None = None,
    reduce_zero_label: bool | None = None,
) -> MaskSource:
    """`source` with its masks read as classes; some of them are read now and reported.

    Args:
      classes: a well-known set (`known.KNOWN`), a file (`class_files.read_classes`), a number of classes, or empty for
        the classes that a file beside the data names.
      ignore, label_map, reduce_zero_label: see MaskRules; None: as the well-known set says, or else 255 is ignored and
        stored values are classes; stored 0 is ignored where a file numbers the classes from 1.

    Raises ValueError if the source has no masks or the classes are not known, and LabelError, with the name of a
    file and a remedy, where the masks that were read do not fit the classes.
    """
    base = source.name.partition(":")[0].partition("/")[0]
    if base in _REFUSED:
        raise ValueError(f"{source.name!r}: {_REFUSED[base]}")
    found, known = _classes(source, classes)
    names = class_names(found)
    if label_map is None:
        label_map = known.label_map if reduce_zero_label is None and ignore is None else ()
    default_ignore = known.ignore if len(names) <= 254 else (65535,)
    default_ignore = tuple(value for value in default_ignore if value not in dict(label_map))
    if reduce_zero_label is None:
        reduce_zero_label = known.reduce_zero_label and not label_map
    rules = MaskRules(
        classes=len(names),
        colours=found if any(each.colour is not None for each in found) else (),
        ignore=default_ignore if ignore is None else (ignore,) if isinstance(ignore, int) else tuple(ignore),
        label_map=tuple((int(stored), int(number)) for stored, number in label_map),
        reduce_zero_label=bool(reduce_zero_label),
    )
    log.info("%s", describe_masks(source, rules, names))
    return MaskSource(source, rules, found)


def _classes(source: Source, classes: str | int) -> tuple[tuple[MaskClass, ...], KnownSet]:
    """The classes, and the rules of the well-known set that `classes` names, or the usual ones."""
    text = str(classes).strip()
    if text.isdigit() and int(text):
        numbered = tuple(MaskClass(str(number), None) for number in range(int(text)))
        return numbered, KnownSet(numbered)
    if text not in KNOWN and ("/" in text or "." in text or (text and files.matches(files.absolute(text)))):
        try:
            named = read_classes(text)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"data.masks.classes={text!r}: there is no such file. It takes a file with a class a line, a number of "
                f"classes, or one of {', '.join(KNOWN)}"
            ) from None
        return named, _numbered(named)
    if text:
        known = known_set(text)
        _compare_with_file(source, text, class_names(known.classes))
        return known.classes, known
    if source.mask_classes:
        return source.mask_classes, _numbered(source.mask_classes)
    raise ValueError(
        f"the classes of the masks of {source.name!r} are not known: set data.masks.classes to a well-known set "
        "(ade20k, cityscapes, voc, camvid), to a file with a class a line, or to their number; or put classes.txt "
        "beside the data"
    )


def _numbered(classes: tuple[MaskClass, ...]) -> KnownSet:
    """The usual rules for the classes in a file."""
    from_one = numbered_from_one(classes)
    if from_one:
        log.info("the file of the classes numbers them from 1: the value 0 is ignored in masks")
    return KnownSet(classes, reduce_zero_label=from_one)


def _compare_with_file(source: Source, known: str, names: tuple[str, ...]) -> None:
    """Warns of a file of classes beside the data that names others than the well-known set that is to be used."""
    beside = class_names(source.mask_classes)
    if beside and (len(beside) != len(names) or len({*beside} & {*names}) < len(names) / 2):
        log.warning(
            "%s: data.masks.classes=%r has %d classes (%s), and the file of classes beside the data names %d others "
            "(%s). To use the file, set data.masks.classes=''",
            source.name,
            known,
            len(names),
            shown(names),
            len(beside),
            shown(beside),
        )
