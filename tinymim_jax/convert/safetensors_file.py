"""Safetensors files: reading them as views of the file, writing them atomically."""

import json
import os
import pathlib
import struct
import tempfile
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.mapped import DTYPES, counts, view

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER = 100_000_000  # as in the reference implementation


def recognise(data: memoryview) -> bool:
    """Whether these bytes (a whole file) begin like a safetensors file."""
    return len(data) > 8 and data[8] == ord("{") and _header_size(data) <= min(len(data) - 8, _MAX_HEADER)


def read(data: memoryview) -> dict[str, np.ndarray]:
    """The tensors of a file, given its bytes, as read-only arrays that look into it.

    Raises:
      ConvertError: the header is damaged, or points outside the file.
    """
    if not recognise(data):
        raise ConvertError("this is not a safetensors file, or it is cut off; copy or download it again")
    end = 8 + _header_size(data)
    try:
        header = json.loads(bytes(data[8:end]))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"its header is damaged: {printable(error)}") from error
    header.pop("__metadata__", None)
    return {name: _tensor(name, entry, data[end:]) for name, entry in header.items()}


def to_safetensors(
    path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a state dict as a safetensors file: either the whole file appears at `path`, or nothing changes.

    Args:
      path: replaced if it exists.
      state_dict: arrays by name.
      metadata: texts for the file's header. `format` is "pt" unless given, which PyTorch programs look for.

    Raises:
      OSError: the folder is missing or full, or may not be written to.
    """
    path = pathlib.Path(path)
    # The library writes memory as it lies: a transposed view would be written wrong.
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(arrays, temporary, {"format": "pt"} | dict(metadata or {}))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _header_size(data: memoryview) -> int:
    return struct.unpack("<Q", data[:8])[0]


def _tensor(name: str, entry: object, data: memoryview) -> np.ndarray:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(), int()] as offsets}:
            begin, end = counts("position", offsets)
        case _:
            raise ConvertError(f"the header entry of {printable(name)} is damaged")
    if kind not in _DTYPES:
        raise ConvertError(f"{printable(name)} has dtype {printable(kind)}; known are {', '.join(_DTYPES)}")
    if not begin <= end <= len(data):
        raise ConvertError(f"{printable(name)} reaches beyond the end of the file; copy or download it again")
    tensor = view(data[begin:end], DTYPES[_DTYPES[kind]], 0, shape)
    if tensor.nbytes != end - begin:
        raise ConvertError(f"{printable(name)} has {end - begin} bytes and should have {tensor.nbytes}")
    return tensor
