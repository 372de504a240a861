"""Writes files as torch.save does, instruction by instruction, with the standard library alone."""

import dataclasses
import io
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

CLASSES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass
class Global:
    """A class or function, by name."""

    module: str
    name: str


@dataclasses.dataclass
class Call:
    """What a class or function returns; `state` is what BUILD would make its attributes."""

    function: Any
    args: tuple
    state: Any = None


@dataclasses.dataclass
class Persistent:
    """A persistent id."""

    value: Any


@dataclasses.dataclass
class Raw:
    """Pickle instructions, written unchanged."""

    code: bytes


def instructions(value: Any) -> bytes:
    """Protocol 2 instructions that push `value`."""
    match value:
        case Raw():
            return value.code
        case Global():
            return b"c" + f"{value.module}\n{value.name}\n".encode()
        case Call():
            code = instructions(value.function) + instructions(value.args) + b"R"
            return code if value.state is None else code + instructions(value.state) + b"b"
        case Persistent():
            return instructions(value.value) + b"Q"
        case dict():
            return b"}(" + b"".join(instructions(k) + instructions(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(instructions, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(instructions, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + instructions(value) + b"."


def storage(key: str, dtype: str, count: int) -> Persistent:
    module = "torch" if dtype in CLASSES else "torch.storage"
    return Persistent(("storage", Global(module, CLASSES.get(dtype, "UntypedStorage")), key, "cpu", count))


def tensor(source: Persistent, offset: int, shape: tuple, strides: tuple) -> Call:
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (source, offset, shape, strides, False, hooks))


def strides_of(array: np.ndarray) -> tuple:
    return tuple(stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides)


def save(path, value: Any = None, storages: dict | None = None, *, code: bytes | None = None, **members) -> None:
    """Writes a file.

    Args:
      path: where.
      value: described with the classes above; or `code`, the whole pickle.
      storages: bytes (or arrays) by key.
      members: others, by name, in place of the usual `byteorder`; `compression` is zipfile's.
    """
    compression = members.pop("compression", zipfile.ZIP_STORED)
    content = {
        "data.pkl": pickled(value) if code is None else code,
        "byteorder": b"little",
        "version": b"3\n",
    } | members
    content |= {
        f"data/{key}": data if isinstance(data, bytes) else data.tobytes() for key, data in (storages or {}).items()
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            if data is not None:
                archive.writestr(f"archive/{name}", data)


def save_arrays(path, arrays: dict[str, np.ndarray], wrap=lambda tensors: {"model": tensors}) -> None:
    """Writes arrays as the state dict of an ordinary checkpoint."""
    tensors, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        tensors[name] = tensor(storage(str(i), array.dtype.name, array.size), 0, array.shape, strides_of(array))
        storages[str(i)] = array
    save(path, wrap(tensors), storages)


def without_checksums(data: bytes) -> bytes:
    """A zip file as torch.serialization.set_crc32_options(False) writes it: every CRC is 0."""
    data = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        infos, position = archive.infolist(), archive.start_dir
    for info in infos:
        data[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
        data[position + 16 : position + 20] = bytes(4)
        position += 46 + sum(struct.unpack_from("<HHH", data, position + 28))
    return bytes(data)


def same(got: dict, want: dict) -> bool:
    """Whether two dicts hold the same arrays, bit for bit."""
    return got.keys() == want.keys() and all(
        isinstance(x, np.ndarray) and (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in ((got[name], want[name]) for name in want)
    )
