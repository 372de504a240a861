"""On-disk index of the records of a data set: memory-mapped arrays in a cache folder.

Memory mapping lets the worker processes of a host share one copy of tens of millions of records, and pickling a
source only sends the name of a folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

_FORMAT = 4  # part of every fingerprint, so indexes of older formats are ignored

_MASKS = ("mask_offsets", "mask_sizes")


class Records:
    """An index under construction, returned by the `build` argument of `cached`.

    Each record has a name, a label, a position (shard, offset, size) and that of its mask in the same shard; formats
    leave unused fields at their defaults.
    """

    def __init__(self):
        self.names = bytearray()
        self.ends = array("q")
        self.labels = array("i")
        self.shards = array("i")
        self.offsets = array("q")
        self.sizes = array("q")
        self.mask_offsets = array("q")
        self.mask_sizes = array("q")
        self.row_labels = array("i")  # one label per row, if a record is a row group or a file of many rows
        self.meta: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def add(
        self, name: str, label: int = -1, shard: int = 0, offset: int = 0, size: int = 0, mask: tuple[int, int] = (0, 0)
    ) -> None:
        """`mask`: its offset and size."""
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)
        self.shards.append(shard)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.mask_offsets.append(mask[0])
        self.mask_sizes.append(mask[1])

    def add_files(self, names: list[str], label: int) -> None:
        """`add` for each of `names`, which share a label."""
        if not names:
            return
        encoded = os.fsencode("\0".join(names)).split(b"\0")
        ends = np.cumsum([len(name) for name in encoded]) + len(self.names)
        self.names += b"".join(encoded)
        self.ends.extend(array("q", ends.astype(np.int64).tobytes()))
        for column in self._numbers():
            column.extend(array(column.typecode, [label if column is self.labels else 0]) * len(names))

    def extend(self, other: "Records") -> None:
        """Appends the records of `other`; its `meta` and `row_labels` are ignored."""
        before = len(self.names)
        self.names += other.names
        self.ends.extend(array("q", (np.frombuffer(other.ends, np.int64) + before).tobytes()))
        for mine, more in zip(self._numbers(), other._numbers()):
            mine.extend(more)

    def mixed(self) -> "Records":
        """The same records in a pseudo-random order, sorted by a hash of their names.

        In listing order a slice of the set would contain only some of the classes. Adding records does not change
        the relative order of the others.
        """
        ends = np.frombuffer(self.ends, np.int64).tolist()
        joined = bytes(self.names)
        names = [joined[start:end] for start, end in zip([0, *ends], ends)]
        digests = b"".join([hashlib.blake2b(name, digest_size=8).digest() for name in names])
        order = np.argsort(np.frombuffer(digests, ">u8"), kind="stable")
        mixed = Records()
        mixed.meta = self.meta
        mixed.names += b"".join([names[i] for i in order.tolist()])
        mixed.ends.frombytes(np.cumsum(np.diff(ends, prepend=0)[order]).astype(np.int64).tobytes())
        for column, values in zip(mixed._numbers(), self._numbers()):
            column.frombytes(np.frombuffer(values, values.typecode)[order].tobytes())
        return mixed

    def _numbers(self) -> tuple[array, ...]:
        return self.labels, self.shards, self.offsets, self.sizes, self.mask_offsets, self.mask_sizes

    def columns(self) -> dict[str, np.ndarray]:
        """What is stored; without the columns of masks where no record has one."""
        masks = {
            "mask_offsets": np.frombuffer(self.mask_offsets, np.int64),
            "mask_sizes": np.frombuffer(self.mask_sizes, np.int64),
        }
        return (masks if any(self.mask_sizes) else {}) | {
            "names": np.frombuffer(self.names, np.uint8),
            "ends": np.frombuffer(self.ends, np.int64),
            "labels": np.frombuffer(self.labels, np.int32),
            "shards": np.frombuffer(self.shards, np.int32),
            "offsets": np.frombuffer(self.offsets, np.int64),
            "sizes": np.frombuffer(self.sizes, np.int64),
            "row_labels": np.frombuffer(self.row_labels, np.int32),
        }


class Index:
    """The stored, read-only form of `Records`; picklable.

    `labels`, `shards`, `offsets` and `sizes` have one entry per record, and so have `mask_offsets` and `mask_sizes`,
    which are None if no record has a mask. `row_labels` has one per row, if records have labelled rows. `meta` holds
    format-specific data.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
        self._names, self._ends = self._column("names"), self._column("ends")
        self.labels, self.shards = self._column("labels"), self._column("shards")
        self.offsets, self.sizes = self._column("offsets"), self._column("sizes")
        self.row_labels = self._column("row_labels")
        masks = (self.folder / "mask_sizes.npy").exists()
        self.mask_offsets, self.mask_sizes = map(self._column, _MASKS) if masks else (None, None)

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
    """The folder of the indexes: `$TINYMIM_CACHE/index`, by default `~/.cache/tinymim_jax/index`."""
    root = os.environ.get("TINYMIM_CACHE") or "~/.cache/tinymim_jax"
    return Path(root).expanduser().absolute() / "index"


def cached(what: str, fingerprint: Any, build: Callable[[], Records]) -> Index:
    """The stored index with this fingerprint (any JSON-serializable value), built now if there is none.

    `what` names the data set in errors. Raises ValueError if there are no records, OSError if the cache folder cannot
    be written.
    """
    encoding = sys.getfilesystemencoding()  # of names of files and classes; in ASCII locales it garbles them
    text = json.dumps([_FORMAT, fingerprint, *([encoding] if encoding != "utf-8" else [])], sort_keys=True)
    folder = cache_folder() / hashlib.sha256(text.encode()).hexdigest()
    if not (folder / "meta.json").is_file():
        records = build()
        if not len(records):
            raise ValueError(f"{what} holds no image")
        _write(folder, records)
    return Index(folder)


def _write(folder: Path, records: Records) -> None:
    """Writes to a temporary folder and renames it, so concurrent processes never see a partial index."""
    with writable(folder.parent), tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        made = Path(scratch) / "index"
        made.mkdir()
        for name, column in records.columns().items():
            # An empty array cannot be memory-mapped: store one element that is never read.
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
    """Creates `folder`; an OSError in the block is raised again with the purpose of the folder and a remedy."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(
            f"the image index cannot be written to {folder} ({error}); "
            "set TINYMIM_CACHE to a folder that is writable and has free space"
        ) from error
