"""The output folder of a data set being prepared: its settings, its lock, and the names of its shards."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinymim_jax.data.prepare.shards import Conversion, Shard, raise_if_of_the_machine, write_json
from tinymim_jax.data.sources.examples import Source

VERSION = "1.0.0"
SIDECARS, LOCK, SETTINGS = "sidecars", "prepare.lock", "prepare.json"
_FORMAT = 1  # version of prepare.json and the sidecars; a folder started with another version is not resumed
_SAMPLED = 16  # records of each split that go into the digest of the source


def settings_of(sources: dict[str, Source], name: str, conversion: Conversion, shard_images: int) -> dict[str, Any]:
    """Everything that determines the bytes of the data set, as JSON values."""
    recoded = conversion.short_side is not None or conversion.upright
    return {
        "format": _FORMAT,
        "name": name,
        "source": next(iter(sources.values())).name,
        "splits": {split: len(source) for split, source in sources.items()},
        "source_digest": _digest(sources),
        "shard_images": shard_images,
        **dataclasses.asdict(conversion),
        "quality": conversion.quality if recoded else None,
    }


def _digest(sources: dict[str, Source]) -> str:
    """SHA-256 of the class names and of a few evenly spaced records of each split.

    Different digests mean different sources; equal digests do not prove that the sources are equal.
    """
    digest = hashlib.sha256()
    for split, source in sources.items():
        digest.update(json.dumps([split, len(source), source.class_names]).encode())
        for index in sorted({place * (len(source) - 1) // (_SAMPLED - 1) for place in range(_SAMPLED)}):
            try:
                record = source[index]
                content = hashlib.sha256(record["image"]).hexdigest() + f" {record['label']}"
                if "mask" in record:
                    content += " " + hashlib.sha256(record["mask"]).hexdigest()
            except Exception as error:
                raise_if_of_the_machine(error)
                content = type(error).__name__
            digest.update(f"{index} {content}\n".encode())
    return digest.hexdigest()


def is_done(root: Path, settings: dict[str, Any]) -> bool:
    """Whether the data set in `root` is complete.

    Raises ValueError if `root` holds a data set that has other settings or was written by another program.
    """
    for found in root.glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", found.parent.name) and not (found.parent / SETTINGS).is_file():
            raise ValueError(
                f"{found.parent} is a data set that was written by another program; choose another --name or --output"
            )
    _compare(root / VERSION, settings)
    return (root / VERSION / SETTINGS).is_file()


def _compare(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the data set in `folder`, complete or not, was started with other settings."""
    try:
        there = json.loads((folder / SETTINGS).read_text())
    except FileNotFoundError:
        return
    differing = [
        f"{key}: {there.get(key)!r} in the folder, {settings.get(key)!r} now"
        for key in sorted(there.keys() | settings.keys())
        if there.get(key) != settings.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder} was made with other options or from another source; choose another --name or remove it:\n  "
            + "\n  ".join(differing)
        )


def begin(scratch: Path, settings: dict[str, Any]) -> None:
    """Starts or resumes the preparation in `scratch`: writes the settings and deletes temporary files.

    Raises ValueError if the preparation was started with other settings.
    """
    _compare(scratch, settings)
    (scratch / SIDECARS).mkdir(exist_ok=True)
    for left_over in (*scratch.glob("*.tmp"), *scratch.glob(f"{SIDECARS}/*.tmp")):
        left_over.unlink(missing_ok=True)
    write_json(scratch / SETTINGS, settings)


@contextlib.contextmanager
def locked(scratch: Path) -> Iterator[None]:
    """Holds an exclusive lock on `scratch`; the operating system releases it if the process is killed.

    Raises RuntimeError if another process holds it, or has just finished the data set and renamed the folder.
    """
    busy = RuntimeError(f"another process is writing {scratch}; wait until it ends, or stop it")
    path = scratch / LOCK
    try:
        file = open(path, "a")  # noqa: SIM115, closed below
    except FileNotFoundError:
        raise busy from None  # another process has just finished it and renamed the folder
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise busy  # another process finished it after we opened the lock file
        yield


def shards_of(scratch: Path, name: str, split: str, length: int, shard_images: int) -> list[Shard]:
    """The shards of a split. They depend on its length only, not on the number of workers or on the images."""
    starts = range(0, length, shard_images)
    shards = []
    for number, first in enumerate(starts):
        file_name = f"{name}-{split}.array_record-{number:05d}-of-{len(starts):05d}"
        sidecar = scratch / SIDECARS / f"{file_name}.json"
        shards.append(Shard(split, first, min(first + shard_images, length), scratch / file_name, sidecar))
    return shards
