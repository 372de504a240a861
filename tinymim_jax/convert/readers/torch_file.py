"""Reads files of torch.save (the zip format of PyTorch 1.6 and later) without torch.

Tensors are read-only numpy views of the mapped file, so reading takes no memory. Nothing in a file is executed (see
inert_pickle); sizes, strides, offsets and checksums are verified.
"""

import dataclasses
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.readers import inert_pickle
from tinymim_jax.convert.readers.mapped import DTYPES, counts, map_file, view
from tinymim_jax.convert.readers.pickle_values import Opaque

# PyTorch 2.6 and later load plain tensors only unless told otherwise, and training checkpoints hold more than that.
SAVE_AGAIN = (
    "load it with PyTorch and save it again: torch.save(torch.load('OLD', map_location='cpu', weights_only=False), "
    "'NEW'). That runs code which the file contains, so do it only with a file that you trust"
)
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s22xHH")
MAX_PICKLE = 1 << 26
# torch.save does not compress. A file that was packed again may be compressed, but weights shrink little.
_MAX_UNPACKED = 1 << 26
_MAX_RATIO = 20
# Tensors may share a storage (a flat parameter and its views; strides of 0), so that their sizes add up to more than
# what is stored: at most this many times the stored bytes, or 64 MiB, in the whole file.
_MAX_SHARING = 8
_MAX_SHARED = 1 << 26

STORAGES = {
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


def read(path: pathlib.Path) -> Any:
    """What a file of torch.save holds, as plain data (see `readers.Contents`).

    Raises:
      ConvertError: the file is damaged, or of another kind.
    """
    return _Archive(path, map_file(path)).load()


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """The bytes that tensors look into; a persistent id of the pickle names them.

    count_bytes: called with the size of each tensor that is made of it.
    """

    dtype: np.dtype
    data: memoryview
    count_bytes: Callable[[int], None]

    def tensor(self, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        array = view(self.data, dtype, offset, shape, strides)
        self.count_bytes(array.nbytes)
        return array


class _Archive:
    """The zip file of torch.save: one pickle, and one member for each storage that it names."""

    def __init__(self, path: pathlib.Path, data: memoryview):
        self.data = data
        self.members = _members(path)
        pickles = [name for name in self.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ConvertError(_other_archive(self.members))
        self.root = pickles[0].removesuffix("/data.pkl")
        self.contents: dict[str, memoryview] = {}
        self.unpacked = 0
        self.viewed = 0
        # After torch.serialization.set_crc32_options(False), all checksums are 0.
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
            raise ConvertError(f"it was written on a big-endian machine; on a little-endian one, {SAVE_AGAIN}")
        name = f"{self.root}/data.pkl"
        if self.members[name].file_size > MAX_PICKLE:
            raise ConvertError(f"its data.pkl has {self.members[name].file_size} bytes; no checkpoint needs as many")
        return inert_pickle.load(bytes(self.content(name)), rebuild=REBUILD, persistent=self.storage)

    def storage(self, identity: Any) -> Storage | Opaque:
        """The storage of a persistent id ("storage", class, key, device, number of elements)."""
        match identity:
            case ("storage", Opaque(name=name, args=None), str(key), _, count):
                pass
            case _:
                raise ConvertError("the pickle inside names a storage in a way that torch.save does not")
        dtype = DTYPES.get(STORAGES.get(name.rpartition(".")[2], ""))
        if dtype is None:  # quantised tensors and the like
            return Opaque(name, tuple(identity))
        data = self.content(f"{self.root}/data/{key}")
        if counts("size", (count,))[0] * dtype.itemsize != len(data):
            raise ConvertError(f"storage {printable(key)} has {len(data)} bytes and should have {count} elements")
        return Storage(dtype, data, self.count_bytes)

    def count_bytes(self, size: int) -> None:
        """Limits the total size of all tensors: whoever copies them must not need far more memory than the file has."""
        self.viewed += size
        stored = min(sum(info.file_size for info in self.members.values()), _MAX_RATIO * len(self.data))
        limit = max(_MAX_SHARED, _MAX_SHARING * stored)
        if self.viewed > limit:
            raise ConvertError(f"its tensors claim more than {limit} bytes, and {stored} are stored of them")

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
            raise ConvertError(f"{printable(info.filename)} in it is encrypted or packed; {SAVE_AGAIN}")
        if info.compress_type == zipfile.ZIP_STORED:
            return packed
        try:
            unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, info.file_size + 1)
        except zlib.error as error:
            raise ConvertError(f"{printable(info.filename)} in it is damaged: {error}") from error
        return memoryview(unpacked)

    def _packed(self, info: zipfile.ZipInfo) -> memoryview:
        """The stored bytes of a member. Where they begin is written only in the member's own header."""
        start = info.header_offset
        if not 0 <= start <= len(self.data) - _LOCAL_HEADER.size:
            raise ConvertError("its table of contents points outside the file")
        signature, name, extra = _LOCAL_HEADER.unpack(self.data[start : start + _LOCAL_HEADER.size])
        start += _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + info.compress_size > len(self.data):
            raise ConvertError("its table of contents points nowhere")
        return self.data[start : start + info.compress_size]


def _other_archive(members: Mapping[str, zipfile.ZipInfo]) -> str:
    """What a zip file that does not come from torch.save is, and what to do about it."""
    if any(name.endswith(".npy") for name in members):
        return (
            "this is an .npz of numpy arrays, as google-research/vision_transformer and big_vision publish their "
            "models. timm reads those: m = timm.create_model('vit_tiny_patch16_224', num_classes=10) with the name and "
            "the number of classes of your model, m.load_pretrained('FILE.npz'), "
            "torch.save(m.state_dict(), 'NEW.pth'); then convert NEW.pth with --from vit"
        )
    return "this zip file does not come from torch.save: it holds no single data.pkl"


def _members(path: pathlib.Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # zipfile raises other errors than its own when the table of contents is damaged.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise ConvertError(f"it is cut off or damaged ({printable(error)}); copy or download it again") from error
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise ConvertError("it holds two members of the same name")
    return members


def _tensor(args: tuple) -> Any:
    """(storage, offset, shape, strides, requires_grad, hooks, metadata)"""
    match args:
        # Metadata are flags such as "conjugate", with which the stored numbers are not the values of the tensor.
        case (Storage() as storage, offset, shape, strides, *rest) if not any(rest[2:]):
            return storage.tensor(storage.dtype, offset, shape, strides)
    return Opaque("torch._utils._rebuild_tensor_v2", args)


def _typed_tensor(args: tuple) -> Any:
    """(untyped storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)"""
    match args:
        case (Storage() as storage, offset, shape, strides, _, _, Opaque(name=name), *metadata):
            dtype = DTYPES.get(name.removeprefix("torch."))
            if dtype is not None and not any(metadata):
                return storage.tensor(dtype, offset, shape, strides)
    return Opaque("torch._utils._rebuild_tensor_v3", args)


def _first(args: tuple) -> Any:
    """A parameter: its first argument is the tensor."""
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
REBUILD = _TENSORS | {"torch._tensor._rebuild_from_type_v2": _with_attributes}
