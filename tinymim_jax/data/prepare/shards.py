"""Writes one shard of a prepared data set: checks and converts its images, and writes a sidecar with statistics."""

import collections
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import UnidentifiedImageError
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from tinymim_jax.data.prepare.masks import MASK, convert_mask, mask_channels, mask_features
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views.decoding import Picture, open_image
from tinymim_jax.data.views.transforms import resize_exact, short_side_size
from tinymim_jax.runtime.files import sync_to_disk, write_text

# One record per group, so that random access reads no other records. Image files are already compressed.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# Errors of the machine rather than of the image: they end the run, since rejecting records would lose good ones.
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_ORIENTATION = 0x0112  # the EXIF tag
_FORMATS = {b"\xff\xd8": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff"}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How images are converted; by default their bytes are kept unchanged.

    short_side: images whose short side is larger are resized to it (antialiased bicubic) and written as JPEG.
        Smaller ones keep their bytes if they are PNG, or JPEG that TurboJPEG decodes without a warning; others
        (CMYK, WebP, slightly damaged files) are re-encoded as JPEG at their own size.
    quality: JPEG quality of images that are written, 1 to 100. Chroma is subsampled 4:2:0, as in ImageNet's files.
    upright: rotate images according to their EXIF orientation and write them as JPEG.
    """

    short_side: int | None = None
    quality: int = 90
    upright: bool = False

    def __post_init__(self):
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side={self.short_side}: needs a positive number of pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: JPEG quality must be 1 to 100")


class Converted(NamedTuple):
    """A converted image file, how it was made, its (height, width) before, and the decoder's warning, if any."""

    data: bytes
    action: Literal["kept", "resized", "reencoded"]
    size: tuple[int, int]
    warning: str


class Shard(NamedTuple):
    """Records `first` to `last - 1` of `split`, and the shard and sidecar files they are written to."""

    split: str
    first: int
    last: int
    path: Path
    sidecar: Path


class Stopped(Exception):
    """Raised in a worker that was asked to stop before its shard was complete."""


def set_features(
    class_names: tuple[str, ...], encoding: Literal["jpeg", "png"] = "jpeg", channels: int = 0
) -> tfds.features.FeaturesDict:
    """The TFDS features of a prepared data set, without `label` if there are no classes; `channels` are those of masks.

    `encoding` only matters to programs that add images; stored images are read in whatever format they have.
    """
    label = {"label": tfds.features.ClassLabel(names=list(class_names))} if class_names else {}
    image = tfds.features.Image(shape=(None, None, 3), encoding_format=encoding)
    features = {"image": image, "file_name": tfds.features.Text(), **label, **mask_features(channels)}
    return tfds.features.FeaturesDict(features)


def convert(data: bytes, conversion: Conversion) -> Converted:
    """Decodes an image file completely, as a check, and converts it as `conversion` says.

    Raises the decoder's error if the file is damaged or truncated.
    """
    if not data:
        raise ValueError("the file is empty")
    turned = conversion.upright and _orientation(data) != 1
    picture = Picture(data, upright=conversion.upright)
    fast, warning, pixels = picture.reducible, "", None
    if fast and not turned:
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            fast, warning = False, str(error)
    if pixels is None:
        pixels = picture.pixels()
    size, short = pixels.shape[:2], conversion.short_side
    if short is not None and min(size) > short:
        smaller = resize_exact(pixels, short_side_size(size, short))
        return Converted(_jpeg(smaller, conversion.quality), "resized", size, warning)
    if turned or (short is not None and not fast and image_format(data) != "png"):
        return Converted(_jpeg(pixels, conversion.quality), "reencoded", size, warning)
    return Converted(data, "kept", size, warning)


def image_format(data: bytes) -> str:
    """The format by the first bytes of the file, such as "jpeg"; "other" if they are not known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _FORMATS.items() if data.startswith(start)), "other")


def write_shard(source: Source, shard: Shard, conversion: Conversion, on_image: Callable[[int], None]) -> None:
    """Writes one shard and, when it is complete and synced to disk, its sidecar: JSON statistics of its images.

    Both files depend on the records only. A record that cannot be read or decoded is left out and listed in the
    sidecar. `on_image` is called after each record with the number of bytes read; if it raises, the unfinished
    shard is deleted and the exception is passed on.

    Raises OSError if the shard cannot be written.
    """
    temporary = shard.path.with_name(f"{shard.path.name}.{os.getpid()}.tmp")
    features = set_features(source.class_names, channels=mask_channels(source))
    layout: Any = features.get_serialized_info()
    serializer = ExampleSerializer(layout)
    account = _Account(shard)
    try:
        with _writing(shard.path):
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        try:
            for index in range(shard.first, shard.last):
                example, read = _example(source, index, conversion, account, features)
                if example is not None:
                    record = serializer.get_tf_example(features.encode_example(example))
                    with _writing(shard.path):
                        # Without this, the order of a protobuf map's entries differs between processes.
                        writer.write(record.SerializeToString(deterministic=True))
                on_image(read)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # report the first error, not that of closing
                writer.close()
            raise
        with _writing(shard.path):
            writer.close()
            _check_records(temporary, account.records)
            sync_to_disk(temporary)
            account.file_bytes = temporary.stat().st_size
            os.replace(temporary, shard.path)
            sync_to_disk(shard.path.parent)
            write_json(shard.sidecar, account.as_dict())
    finally:
        temporary.unlink(missing_ok=True)


def finished(shard: Shard) -> bool:
    """Whether the shard exists with the file size and the number of records that its sidecar states."""
    try:
        account = json.loads(shard.sidecar.read_text())
        if shard.path.stat().st_size != account["file_bytes"]:
            return False
        _check_records(shard.path, account["records"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step; content and name are on the disk afterwards."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    sync_to_disk(path.parent)


def raise_if_of_the_machine(error: Exception) -> None:
    """Raises `error` again if the machine caused it, not the record: no memory, no free file handles, a stale mount."""
    for each in (error, error.__cause__):
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno in _MACHINE_ERRORS):
            raise error


class _Account:
    """The statistics of a shard that its sidecar holds."""

    def __init__(self, shard: Shard):
        self._shard = shard
        self.file_bytes = 0
        self.records = 0
        self._bytes = {"bytes_before": 0, "bytes_after": 0}
        self._counts = {key: collections.Counter() for key in ("classes", "formats", "actions", "widths", "heights")}
        self._counts["short_sides"] = collections.Counter()
        self._listed: dict[str, list[dict[str, Any]]] = {"rejected": [], "warnings": []}

    def add(self, label: int, before: bytes, converted: Converted) -> None:
        height, width = converted.size
        self.records += 1
        self._bytes["bytes_before"] += len(before)
        self._bytes["bytes_after"] += len(converted.data)
        values = (label, image_format(converted.data), converted.action, width, height, min(height, width))
        for counter, value in zip(self._counts.values(), values):
            counter[value] += 1

    def list(self, kind: Literal["rejected", "warnings"], index: int, description: str, reason: str) -> None:
        self._listed[kind].append({"index": index, "description": description, "reason": reason})

    def as_dict(self) -> dict[str, Any]:
        counts = {key: {str(value): counter[value] for value in counter} for key, counter in self._counts.items()}
        where = {"split": self._shard.split, "first": self._shard.first, "last": self._shard.last}
        sizes = {"records": self.records, "file_bytes": self.file_bytes}
        return where | sizes | self._bytes | counts | self._listed


def _example(
    source: Source, index: int, conversion: Conversion, account: _Account, features: Any
) -> tuple[dict[str, Any] | None, int]:
    """The TFDS example of a record, or None if it is rejected; and the number of bytes read."""
    data, description = b"", _printable(source.describe(index))
    try:
        record = source[index]
        data, label = record["image"], int(record["label"])
        if not -1 <= label < max(source.classes, 1):
            raise ValueError(f"label {label} is not one of the {source.classes} classes")
        converted = convert(data, conversion)
        masks = {}
        if MASK in features:
            after = Picture(converted.data).size if converted.action == "resized" else converted.size
            masks[MASK] = io.BytesIO(convert_mask(record.get("mask"), converted.size, after))
    except Exception as error:
        raise_if_of_the_machine(error)
        account.list("rejected", index, description, _reason(error, data))
        return None, len(data)
    if converted.warning:
        account.list("warnings", index, description, _printable(converted.warning))
    account.add(label, data, converted)
    example = {"image": io.BytesIO(converted.data), "file_name": description}
    return example | masks | ({"label": label} if source.classes else {}), len(data)


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error.__cause__, UnidentifiedImageError):
        return f"not an image (it begins with {data[:8]!r})"
    # Memory addresses differ from run to run; the sidecar must not.
    return _printable(re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are not UTF-8


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")


def _orientation(data: bytes) -> int:
    with open_image(data) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _check_records(path: Path, records: int) -> None:
    reader = ArrayRecordReader(str(path))
    try:
        found = reader.num_records()
    finally:
        reader.close()
    if found != records:
        raise OSError(f"{path} holds {found} records, not {records}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        raise OSError(
            f"cannot write {path}: {error}; fix the cause (is the disk full?) and run the same command again"
        ) from error
