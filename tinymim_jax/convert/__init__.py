"""Conversion between PyTorch's weights files and ours, without PyTorch."""

from tinymim_jax.convert.architecture import Heads, parse_heads
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families import from_torch, to_torch
from tinymim_jax.convert.files import convert_file, sha256
from tinymim_jax.convert.inert_pickle import Opaque
from tinymim_jax.convert.names import FAMILIES
from tinymim_jax.convert.safetensors_file import to_safetensors
from tinymim_jax.convert.torch_file import read

__all__ = [
    "FAMILIES",
    "ConvertError",
    "Heads",
    "Opaque",
    "convert_file",
    "from_torch",
    "parse_heads",
    "read",
    "sha256",
    "to_safetensors",
    "to_torch",
]
