"""`array_record:LOCATION`: ArrayRecord files of images, or of tf.train.Examples that hold one."""

import logging
import re
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
# JPEG, PNG, GIF, BMP, TIFF in both orders, binary PNM; a tf.train.Example begins with the byte 0x0A.
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|BM|II\*\0|MM\0\*|P[1-6]\s|RIFF....WEBP|....ftypavi[fs]", re.DOTALL)


def open_split(name: str, location: str, split: str) -> Source:
    """A whole split of the files at `location`; for the rules and the errors see `sources.open_source`."""
    if files.is_remote(files.absolute(location)):
        raise ValueError(
            f"{name!r}: ArrayRecord files are read from local paths alone; mount the bucket (gcsfuse) and give "
            "that path, or copy the files"
        )
    found = shards.find(FORMAT, name, location, split)
    return ArrayRecordSource(
        name, split, cached(f"{name}/{split}", shards.fingerprint(FORMAT, found), lambda: _records(found))
    )


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class ArrayRecordSource(Source):
    """Records of ArrayRecord files, in their order."""

    def __init__(self, name: str, split: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
        self._index = index  # its records are the files: where each begins
        self._paths: list[str] = index.meta["paths"]
        # With their lengths, known since they were indexed, files are opened when first read.
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{int(size)}]" for path, size in zip(self._paths, index.sizes)],
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        image, label = _parse(self._records[index])
        if not self.class_names:
            return {"image": image, "label": -1}
        if label >= self.classes:
            raise ValueError(f"{self.describe(index)} has label {label}, but there are {self.classes} classes")
        return {"image": image, "label": label}

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        number = int(np.searchsorted(self._index.offsets, index, side="right")) - 1
        return f"record {index - int(self._index.offsets[number])} of {self._paths[number]}"

    def __reduce__(self):
        return ArrayRecordSource, (self.name, self.split, self._index)


def _parse(record: bytes) -> tuple[bytes, int]:
    """The image file in a record, and its label or -1. Raises ValueError where there is no image."""
    if _MAGIC.match(record):
        return record, -1
    example: Any = tf_example_pb2.Example()  # type: ignore  # made when imported
    try:
        example.ParseFromString(record)
    except Exception as error:  # protobuf's own class moves between its versions
        raise ValueError(f"neither an image file nor a tf.train.Example: it begins {record[:12]!r}") from error
    features: Any = example.features.feature
    # Asking a protobuf map for a key adds it: hence the search.
    image = next((features[key].bytes_list.value for key in IMAGE_KEYS if key in features), ())
    if len(image) != 1:
        raise ValueError(f"no image among {sorted(features)}; needed is {' or '.join(IMAGE_KEYS)}, one string")
    label = next((features[key].int64_list.value for key in LABEL_KEYS if key in features), ())
    return image[0], int(label[0]) if len(label) == 1 else -1


def _records(found: list[File]) -> Records:
    """One record for each file: its first record and its length."""
    records = Records()
    first = 0
    for number, count in enumerate(files.in_threads(lambda file: _length(file.path), found)):
        if count:
            records.add("", -1, number, first, count)
            first += count
    kept = [found[number].path for number in records.shards]
    records.meta = {"paths": kept, "class_names": _class_names(kept, list(records.sizes), first) if kept else []}
    return records


def _length(path: str) -> int:
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is cut short or not an ArrayRecord file; fetch it again ({error})") from error
    return count


def _class_names(paths: list[str], counts: list[int], total: int) -> list[str]:
    """From `classes.txt`; without, every record is read for its label: these files say nothing about them."""
    opened = ArrayRecordDataSource([f"{path}[0:{count}]" for path, count in zip(paths, counts)])
    try:
        _, label = _parse(opened[0])
    except ValueError as error:
        raise ValueError(f"record 0 of {paths[0]} cannot be used: {error}") from error
    if label < 0:
        return []
    names = shards.class_names(paths[0], 0)
    if names:
        return names
    log.info("reading %d records of %s and its fellows once, for their labels; a classes.txt saves it", total, paths[0])
    with opened:
        highest = max(_parse(record)[1] for record in opened)
    return shards.class_names(paths[0], highest + 1)
