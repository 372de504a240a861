"""Converts a source of images into a TFDS data set of ArrayRecord files, in parallel and resumably.

Every image is decoded to check it. Files are written to DIR/NAME/1.0.0.incomplete, which is renamed to DIR/NAME/1.0.0
when everything is complete, so that an incomplete data set is never opened. Each shard is a fixed range of record
indices, so the bytes written do not depend on the number of workers or on interruptions. TensorFlow is not needed.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from tinymim_jax.data.masks.class_files import CLASS_FILES, classes_text
from tinymim_jax.data.prepare.folder import LOCK, SIDECARS, VERSION, begin, is_done, locked, settings_of, shards_of
from tinymim_jax.data.prepare.masks import mask_channels
from tinymim_jax.data.prepare.report import split_report
from tinymim_jax.data.prepare.shards import Conversion, Shard, finished, set_features, write_json
from tinymim_jax.data.prepare.workers import GO_ON, Progress, write_shards
from tinymim_jax.data.sources import sources as image_sources
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.runtime.files import sync_to_disk
from tinymim_jax.runtime.paths import is_utf8

log = logging.getLogger(__name__)

SHARD_IMAGES = 2048
MAX_REJECTED = 0.01
KEEP = Conversion()
_REPORT = "report.json"
_LISTED = 100  # rejected images that an error message lists at most


def prepare_images(
    name: str,
    *,
    output: str | os.PathLike,
    set_name: str | None = None,
    splits: Sequence[str] | None = None,
    conversion: Conversion = KEEP,
    data_dir: str | os.PathLike | None = None,
    **options: Any,
) -> Path:
    """Opens the source `name` and writes it as a TFDS data set under `output`; returns its folder.

    Args:
        set_name: name of the TFDS data set; None derives it from `name` (`default_name`).
        splits: the splits to write; None means all of them. A source without splits has the single split `all`,
            which becomes `train`.
        data_dir: folder that holds the data sets of TFDS.
        options: further arguments of `write_set`.

    Raises what `open_source` and `write_set` raise.
    """
    set_name = default_name(name, conversion.short_side) if set_name is None else set_name
    opened = {}
    for split in splits or image_sources.splits(name, data_dir):
        # TFDS reserves the name "all" for the union of the splits.
        opened["train" if split == "all" else split] = image_sources.open_source(name, split=split, data_dir=data_dir)
    return write_set(opened, output, set_name, conversion=conversion, **options)


def default_name(source: str, short_side: int | None = None) -> str:
    """A data set name that TFDS accepts: 'folder:/x/My-Pets' -> 'my_pets', or 'my_pets_256' for `short_side=256`."""
    kind, _, rest = source.partition(":")
    if rest and not re.fullmatch(r"[\d.*]+", rest):  # anything but the version of a TFDS data set
        parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
        while len(parts) > 1 and re.search(r"[*?\[{]", parts[-1]):
            parts.pop()  # a pattern: use the name of the folder instead
        base = re.sub(r"\.(tar|parquet|array_record)\b.*", "", parts[-1]) if parts else kind
    else:
        base = kind.split("/")[0]
    name = re.sub(r"[^a-z0-9]+", "_", base.lower()).strip("_") or kind
    name = name if name[0].isalpha() else f"set_{name}"
    return name if short_side is None else f"{name}_{short_side}"


def write_set(
    sources: dict[str, Source],
    output: str | os.PathLike,
    name: str,
    *,
    conversion: Conversion = KEEP,
    shard_images: int = SHARD_IMAGES,
    max_rejected: float = MAX_REJECTED,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Writes a TFDS data set and returns its folder, `output/name/1.0.0`.

    A call after an interruption resumes: finished shards are kept. If the data set is complete, it returns at once.

    Args:
        sources: the source of each split, by the name of the split.
        name: name of the TFDS data set.
        conversion: how each image is converted.
        shard_images: number of records in each shard; the last shard of a split may hold fewer.
        max_rejected: largest fraction of a split, 0 to 1, that may be left out because it cannot be read or decoded.
        workers: number of worker processes; None means one per core, 0 means a thread of this process.
        on_progress: called every few seconds.

    Raises:
        ValueError: an invalid argument; a data set of this name, complete or not, that has other settings.
        RuntimeError: another process is writing this data set; too many images are rejected; a worker died.
        OSError: a shard cannot be written, for example because the disk is full.
        KeyboardInterrupt, Terminated (see `workers.terminable`): raised after the workers have ended.
    """
    class_names = _check(sources, name, shard_images, max_rejected, workers)
    workers = (os.cpu_count() or 1) if workers is None else workers
    root = Path(output).expanduser().absolute() / name
    folder, scratch = root / VERSION, root / f"{VERSION}.incomplete"
    settings = settings_of(sources, name, conversion, shard_images)
    if is_done(root, settings):
        return folder
    scratch.mkdir(parents=True, exist_ok=True)
    with locked(scratch):
        if is_done(root, settings):  # another process finished it before this one got the lock
            return folder
        begin(scratch, settings)
        shards = {
            split: shards_of(scratch, name, split, len(source), shard_images) for split, source in sources.items()
        }
        numbers = _fill(sources, shards, conversion, workers, max_rejected, on_progress)
        accounts = {split: [_account(shard) for shard in shards[split]] for split in shards}
        report = {"settings": settings, "workers": workers, **numbers}
        report["splits"] = {split: split_report(accounts[split], class_names) for split in shards}
        _describe(scratch, settings, class_names, sources, accounts, report)
        os.rename(scratch, folder)
        sync_to_disk(root)
        shutil.rmtree(folder / SIDECARS)
        (folder / LOCK).unlink()
    return folder


def read_report(folder: Path) -> dict[str, Any]:
    """The report (report.json) of the prepared data set in `folder`; `report.table` formats it."""
    return json.loads((folder / _REPORT).read_text())


def _fill(sources, shards, conversion, workers, max_rejected, on_progress) -> dict[str, Any]:
    """Writes the shards that are not finished yet; returns time and speed for the report."""
    rejected, allowed = {}, {split: int(max_rejected * len(source)) for split, source in sources.items()}

    def note(shard: Shard) -> None:
        listed = rejected.setdefault(shard.split, [])
        listed.extend(_account(shard)["rejected"])
        if len(listed) > allowed[shard.split]:
            raise _too_many(shard, listed, len(sources[shard.split]), max_rejected)

    started, missing, before = time.monotonic(), [], 0
    for shard in (shard for split in shards.values() for shard in split):
        if finished(shard):
            before += shard.last - shard.first
            note(shard)
        else:
            missing.append(shard)
    if before:
        log.info("%d images are in finished shards, which are kept", before)
    # Remove sidecars that do not match their shard: a new shard of the same size would make them look valid.
    for shard in missing:
        shard.sidecar.unlink(missing_ok=True)
    write_shards(
        missing, sources, conversion, workers=workers, done_before=before, on_shard=note, on_progress=on_progress
    )
    seconds = time.monotonic() - started
    images = sum(shard.last - shard.first for shard in missing)
    return {"seconds": round(seconds, 3), "images_this_run": images, "images_per_second": round(images / seconds, 1)}


def _check(sources, name, shard_images, max_rejected, workers) -> tuple[str, ...]:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"name={name!r}: TFDS allows lower-case letters, digits and _ only, for example {default_name(name)!r}"
        )
    for key, value, least in (("shard_images", shard_images, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{key}={value} must be at least {least}")
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"max_rejected={max_rejected} must be a fraction from 0 to 1")
    for split, source in sources.items():
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(f"split={split!r} becomes part of file names and must be a whole split, such as 'train'")
        if not len(source):
            raise ValueError(f"split={split!r} of {source.name!r} holds no images; leave it out with --splits")
        mask_channels(source)
    if not sources:
        raise ValueError("no split was given; name at least one")
    class_names = {source.class_names for source in sources.values()}
    if len(class_names) > 1:
        raise ValueError(f"the splits {', '.join(sources)} do not have the same classes; prepare each split separately")
    (names,) = class_names
    if foreign := [each for each in names if not is_utf8(each)]:
        raise ValueError(
            f"the class name {foreign[0]!a} is not valid UTF-8, which TFDS needs: rename its folder, or set "
            "LANG=C.UTF-8 where the name itself is valid"
        )
    return names


def _account(shard: Shard) -> dict[str, Any]:
    return json.loads(shard.sidecar.read_text())


def _too_many(shard: Shard, listed: list[dict[str, Any]], length: int, max_rejected: float) -> RuntimeError:
    folder = shard.path.parent
    names = [f"{entry['description']}: {entry['reason']}" for entry in listed[:_LISTED]]
    return RuntimeError(
        f"{len(listed):,} images of split {shard.split!r} ({length:,}) have been rejected so far, more than "
        f"--max_rejected {max_rejected:g}; repair the source and remove {folder}, or allow more and {GO_ON}:\n  "
        + "\n  ".join(names)
    )


def _describe(scratch, settings, class_names, sources, accounts, report) -> None:
    """Writes report.json, the metadata that TFDS needs to open the data set, and the classes of masks."""
    first: Source = next(iter(sources.values()))
    if first.mask_classes:
        (scratch / CLASS_FILES[0]).write_text(classes_text(first.mask_classes))
    template = tfds.core.ShardedFileTemplate(
        data_dir=scratch, dataset_name=settings["name"], filetype_suffix="array_record"
    )
    infos = []
    for split, shards in accounts.items():
        if not report["splits"][split]["images"]:
            raise RuntimeError(f"no image of split {split!r} can be decoded; {scratch} is left as it is")
        lengths, size = [account["records"] for account in shards], report["splits"][split]["file_bytes"]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    formats = {stored for split in report["splits"].values() for stored in split["formats"]}
    tfds.folder_dataset.write_metadata(
        data_dir=scratch,
        features=set_features(class_names, "png" if formats == {"png"} else "jpeg", mask_channels(first)),
        split_infos=infos,
        version=VERSION,
        description=f"Made from {settings['source']} by `tinymim prepare`; see report.json for its settings.",
        check_data=False,  # it would import TensorFlow
    )
    write_json(scratch / _REPORT, report)
    for path in scratch.iterdir():
        if path.is_file() and "array_record" not in path.name:
            sync_to_disk(path)
    sync_to_disk(scratch)
