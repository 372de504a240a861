"""Where each record of a set of files lies: columns of numbers in a cache folder, mapped into memory.

Mapped, so that tens of millions of records cost the worker processes of a host one copy between them, and a
source that is sent to one is only the name of a folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

_FORMAT = 4  # part of every fingerprint: an index written by other code is not found


class Records:
    """An index being made: what `build` of `cached` returns.

    A record has a name, and a label, a place (shard, offset, size) where the kind of set has such a thing.
    """

    def __init__(self):
        self.names = bytearray()
        self.ends = array("q")
        self.labels = array("i")
        self.shards = array("i")
        self.offsets = array("q")
        self.sizes = array("q")
        self.row_labels = array("i")  # of every row, where records are row groups or files of many rows
        self.meta: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, name: str, label: int = -1, shard: int = 0, offset: int = 0, size: int = 0) -> None:
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)
        self.shards.append(shard)
        self.offsets.append(offset)
        self.sizes.append(size)

    def extend(self, other: "Records") -> None:
        """Adds the records of `other`, in their order; its `meta` is not looked at."""
        before = len(self.names)
        self.names += other.names
        self.ends.extend(array("q", (np.frombuffer(other.ends, np.int64) + before).tobytes()))
        for mine, more in zip(self._numbers(), other._numbers()):
            mine.extend(more)

    def mixed(self) -> "Records":
        """The same records in an order that their names alone decide, as good as random.

        Slices of a set that is listed class by class would hold some classes and lack others. Records that are
        added later leave the order of the rest as it was.
        """
        ends = np.frombuffer(self.ends, np.int64).tolist()
        spans = list(zip([0, *ends], ends))
        digests = [hashlib.blake2b(self.names[start:end], digest_size=8).digest() for start, end in spans]
        mixed = Records()
        mixed.meta = self.meta
        for i in np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable").tolist():
            mixed.names += self.names[slice(*spans[i])]
            mixed.ends.append(len(mixed.names))
            for column, values in zip(mixed._numbers(), self._numbers()):
                column.append(values[i])
        return mixed

    def _numbers(self) -> tuple[array, ...]:
        return self.labels, self.shards, self.offsets, self.sizes

    def columns(self) -> dict[str, np.ndarray]:
        return {
            "names": np.frombuffer(self.names, np.uint8),
            "ends": np.frombuffer(self.ends, np.int64),
            "labels": np.frombuffer(self.labels, np.int32),
            "shards": np.frombuffer(self.shards, np.int32),
            "offsets": np.frombuffer(self.offsets, np.int64),
            "sizes": np.frombuffer(self.sizes, np.int64),
            "row_labels": np.frombuffer(self.row_labels, np.int32),
        }


class Index:
    """The records of a set of files, as `Records` laid them down, read-only; it can be pickled.

    `labels`, `shards`, `offsets`, `sizes` are arrays over the records, `row_labels` one over their rows, where records
    have rows with labels; `meta` is what else the kind of set keeps.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
        self._names, self._ends = self._column("names"), self._column("ends")
        self.labels, self.shards = self._column("labels"), self._column("shards")
        self.offsets, self.sizes = self._column("offsets"), self._column("sizes")
        self.row_labels = self._column("row_labels")

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[begin : int(self._ends[index])].tobytes())

    def _column(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def __reduce__(self):
        return Index, (self.folder,)


def cache_folder() -> Path:
    """Where indexes are kept: `$TINYMIM_CACHE/index`, by default `~/.cache/tinymim_jax/index`."""
    root = os.environ.get("TINYMIM_CACHE") or "~/.cache/tinymim_jax"
    return Path(root).expanduser().absolute() / "index"


def cached(what: str, fingerprint: Any, build: Callable[[], Records]) -> Index:
    """The index made before under the same fingerprint (anything that JSON can hold), or a new one.

    `what` is what an error calls the set.

    Raises ValueError where there is no record, OSError where the cache folder cannot be written.
    """
    text = json.dumps([_FORMAT, fingerprint], sort_keys=True)
    folder = cache_folder() / hashlib.sha256(text.encode()).hexdigest()
    if not (folder / "meta.json").is_file():
        records = build()
        if not len(records):
            raise ValueError(f"{what} holds no image")
        _write(folder, records)
    return Index(folder)


def _write(folder: Path, records: Records) -> None:
    """Aside, then renamed in one go: several processes may write the same, and none ever sees half of it."""
    with writable(folder.parent), tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        made = Path(scratch) / "index"
        made.mkdir()
        for name, column in records.columns().items():
            # What is empty cannot be mapped; a name of no bytes has one that is never read.
            np.save(made / f"{name}.npy", column if len(column) else np.zeros(1, column.dtype))
        (made / "meta.json").write_text(json.dumps(records.meta))
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
    log.info("indexed %d records into %s", len(records), folder)


@contextlib.contextmanager
def writable(folder: Path):
    """Makes `folder`; an OSError inside says what the folder is for and how to choose another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(
            f"the index of the images cannot be kept in {folder} ({error}); "
            "set TINYMIM_CACHE to a folder that can be written and has room"
        ) from error
