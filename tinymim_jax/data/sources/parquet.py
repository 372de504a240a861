"""`parquet:LOCATION`: Parquet files as Hugging Face keeps image sets, read by row groups."""

import json
import logging
import re
import threading
from array import array
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinymim_jax.data.sources import files, shards
from tinymim_jax.data.sources.examples import Example, Source
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.index import Index, Records, cached

log = logging.getLogger(__name__)

FORMAT = shards.Format("parquet", re.compile(r"\.(parquet|parq|pq)$"))
IMAGE_COLUMNS = ("image", "img", "jpg")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# To read one row is to read its row group. Those last read are kept, in each process, up to so many bytes.
CACHE_BYTES = 256 * 2**20
_LARGE_GROUP = 32 * 2**20
_INT32 = -(2**31), 2**31 - 1


def open_split(name: str, location: str, split: str) -> Source:
    """A whole split of the files at `location`; for the rules and the errors see `sources.open_source`."""
    found = shards.find(FORMAT, name, location, split)
    index = cached(f"{name}/{split}", shards.fingerprint(FORMAT, found), lambda: _records(found))
    largest = int(index.sizes.max())
    if largest > _LARGE_GROUP:
        log.warning(
            "%s keeps its images in row groups of up to %d MB, and each image that is asked for takes one: slow when "
            "shuffled. Writing the set anew by `tinymim prepare %s --output DIR` makes it fast",
            name,
            largest // 2**20,
            name,
        )
    return ParquetSource(name, split, index)


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class ParquetSource(Source):
    """Rows of Parquet files, in their order."""

    def __init__(self, name: str, split: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
        self.label_problem = index.meta["label_problem"]
        self._columns = Columns(**index.meta["columns"])
        self._paths: list[str] = index.meta["paths"]
        self._index = index  # its records are row groups: a file, a number in it, where the rows begin
        self._groups: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._kept_bytes = 0
        self._loading: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.meta["rows"])

    def __getitem__(self, index: int) -> Example:
        group, row = self._place(index)
        images, labels = self._group(group)
        image = images[row].as_py()
        if image is None:
            raise ValueError(f"{self.describe(index)} holds no image, or only the name of a file elsewhere")
        label = labels[row].as_py() if labels is not None else None
        return {"image": image, "label": -1 if label is None else int(label)}

    def known_labels(self) -> np.ndarray | None:
        return self._index.row_labels if self._columns.label else None

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        group, _ = self._place(index)
        first = int(self._index.offsets[int(np.searchsorted(self._index.shards, self._index.shards[group]))])
        return f"row {index - first} of {self._paths[self._index.shards[group]]}"

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        group = int(np.searchsorted(self._index.offsets, index, side="right")) - 1
        return group, index - int(self._index.offsets[group])

    def _group(self, group: int) -> tuple[Any, Any]:
        """The images and the labels (None where there are none) of a row group, from those kept or read now."""
        with self._lock:
            loading = self._loading.setdefault(group, threading.Lock())
        with loading:  # two threads that want the same one read it once
            with self._lock:
                if group in self._groups:
                    self._groups.move_to_end(group)
                    return self._groups[group]
            read = self._read(group)
            with self._lock:
                self._groups[group] = read
                self._kept_bytes += read[0].nbytes
                while len(self._groups) > 1 and self._kept_bytes > CACHE_BYTES:
                    dropped, (images, _) = self._groups.popitem(last=False)
                    self._kept_bytes -= images.nbytes
                    self._loading.pop(dropped, None)
        return read

    def _read(self, group: int) -> tuple[Any, Any]:
        number = int(self._index.labels[group])
        with files.open_file(self._paths[self._index.shards[group]]) as opened, pq.ParquetFile(opened) as file:
            # Of a struct {bytes, path} only the bytes.
            table = file.read_row_group(number, columns=self._columns.leaves(), use_threads=False)
        images = table.column(self._columns.image).combine_chunks()
        if pa.types.is_struct(images.type):
            images = images.flatten()[0]  # null where the struct is
        labels = table.column(self._columns.label).combine_chunks() if self._columns.label else None
        return images, labels

    def __reduce__(self):
        return ParquetSource, (self.name, self.split, self._index)


class Columns(NamedTuple):
    """Which columns hold the images and, if any does, the labels."""

    image: str
    is_struct: bool
    label: str | None

    def leaves(self) -> list[str]:
        image = f"{self.image}.bytes" if self.is_struct else self.image
        return [image] if self.label is None else [image, self.label]


def _records(found: list[File]) -> Records:
    """One record for each row group: file, number (as its label), first row, and bytes."""
    described = files.in_threads(_describe, found)
    schema = described[0][1]
    columns, names, problem = _columns(found[0].path, schema)
    for file, (_, other) in zip(found, described):
        if _columns(file.path, other)[:2] != (columns, names):
            raise ValueError(
                f"{file.path} has other columns or classes than {found[0].path}; give each kind its folder"
            )
    records = Records()
    first = 0
    for number, (metadata, _) in enumerate(described):
        for group in range(metadata.num_row_groups):
            part = metadata.row_group(group)
            if part.num_rows:
                records.add("", group, number, first, part.total_byte_size)
                first += part.num_rows
    if columns.label:
        labels = np.concatenate(files.in_threads(lambda file: _labels(file, columns.label), found))
        if names is None:
            names, problem = shards.class_names(found[0].path, labels)
        elif not (labels >= 0).any():
            names = []  # as the Hugging Face hub's test splits: classes, and -1 for every image
        records.row_labels = array("i", labels.tobytes())
    records.meta = {
        "paths": [file.path for file in found],
        "rows": first,
        "columns": columns._asdict(),
        "class_names": names or [],
        "label_problem": problem,
    }
    return records


def _describe(file: File) -> tuple[Any, Any]:
    try:
        with files.open_file(file.path) as opened, pq.ParquetFile(opened) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.path} is cut short or not a Parquet file; fetch it again ({error})") from error


def _columns(path: str, schema: Any) -> tuple[Columns, list[str] | None, str]:
    """The columns to read, the classes where the file names them, and why a column of labels cannot be read."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = {
        name: feature
        for name, feature in ((noted.get("info") or {}).get("features") or {}).items()
        if isinstance(feature, dict) and name in schema.names
    }

    def kept_as(kind: str) -> list[str]:
        return [name for name, feature in features.items() if feature.get("_type") == kind]

    image = _chosen(path, "image", kept_as("Image"), IMAGE_COLUMNS, schema)
    if image is None:
        raise ValueError(
            f"{path} has no column of images: it has {', '.join(schema.names)}; needed is one of "
            f"{', '.join(IMAGE_COLUMNS)}, or one that Hugging Face's metadata calls an Image"
        )
    kind = schema.field(image).type
    is_struct = pa.types.is_struct(kind)
    stored = kind.field("bytes").type if is_struct and kind.get_field_index("bytes") >= 0 else kind
    if not any(is_kind(stored) for is_kind in (pa.types.is_binary, pa.types.is_large_binary)):
        raise ValueError(
            f"column {image!r} of {path} holds {kind}; needed are image files as binary, or as its 'bytes'"
        )
    label = _chosen(path, "label", kept_as("ClassLabel"), LABEL_COLUMNS, schema)
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        problem = f"column {label!r} of {path} holds {schema.field(label).type}; needed are integers from 0"
        return Columns(image, is_struct, None), None, problem
    names = features.get(label or "", {}).get("names")
    if isinstance(names, dict):  # {"0": "cat"}, as older versions wrote it
        names = [names[key] for key in sorted(names, key=int)]
    return Columns(image, is_struct, label), names, ""


def _chosen(path: str, what: str, noted: list[str], usual: tuple[str, ...], schema: Any) -> str | None:
    """The metadata's only column of a kind, or else the one with the usual name."""
    if len(noted) == 1:
        return noted[0]
    for name in usual:
        if name in (noted or schema.names):
            return name
    if noted:
        raise ValueError(f"{path} has several columns of {what}s: {', '.join(noted)}; call the one to use {usual[0]!r}")
    return None


def _labels(file: File, column: str | None) -> np.ndarray:
    """The labels of a file, int32; -1 where there is none."""
    with files.open_file(file.path, ahead=False) as opened:
        labels = pq.read_table(opened, columns=[column]).column(0)
    return np.clip(labels.fill_null(-1).to_numpy(), *_INT32).astype(np.int32)
