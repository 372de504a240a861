"""Any source of images as a TFDS set of ArrayRecord files: each image verified, in parallel, resumable.

All work happens in DIR/NAME/1.0.0.incomplete, which becomes DIR/NAME/1.0.0 in one rename at the very end: a set that
looks whole is whole. Shards are fixed ranges of record indices, so the bytes written do not depend on the number of
workers nor on interruptions. Nothing here needs TensorFlow.
"""

import contextlib
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

from tinymim_jax.data.prepare.folder import LOCK, SIDECARS, VERSION, begin, is_done, locked, settings_of, shards_of
from tinymim_jax.data.prepare.report import split_report
from tinymim_jax.data.prepare.shards import Conversion, Shard, finished, set_features, sync, write_json
from tinymim_jax.data.prepare.workers import GO_ON, Progress, write_shards
from tinymim_jax.data.sources import sources as image_sources
from tinymim_jax.data.sources.examples import Source

log = logging.getLogger(__name__)

SHARD_IMAGES = 2048
MAX_REJECTED = 0.01
KEEP = Conversion()
_REPORT = "report.json"
_LISTED = 100  # rejected images named by an error


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
    """Writes the source `name` to `output`, all its `splits` unless some are named; see `write_set` for the rest.

    The one split, `all`, of a source that has no others is called `train` in the result.
    `set_name` is what TFDS will know the set by; None makes it from `name` (`default_name`). `data_dir` is where
    sources are looked for. Raises what `open_source` and `write_set` do.
    """
    set_name = default_name(name, conversion.short_side) if set_name is None else set_name
    opened = {}
    for split in splits or image_sources.splits(name, data_dir):
        # TFDS keeps the word "all" for the sum of the splits.
        opened["train" if split == "all" else split] = image_sources.open_source(name, split=split, data_dir=data_dir)
    return write_set(opened, output, set_name, conversion=conversion, **options)


def default_name(source: str, short_side: int | None = None) -> str:
    """'folder:/x/My-Pets' -> 'my_pets', or 'my_pets_256' for a short side of 256; a name that TFDS accepts."""
    kind, _, rest = source.partition(":")
    if rest and not re.fullmatch(r"[\d.*]+", rest):  # not the version of a TFDS set
        parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
        while len(parts) > 1 and re.search(r"[*?\[{]", parts[-1]):
            parts.pop()  # a pattern: the folder says more
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
    """Writes `sources`, by split, as the TFDS set `name` under `output`; returns its folder, `output/name/1.0.0`.

    Called again after an interruption it goes on; where all is done it returns at once.

    Args:
        conversion: what becomes of each image.
        shard_images: records in each shard, the last one apart.
        max_rejected: the part of a split that may be left out because it cannot be read or decoded.
        workers: processes; None takes as many as there are cores, 0 none but this one.
        on_progress: called every few seconds.

    Raises:
        ValueError: a mistaken argument; a set, begun or finished, of this name but made otherwise.
        RuntimeError: another process is writing this set; too many images rejected; a worker died.
        OSError: a shard cannot be written, for one because the disk is full.
        KeyboardInterrupt, Terminated (see `prepare_workers.terminable`): the workers have ended by then.
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
        if is_done(root, settings):  # by the process that held the lock a moment ago
            return folder
        begin(scratch, settings)
        shards = {
            split: shards_of(scratch, name, split, len(source), shard_images) for split, source in sources.items()
        }
        numbers = _fill(sources, shards, conversion, workers, max_rejected, on_progress)
        accounts = {split: [_account(shard) for shard in shards[split]] for split in shards}
        report = {"settings": settings, "workers": workers, **numbers}
        report["splits"] = {split: split_report(accounts[split], class_names) for split in shards}
        _describe(scratch, settings, class_names, accounts, report)
        os.rename(scratch, folder)
        sync(root)
        shutil.rmtree(folder / SIDECARS)
        (folder / LOCK).unlink()
    return folder


def read_report(folder: Path) -> dict[str, Any]:
    """What preparing the set in `folder` came to; `prepare_report.table` shows it."""
    return json.loads((folder / _REPORT).read_text())


def _fill(sources, shards, conversion, workers, max_rejected, on_progress) -> dict[str, Any]:
    """Writes the shards that are not there yet."""
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
    # Sidecars of shards that do not match them would count as finished once a shard of the same size takes its place.
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
        raise ValueError(f"name={name!r}: TFDS wants small letters, digits and _, such as {default_name(name)!r}")
    for key, value, least in (("shard_images", shard_images, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{key}={value} must be at least {least}")
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"max_rejected={max_rejected}: a part, from 0 to 1")
    for split, source in sources.items():
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(f"split={split!r} becomes part of file names: whole splits only, such as 'train'")
        if not len(source):
            raise ValueError(f"split={split!r} of {source.name!r} holds no image; leave it out with --splits")
        with contextlib.suppress(OSError):  # it is for later to say that it cannot be read
            if "mask" in source[0]:
                raise ValueError(f"{source.name!r} is a segmentation set: its masks would be lost")
    if not sources:
        raise ValueError("no split was named")
    class_names = {source.class_names for source in sources.values()}
    if len(class_names) > 1:
        raise ValueError(f"the splits {', '.join(sources)} do not have the same classes; prepare each by itself")
    return class_names.pop()


def _account(shard: Shard) -> dict[str, Any]:
    return json.loads(shard.sidecar.read_text())


def _too_many(shard: Shard, listed: list[dict[str, Any]], length: int, max_rejected: float) -> RuntimeError:
    folder = shard.path.parent
    names = [f"{entry['description']}: {entry['reason']}" for entry in listed[:_LISTED]]
    return RuntimeError(
        f"{len(listed):,} images of split {shard.split!r} ({length:,}) are rejected so far, more than --max_rejected "
        f"{max_rejected:g}; repair the source and remove {folder}, or allow more and {GO_ON}:\n  " + "\n  ".join(names)
    )


def _describe(scratch, settings, class_names, accounts, report) -> None:
    """Writes the report and what TFDS needs to read the set."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=scratch, dataset_name=settings["name"], filetype_suffix="array_record"
    )
    infos = []
    for split, shards in accounts.items():
        if not report["splits"][split]["images"]:
            raise RuntimeError(f"no image of split {split!r} can be decoded; {scratch} stays as it is")
        lengths, size = [account["records"] for account in shards], report["splits"][split]["file_bytes"]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    formats = {stored for split in report["splits"].values() for stored in split["formats"]}
    tfds.folder_dataset.write_metadata(
        data_dir=scratch,
        features=set_features(class_names, "png" if formats == {"png"} else "jpeg"),
        split_infos=infos,
        version=VERSION,
        description=f"Made from {settings['source']} by `tinymim prepare`; report.json tells how.",
        check_data=False,  # it would import TensorFlow
    )
    write_json(scratch / _REPORT, report)
    for path in scratch.iterdir():
        if path.is_file() and "array_record" not in path.name:
            sync(path)
    sync(scratch)
