"""Weights files as a whole: converting one, and saying which it was."""

import hashlib
import pathlib

from tinymim_jax.convert.architecture import Heads
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families import from_torch
from tinymim_jax.convert.torch_file import read


def convert_file(
    family: str,
    path: str | pathlib.Path,
    *,
    heads: Heads | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> tuple[dict, dict]:
    """The architecture record and parameters in a PyTorch or safetensors file.

    Arguments, result and errors as for `from_torch`. The record's `source` names the family, the file and its sha256.
    """
    path = pathlib.Path(path)
    data = read(path)
    try:
        model, params = from_torch(family, data, heads=heads, decoder_heads=decoder_heads, image_size=image_size)
    except ConvertError as error:
        raise ConvertError(f"cannot convert {path}: {error}") from error
    model["source"] = {"family": family, "file": path.name, "sha256": sha256(path)}
    return model, params


def sha256(path: str | pathlib.Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
