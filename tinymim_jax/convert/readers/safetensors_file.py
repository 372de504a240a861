"""Reads safetensors files with the library's own reader."""

import pathlib
import struct

import numpy as np
from safetensors import SafetensorError, safe_open

from tinymim_jax.convert.errors import ConvertError, printable

_MAX_HEADER = 100_000_000  # as in the library


def recognise(head: bytes) -> bool:
    """Whether a file that begins with these bytes (at least 9) looks like a safetensors file."""
    return len(head) > 8 and head[8] == ord("{") and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, the texts of the header by name).

    Raises:
      ConvertError: the file is damaged, or holds tensors of a type that numpy does not have.
    """
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensors(), file.metadata() or {}
    except AttributeError as error:  # of numpy, which lacks the type
        raise ConvertError(
            f"it holds tensors of a type that numpy does not have ({printable(error)}); save it as float16, bfloat16 "
            "or float32"
        ) from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise ConvertError(
            f"this is not a safetensors file, or it is cut off or damaged ({printable(error, 200)}); copy or "
            "download it again"
        ) from error
