"""Reads files of torch.save before PyTorch 1.6: several pickles, then the bytes of all storages, one after another.

As in the later format, tensors are read-only views of the mapped file, and nothing in it is executed.
"""

import io
import pathlib
import pickletools
import struct
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.readers import inert_pickle
from tinymim_jax.convert.readers.mapped import DTYPES, counts, map_file
from tinymim_jax.convert.readers.pickle_values import Opaque
from tinymim_jax.convert.readers.torch_file import MAX_PICKLE, REBUILD, STORAGES, Storage

_COUNT = struct.Struct("<q")
_PICKLES = 5  # the magic number, the version, the machine, the object, the names of the storages


def read(path: pathlib.Path) -> Any:
    """What the file holds, as plain data (see `readers.Contents`).

    Raises:
      ConvertError: the file is damaged.
    """
    return _File(map_file(path)).load()


class _File:
    def __init__(self, data: memoryview):
        self.data = data
        self.described: dict[str, tuple[np.dtype, int]] = {}  # by the name of a storage: dtype, number of elements
        self.contents: dict[str, memoryview] = {}
        self.viewed = 0

    def load(self) -> Any:
        *_, whole, keys, end = self._pickles()
        # Where a storage lies follows from the sizes of those before it, which the first reading collects.
        inert_pickle.load(whole, rebuild={}, persistent=self._describe)
        names = inert_pickle.load(keys, rebuild={}, persistent=_no_storage)
        if not isinstance(names, list) or set(names) != set(self.described):
            raise ConvertError("its list of storages is not that of its tensors; copy or download it again")
        for name in names:
            end = self._place(name, end)
        return inert_pickle.load(whole, rebuild=REBUILD, persistent=self._storage)

    def _pickles(self) -> tuple[Any, ...]:
        """The bytes of each pickle, and where the storages begin."""
        stream = io.BytesIO(self.data[: 2 * MAX_PICKLE])
        parts: list[Any] = []
        try:
            for _ in range(_PICKLES):
                start = stream.tell()
                for _ in pickletools.genops(stream):
                    pass
                parts.append(bytes(self.data[start : stream.tell()]))
                if len(parts[-1]) > MAX_PICKLE:
                    raise ConvertError(f"a pickle in it has {len(parts[-1])} bytes; no checkpoint needs as many")
        except ConvertError:
            raise
        except Exception as error:  # pickletools raises ValueError and others
            raise ConvertError(f"it is cut off or damaged ({printable(error)}); copy or download it again") from error
        return (*parts, stream.tell())

    def _describe(self, identity: Any) -> None:
        match identity:
            case ("storage", Opaque(name=name, args=None), str(key), _, int(count), None):
                pass
            case _:
                raise ConvertError("it names a storage in a way that cannot be read; save it with a newer PyTorch")
        dtype = DTYPES.get(STORAGES.get(name.rpartition(".")[2], ""))
        if dtype is None:
            raise ConvertError(f"it holds a {printable(name)}, which is not supported")
        self.described[key] = dtype, counts("size", (count,))[0]

    def _place(self, name: str, start: int) -> int:
        """Notes where a storage lies and returns where the next one begins."""
        dtype, count = self.described[name]
        stop = start + _COUNT.size + count * dtype.itemsize
        if stop > len(self.data) or _COUNT.unpack(self.data[start : start + _COUNT.size])[0] != count:
            raise ConvertError("it is cut off or damaged; copy or download it again")
        self.contents[name] = self.data[start + _COUNT.size : stop]
        return stop

    def _storage(self, identity: Any) -> Storage:
        key = identity[2]
        return Storage(self.described[key][0], self.contents[key], self._count_bytes)

    def _count_bytes(self, size: int) -> None:
        self.viewed += size
        if self.viewed > max(1 << 26, 8 * len(self.data)):
            raise ConvertError("its tensors claim far more bytes than are stored")


def _no_storage(_: Any) -> Any:
    raise ConvertError("its list of storages is damaged")
