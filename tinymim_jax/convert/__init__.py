"""Conversion between PyTorch's weights files and ours, without PyTorch."""

from tinymim_jax.convert.architecture import Heads, parse_heads
from tinymim_jax.convert.conversion import from_torch, to_torch
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families import FAMILIES
from tinymim_jax.convert.families.published import PUBLISHED
from tinymim_jax.convert.files import convert_file, sha256
from tinymim_jax.convert.formats import FORMATS
from tinymim_jax.convert.formats.safetensors import to_safetensors
from tinymim_jax.convert.preprocessing import INTERPOLATIONS, Given, described, read_class_names
from tinymim_jax.convert.readers import read
from tinymim_jax.convert.readers.pickle_values import Opaque

__all__ = [
    "FAMILIES",
    "FORMATS",
    "INTERPOLATIONS",
    "PUBLISHED",
    "ConvertError",
    "Given",
    "Heads",
    "Opaque",
    "convert_file",
    "described",
    "from_torch",
    "parse_heads",
    "read",
    "read_class_names",
    "sha256",
    "to_safetensors",
    "to_torch",
]
