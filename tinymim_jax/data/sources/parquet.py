"""`parquet:LOCATION`: Parquet files in the layout of Hugging Face image data sets, read by row group."""

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
from tinymim_jax.data.sources.examples import Example, MaskClass, Source
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.index import Index, Records, cached

log = logging.getLogger(__name__)

FORMAT = shards.Format("parquet", re.compile(r"\.(parquet|parq|pq)$"))
IMAGE_COLUMNS = ("image", "img", "jpg", "pixel_values")
# Of segmentation sets: a second column of images.
MASK_COLUMNS = (
    "mask",
    "segmentation_mask",
    "annotation",
    "annotations",
    "label",
    "labels",
    "segmentation",
    "seg",
    "gt",
)
LABEL_COLUMNS = ("label", "labels", "fine_label")
# Reading one row reads its row group. Recently read groups are cached per process, up to this many bytes.
CACHE_BYTES = 256 * 2**20
_LARGE_GROUP = 32 * 2**20
_INT32 = -(2**31), 2**31 - 1


def open_split(name: str, location: str, split: str) -> Source:
    """Opens a whole split of the files at `location`; see `sources.open_source` for the file layout and errors."""
    found = shards.find(FORMAT, name, location, split)
    fingerprint = [*shards.fingerprint(FORMAT, found), "with masks"]  # indexes before these have no column of masks
    index = cached(f"{name}/{split}", fingerprint, lambda: _records(found))
    largest = int(index.sizes.max())
    if largest > _LARGE_GROUP:
        log.warning(
            "%s has row groups of up to %d MB, and reading one image reads a whole row group, which is slow with "
            "shuffling. `tinymim prepare %s --output DIR` rewrites the set for fast random access",
            name,
            largest // 2**20,
            name,
        )
    return ParquetSource(name, split, index)


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class _Files(NamedTuple):
    """Columns of encoded files of one row group."""

    images: Any
    masks: Any | None

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + (0 if self.masks is None else self.masks.nbytes)


class ParquetSource(Source):
    """The rows of Parquet files, in file order."""

    def __init__(self, name: str, split: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
        self.label_problem = index.meta["label_problem"]
        self._columns = Columns(**index.meta["columns"])
        self.mask_classes = tuple(MaskClass(name, None) for name in index.meta["mask_classes"])
        self._paths: list[str] = index.meta["paths"]
        self._index = index  # one entry per row group, see `_records`
        self._groups: OrderedDict[int, tuple[_Files, Any]] = OrderedDict()
        self._kept_bytes = 0
        self._loading: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.meta["rows"])

    def __getitem__(self, index: int) -> Example:
        group, row = self._place(index)
        stored, labels = self._group(group)
        image = stored.images[row].as_py()
        if image is None:
            raise ValueError(f"{self.describe(index)} holds no image, or only a path to an external file")
        label = labels[row].as_py() if labels is not None else None
        example: Example = {"image": image, "label": -1 if label is None else int(label)}
        return example if stored.masks is None else {**example, "mask": stored.masks[row].as_py() or b""}

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

    def _group(self, group: int) -> tuple[_Files, Any]:
        """The images and the labels of a row group (None if there are none), from the cache or the file."""
        with self._lock:
            loading = self._loading.setdefault(group, threading.Lock())
        with loading:  # concurrent requests for the same group read it once
            with self._lock:
                if group in self._groups:
                    self._groups.move_to_end(group)
                    return self._groups[group]
            read = self._read(group)
            with self._lock:
                self._groups[group] = read
                self._kept_bytes += read[0].nbytes
                while len(self._groups) > 1 and self._kept_bytes > CACHE_BYTES:
                    dropped, (stored, _) = self._groups.popitem(last=False)
                    self._kept_bytes -= stored.nbytes
                    self._loading.pop(dropped, None)
        return read

    def _read(self, group: int) -> tuple[_Files, Any]:
        number = int(self._index.labels[group])
        with files.open_file(self._paths[self._index.shards[group]]) as opened, pq.ParquetFile(opened) as file:
            table = file.read_row_group(number, columns=self._columns.leaves(), use_threads=False)
        images, masks = (
            _encoded(table.column(name).combine_chunks()) if name else None
            for name in (self._columns.image, self._columns.mask)
        )
        labels = table.column(self._columns.label).combine_chunks() if self._columns.label else None
        return _Files(images, masks), labels

    def __reduce__(self):
        return ParquetSource, (self.name, self.split, self._index)


class Columns(NamedTuple):
    """The names of the image column, and of the columns of labels and masks, if there are such."""

    image: str
    is_struct: bool
    label: str | None
    mask: str | None = None
    mask_is_struct: bool = False

    def leaves(self) -> list[str]:
        """The columns to read; of a struct {bytes, path}, only the bytes."""
        found = [f"{self.image}.bytes" if self.is_struct else self.image]
        if self.label is not None:
            found.append(self.label)
        if self.mask is not None:
            found.append(f"{self.mask}.bytes" if self.mask_is_struct else self.mask)
        return found


def _encoded(column: Any) -> Any:
    return column.flatten()[0] if pa.types.is_struct(column.type) else column  # null where the struct is


def _records(found: list[File]) -> Records:
    """The index: one entry per non-empty row group.

    `shards`: its file; `labels`: its number in the file; `offsets`: its first row in the set; `sizes`: its bytes.
    """
    described = files.in_threads(_describe, found)
    schema = described[0][1]
    columns, names, problem = _columns(found[0].path, schema)
    for file, (_, other) in zip(found, described):
        if _columns(file.path, other)[:2] != (columns, names):
            raise ValueError(
                f"{file.path} has other columns or classes than {found[0].path}; put each kind into its own folder"
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
            names = []  # unlabelled test splits on the Hugging Face hub name classes but label every image -1
        records.row_labels = array("i", labels.tobytes())
    records.meta = {
        "paths": [file.path for file in found],
        "rows": first,
        "columns": columns._asdict(),
        "class_names": names or [],
        "label_problem": problem,
        "mask_classes": shards.named_classes(found[0].path) if columns.mask and not columns.label else [],
    }
    return records


def _describe(file: File) -> tuple[Any, Any]:
    try:
        with files.open_file(file.path) as opened, pq.ParquetFile(opened) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.path} is truncated or not a Parquet file; download it again ({error})") from error


def _columns(path: str, schema: Any) -> tuple[Columns, list[str] | None, str]:
    """The columns to read, the class names if the file has them, and why its label column cannot be used."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = {
        name: feature
        for name, feature in ((noted.get("info") or {}).get("features") or {}).items()
        if isinstance(feature, dict) and name in schema.names
    }

    def of_type(kind: str) -> list[str]:
        return [name for name, feature in features.items() if feature.get("_type") == kind]

    image = _chosen(path, "image", of_type("Image"), IMAGE_COLUMNS, schema)
    if image is None:
        raise ValueError(
            f"{path} has no image column: it has {', '.join(schema.names)}; expected one of "
            f"{', '.join(IMAGE_COLUMNS)}, or one that has type Image in Hugging Face's metadata"
        )
    if not _holds_files(schema, image):
        raise ValueError(
            f"column {image!r} of {path} holds {schema.field(image).type}; expected encoded image files as "
            "binary, or as a struct with 'bytes'"
        )
    is_struct = pa.types.is_struct(schema.field(image).type)
    masks = [name for name in MASK_COLUMNS if name in schema.names and name != image and _holds_files(schema, name)]
    mask = (masks[0], pa.types.is_struct(schema.field(masks[0]).type)) if masks else (None, False)
    label = _chosen(path, "label", of_type("ClassLabel"), LABEL_COLUMNS, schema)
    if label in masks:
        return Columns(image, is_struct, None, *mask), None, ""
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        problem = f"column {label!r} of {path} holds {schema.field(label).type}; expected integers from 0"
        return Columns(image, is_struct, None, *mask), None, problem
    names = features.get(label or "", {}).get("names")
    if isinstance(names, dict):  # {"0": "cat"}, written by older versions of datasets
        names = [names[key] for key in sorted(names, key=int)]
    return Columns(image, is_struct, label, *mask), names, ""


def _holds_files(schema: Any, column: str) -> bool:
    """Whether a column holds bytes, or structs with a field of bytes."""
    kind = schema.field(column).type
    stored = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    return pa.types.is_binary(stored) or pa.types.is_large_binary(stored)


def _chosen(path: str, what: str, noted: list[str], usual: tuple[str, ...], schema: Any) -> str | None:
    """The only column that the metadata marks as this kind (`noted`), or else the one with a usual name."""
    if len(noted) == 1:
        return noted[0]
    for name in usual:
        if name in (noted or schema.names):
            return name
    if noted:
        raise ValueError(
            f"{path} has several {what} columns: {', '.join(noted)}; rename the one to use to {usual[0]!r}"
        )
    return None


def _labels(file: File, column: str | None) -> np.ndarray:
    """The labels of a file, int32 `[rows]`; -1 for missing labels."""
    with files.open_file(file.path, ahead=False) as opened:
        labels = pq.read_table(opened, columns=[column]).column(0)
    return np.clip(labels.fill_null(-1).to_numpy(), *_INT32).astype(np.int32)
