"""Tensors as read-only views of a mapped file."""

import math
import mmap
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tinymim_jax.convert.errors import ConvertError

# By torch's names. Files are little-endian.
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

# With strides of 0 a tensor can be larger than its storage: up to 64 MiB is accepted.
_MAX_EXPANDED = 1 << 26
_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 62


def map_file(path: pathlib.Path) -> memoryview:
    """The bytes of a file (not an empty one), read from the disk when they are accessed."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def view(storage: memoryview, dtype: np.dtype, offset: Any, shape: Any, strides: Any | None = None) -> np.ndarray:
    """A tensor inside `storage`, without copying.

    Args:
      storage: its bytes.
      dtype: of the tensor.
      offset: position of the first element, in elements.
      shape, strides: in elements; without strides the tensor is contiguous.

    Raises:
      ConvertError: a number is not a count, or the tensor reaches beyond its storage.
    """
    shape = counts("shape", shape)
    strides = _contiguous(shape) if strides is None else counts("strides", strides)
    (offset,) = counts("offset", (offset,))
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ConvertError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    size = math.prod(max(n, 1) for n in shape) * dtype.itemsize
    if size > max(len(storage), _MAX_EXPANDED):
        raise ConvertError(f"a tensor of shape {shape} claims far more than the {len(storage)} bytes stored of it")
    if 0 in shape:
        return np.zeros(shape, dtype)
    end = (offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1) * dtype.itemsize
    if end > len(storage):
        raise ConvertError(f"a tensor of shape {shape} ends at byte {end} of a storage of {len(storage)}")
    in_bytes = tuple(stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(shape, strides))
    return np.ndarray(shape, dtype, storage, offset * dtype.itemsize, in_bytes)


def counts(what: str, values: Any) -> tuple[int, ...]:
    """`values` as a tuple, if they are sizes or positions; `what` names them in the error if they are not."""
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMENSIONS:
        raise ConvertError(f"the {what} of a tensor is not a short list of numbers")
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_COUNT:
            raise ConvertError(f"the {what} of a tensor contains a value that is no valid size or offset")
    return tuple(values)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
