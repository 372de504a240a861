"""`array_record:LOCATION`: ArrayRecord files whose records are image files or tf.train.Examples with an image."""

import logging
import re
from array import array
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from tinymim_jax.data.sources import files, shards
from tinymim_jax.data.sources.examples import Example, Source
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.index import Index, Records, cached

log = logging.getLogger(__name__)

FORMAT = shards.Format("array_record", re.compile(r"\.array_?record(-\d+-of-\d+)?$"))
IMAGE_KEYS = ("image", "image/encoded")
LABEL_KEYS = ("label", "image/class/label")
# JPEG, PNG, GIF, BMP, TIFF (both byte orders), PNM, WebP, AVIF. A serialized tf.train.Example starts with byte 0x0A.
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|BM|II\*\0|MM\0\*|P[1-6]\s|RIFF....WEBP|....ftypavi[fs]", re.DOTALL)


def open_split(name: str, location: str, split: str) -> Source:
    """Opens a whole split of the files at `location`; see `sources.open_source` for the file layout and errors."""
    if files.is_remote(files.absolute(location)):
        raise ValueError(
            f"{name!r}: ArrayRecord files can only be read from local paths; mount the bucket (gcsfuse) and "
            "use that path, or copy the files"
        )
    found = shards.find(FORMAT, name, location, split)
    return ArrayRecordSource(
        name, split, cached(f"{name}/{split}", shards.fingerprint(FORMAT, found), lambda: _records(found))
    )


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class ArrayRecordSource(Source):
    """The records of ArrayRecord files, in file order."""

    def __init__(self, name: str, split: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
        self.label_problem = index.meta["label_problem"]
        self._index = index  # one entry per file: its first record and record count
        self._paths: list[str] = index.meta["paths"]
        # With record counts given (from the index), a file is opened only when it is first read.
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{int(size)}]" for path, size in zip(self._paths, index.sizes)],
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        image, label = _parse(self._records[index])
        return {"image": image, "label": -1 if label is None or not self.class_names else label}

    def known_labels(self) -> np.ndarray | None:
        return self._index.row_labels if self._index.meta["labels_known"] else None

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        number = int(np.searchsorted(self._index.offsets, index, side="right")) - 1
        return f"record {index - int(self._index.offsets[number])} of {self._paths[number]}"

    def __reduce__(self):
        return ArrayRecordSource, (self.name, self.split, self._index)


def _parse(record: bytes) -> tuple[bytes, int | None]:
    """The encoded image of a record and its label, or None without one. Raises ValueError if there is no image."""
    if _MAGIC.match(record):
        return record, None
    example: Any = tf_example_pb2.Example()  # type: ignore  # protobuf creates the class at import
    try:
        example.ParseFromString(record)
    except Exception as error:  # the module of protobuf's DecodeError depends on its version
        raise ValueError(f"neither an image file nor a tf.train.Example: it starts with {record[:12]!r}") from error
    features: Any = example.features.feature
    # `in` first: indexing a protobuf map with a missing key adds the key.
    image = next((features[key].bytes_list.value for key in IMAGE_KEYS if key in features), ())
    if len(image) != 1:
        raise ValueError(f"no image among {sorted(features)}; expected one byte string in {' or '.join(IMAGE_KEYS)}")
    label = next((features[key].int64_list.value for key in LABEL_KEYS if key in features), ())
    return image[0], int(label[0]) if len(label) == 1 else None


def _records(found: list[File]) -> Records:
    """The index: one entry per non-empty file, with its first record (offset) and record count (size)."""
    records = Records()
    first = 0
    for number, count in enumerate(files.in_threads(lambda file: _length(file.path), found)):
        if count:
            records.add("", -1, number, first, count)
            first += count
    kept = [found[number].path for number in records.shards]
    records.meta = {"paths": kept, "class_names": [], "label_problem": "", "labels_known": False}
    if kept:
        _find_classes(records, kept, first)
    return records


def _length(path: str) -> int:
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not an ArrayRecord file; download it again ({error})") from error
    return count


def _find_classes(records: Records, paths: list[str], total: int) -> None:
    """Adds the class names to the index, from `classes.txt`.

    Without that file all labels are read once and stored in the index.
    """
    opened = ArrayRecordDataSource([f"{path}[0:{count}]" for path, count in zip(paths, records.sizes)])
    try:
        _, label = _parse(opened[0])
    except ValueError as error:
        raise ValueError(f"record 0 of {paths[0]} cannot be used: {error}") from error
    if label is None:  # image files, or examples without a label
        return
    names, problem = shards.named_classes(paths[0]), ""
    if not names:
        log.info("reading the labels of %d records of %s, ... (once; a classes.txt file avoids this)", total, paths[0])
        with opened:
            known = [_label(record) for record in opened]
        labels = np.array([-1 if label is None else label for label in known], np.int32)
        names, problem = shards.class_names(paths[0], labels)
        if None not in known:
            records.row_labels = array("i", labels.tobytes())
    records.meta |= {"class_names": names, "label_problem": problem, "labels_known": len(records.row_labels) > 0}


def _label(record: bytes) -> int | None:
    """The label of a record, clipped to int32; -1 if it has none, None if the record is damaged."""
    try:
        _, label = _parse(record)
    except ValueError:
        return None
    return -1 if label is None else min(max(label, -(2**31)), 2**31 - 1)
