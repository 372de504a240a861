"""Readers of weights files: torch.save (both of its formats) and safetensors. Neither torch nor jax is needed."""

import pathlib
from typing import Any, NamedTuple

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.readers import legacy_file, safetensors_file, torch_file


class Contents(NamedTuple):
    """What a weights file holds.

    data: plain data. Tensors and parameters are read-only numpy arrays; dicts (ordered or not), lists, tuples, sets
        and plain values are themselves; everything else is an `Opaque` record.
    metadata: texts by name from the header of a safetensors file; empty for other files.
    """

    data: Any
    metadata: dict[str, str]


def read(path: str | pathlib.Path) -> Any:
    """`read_contents(path).data`."""
    return read_contents(path).data


def read_contents(path: str | pathlib.Path) -> Contents:
    """Reads a file of torch.save or a safetensors file; the content decides, not the suffix.

    Nothing in a file is executed (see inert_pickle); sizes, strides, offsets and checksums are verified.

    Raises:
      ConvertError: it is neither, or it is damaged; the message names the file and says what to do.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ConvertError(f"cannot read {path}: " + ("it is a folder" if path.is_dir() else "no such file"))
    try:
        if not path.stat().st_size:
            raise ConvertError("the file is empty")
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(b"PK"):
            return Contents(torch_file.read(path), {})
        if head.startswith(torch_file.LEGACY_MAGIC):
            return Contents(legacy_file.read(path), {})
        if path.suffix == ".safetensors" or safetensors_file.recognise(head):
            return Contents(*safetensors_file.read(path))
        raise ConvertError(_other_format(head))
    except (ConvertError, OSError) as error:
        raise ConvertError(f"cannot read {path}: {error}") from error


def _other_format(head: bytes) -> str:
    """What a file that begins like this is, and what to do about it."""
    if head.startswith(b"version https://"):
        return "this is a Git LFS pointer, not the file it stands for; fetch that with `git lfs pull`"
    if head.startswith(b"\x93NUMPY"):
        return "this is a single numpy array, not the weights of a model"
    if head.startswith(b"\x89HDF"):
        return "this is an HDF5 file (Keras), which has other names and layouts; no conversion from it exists here"
    return f"neither a torch.save nor a safetensors file: it begins with {head!r}. Is the download complete?"
