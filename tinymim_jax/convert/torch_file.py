"""Reads weights files (torch.save in its zip format, safetensors) without torch.

Tensors are read-only numpy arrays that look straight into the mapped file, so reading takes no memory.
Nothing in a file is executed (see inert_pickle); sizes, strides, offsets and checksums are verified.
"""

import dataclasses
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tinymim_jax.convert import inert_pickle, safetensors_file
from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.inert_pickle import Opaque
from tinymim_jax.convert.mapped import DTYPES, counts, map_file, view

_SAVE_AGAIN = "load it with PyTorch and save it again: torch.save(torch.load('OLD'), 'NEW')"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_PICKLE = 1 << 26
# Storages are stored as they are; a file that was packed again may be compressed, but weights hardly shrink.
_MAX_UNPACKED = 1 << 26
_MAX_RATIO = 20

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


def read(path: str | pathlib.Path) -> Any:
    """What a weights file holds, as plain data.

    Tensors and parameters are read-only numpy arrays; dicts (ordered or not), lists, tuples, sets and
    plain values are themselves; everything else is an `Opaque` record.

    Args:
      path: a file of torch.save (PyTorch 1.6 or later), or a safetensors file.

    Raises:
      ConvertError: it is neither, or it is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConvertError(f"cannot read {path}: " + ("it is a folder" if path.is_dir() else "no such file"))
    try:
        if not path.stat().st_size:
            raise ConvertError("the file is empty")
        data = map_file(path)
        head = bytes(data[:16])
        if head.startswith(b"PK"):
            return _Archive(path, data).load()
        if path.suffix == ".safetensors" or safetensors_file.recognise(data):
            return safetensors_file.read(data)
        raise ConvertError(_what_else(head))
    except (ConvertError, OSError) as error:
        raise ConvertError(f"cannot read {path}: {error}") from error


def _what_else(head: bytes) -> str:
    if head.startswith(_LEGACY_MAGIC):
        return f"this is the format of PyTorch before 1.6; {_SAVE_AGAIN}"
    if head.startswith(b"version https://"):
        return "this is a Git LFS pointer, not the file it stands for; fetch that with `git lfs pull`"
    return f"neither a torch.save nor a safetensors file: it begins with {head!r}. Is the download complete?"


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """What a persistent id stands for: the bytes that tensors look into."""

    dtype: np.dtype
    data: memoryview


class _Archive:
    """The zip file of torch.save: one pickle, and one member for each storage that it names."""

    def __init__(self, path: pathlib.Path, data: memoryview):
        self.data = data
        self.members = _members(path)
        pickles = [name for name in self.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ConvertError("this zip file does not come from torch.save: it holds no single data.pkl")
        self.root = pickles[0].removesuffix("/data.pkl")
        self.contents: dict[str, memoryview] = {}
        self.unpacked = 0
        # torch.serialization.set_crc32_options(False) writes zeros.
        self.checksums = self.members[pickles[0]].CRC != 0

    def load(self) -> Any:
        code = (f"{self.root}/code/", f"{self.root}/constants.pkl")
        if any(name.startswith(code) for name in self.members):
            raise ConvertError(
                "this is a TorchScript program; save its weights alone: "
                "torch.save(torch.jit.load('OLD').state_dict(), 'NEW')"
            )
        order = f"{self.root}/byteorder"
        if order in self.members and bytes(self.content(order)) != b"little":
            raise ConvertError(f"it was written on a big-endian machine; on a little-endian one, {_SAVE_AGAIN}")
        name = f"{self.root}/data.pkl"
        if self.members[name].file_size > _MAX_PICKLE:
            raise ConvertError(f"its data.pkl has {self.members[name].file_size} bytes; no checkpoint needs as many")
        return inert_pickle.load(bytes(self.content(name)), rebuild=_REBUILD, persistent=self.storage)

    def storage(self, identity: Any) -> _Storage | Opaque:
        """The storage of a persistent id ("storage", class, key, device, number of elements)."""
        match identity:
            case ("storage", Opaque(name=name, args=None), str(key), _, count):
                pass
            case _:
                raise ConvertError("the pickle inside names a storage in a way that torch.save does not")
        dtype = DTYPES.get(_STORAGES.get(name.rpartition(".")[2], ""))
        if dtype is None:  # quantised tensors and the like
            return Opaque(name, tuple(identity))
        data = self.content(f"{self.root}/data/{key}")
        if counts("size", (count,))[0] * dtype.itemsize != len(data):
            raise ConvertError(f"storage {printable(key)} has {len(data)} bytes and should have {count} elements")
        return _Storage(dtype, data)

    def content(self, name: str) -> memoryview:
        """The bytes of a member; checked once."""
        if name not in self.contents:
            if name not in self.members:
                raise ConvertError(f"{printable(name)} is missing in it")
            info = self.members[name]
            content = self._unpack(info)
            if len(content) != info.file_size or (self.checksums and zlib.crc32(content) != info.CRC):
                raise ConvertError(f"{printable(name)} in it is damaged (wrong checksum); copy or download it again")
            self.contents[name] = content
        return self.contents[name]

    def _unpack(self, info: zipfile.ZipInfo) -> memoryview:
        packed = self._packed(info)
        self.unpacked += info.file_size
        if self.unpacked > max(_MAX_UNPACKED, _MAX_RATIO * len(self.data)):
            raise ConvertError(f"it would unpack to more than {_MAX_RATIO} times its size")
        if info.flag_bits & _ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ConvertError(f"{printable(info.filename)} in it is encrypted or packed; {_SAVE_AGAIN}")
        if info.compress_type == zipfile.ZIP_STORED:
            return packed
        try:
            unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, info.file_size + 1)
        except zlib.error as error:
            raise ConvertError(f"{printable(info.filename)} in it is damaged: {error}") from error
        return memoryview(unpacked)

    def _packed(self, info: zipfile.ZipInfo) -> memoryview:
        """The member as it lies in the file. Only its own header there says where it begins."""
        start = info.header_offset
        if not 0 <= start <= len(self.data) - _LOCAL_HEADER.size:
            raise ConvertError("its table of contents points outside the file")
        signature, name, extra = _LOCAL_HEADER.unpack(self.data[start : start + _LOCAL_HEADER.size])
        start += _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + info.compress_size > len(self.data):
            raise ConvertError("its table of contents points nowhere")
        return self.data[start : start + info.compress_size]


def _members(path: pathlib.Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # zipfile does not keep to its own class of errors when the table of contents is damaged.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise ConvertError(f"it is cut off or damaged ({printable(error)}); copy or download it again") from error
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise ConvertError("it holds two members of the same name")
    return members


def _tensor(args: tuple) -> Any:
    """(storage, offset, shape, strides, requires_grad, hooks, metadata)"""
    match args:
        # Metadata are bits such as "conjugate", by which the numbers are not what they seem.
        case (_Storage(dtype=dtype, data=data), offset, shape, strides, *rest) if not any(rest[2:]):
            return view(data, dtype, offset, shape, strides)
    return Opaque("torch._utils._rebuild_tensor_v2", args)


def _typed_tensor(args: tuple) -> Any:
    """(untyped storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)"""
    match args:
        case (_Storage(data=data), offset, shape, strides, _, _, Opaque(name=name), *metadata):
            dtype = DTYPES.get(name.removeprefix("torch."))
            if dtype is not None and not any(metadata):
                return view(data, dtype, offset, shape, strides)
    return Opaque("torch._utils._rebuild_tensor_v3", args)


def _first(args: tuple) -> Any:
    """A parameter is its tensor."""
    if not args:
        raise ConvertError("the pickle inside has a parameter without a tensor")
    return args[0]


def _with_attributes(args: tuple) -> Any:
    """A tensor that carries attributes: (function, class, arguments, attributes)."""
    match args:
        case (Opaque(name=name, args=None), _, tuple(arguments), *_) if name in _TENSORS:
            return _TENSORS[name](arguments)
    return Opaque("torch._tensor._rebuild_from_type_v2", args)


_TENSORS: dict[str, Callable[[tuple], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}
_REBUILD = _TENSORS | {"torch._tensor._rebuild_from_type_v2": _with_attributes}
