"""What `tinymim export --to` writes: one file each. A new format is a file with a writer and a row here and in cli.

FORMATS are weights files. Programs for other runtimes (onnx, litert, stablehlo, hub) have a module of their name with
`write(path, network, **options)`; evaluation.exporting.PROGRAMS lists them. They import jax and are loaded on demand.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from tinymim_jax.convert.families import FAMILIES
from tinymim_jax.convert.formats.safetensors import write_family, write_original

Writer = Callable[[str | pathlib.Path, Mapping[str, Any], Mapping], list[str]]
"""(path, content of model.json, parameters) -> messages for the user; it writes the file at `path`."""

FORMATS: dict[str, Writer] = {
    **{family: functools.partial(write_family, family) for family in FAMILIES},
    "original": write_original,  # the names of the file that the model was converted from
}
