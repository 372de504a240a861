"""Safetensors files with the tensor names of a PyTorch family."""

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tinymim_jax.convert.conversion import family_of, to_torch
from tinymim_jax.convert.files import METADATA
from tinymim_jax.convert.foreign import to_foreign


def write_family(family: str, path: str | pathlib.Path, model: Mapping[str, Any], params: Mapping) -> list[str]:
    """Writes a model with the names of `family`.

    The header's metadata have what no tensor shows: `heads` (attention heads block by block), and under `tinymim_jax`
    the content of model.json with preprocessing and class names, which `convert_file` reads back.

    Returns:
      Messages for the user, a sentence each.

    Raises:
      ConvertError: the parameters are not those of this family.
      OSError: the file cannot be written.
    """
    heads = list(model["encoder"]["heads"])
    record = {key: value for key, value in model.items() if key not in ("digest", "source", "probe")}
    metadata = {"family": family, "heads": json.dumps(heads), METADATA: json.dumps(record)}
    if "decoder" in model:
        metadata["decoder_heads"] = json.dumps(model["decoder"]["heads"])
    to_safetensors(path, to_torch(family, model, params), metadata)
    messages = [f"WARNING: {warning}" for warning in head_warnings(family, model)]
    if "adapter" in model and "adapter" in params:
        messages.append("left out: the adapter, which is used in the training of a distillation only")
    return messages


def write_original(path: str | pathlib.Path, model: Mapping[str, Any], params: Mapping) -> list[str]:
    """Writes a converted model of another family with the names and shapes of the file that it was read from.

    Tensors that were not read, such as heads, are not in it.

    Raises:
      ConvertError: the model was not converted from such a file.
    """
    metadata = {
        "family": str(model.get("source", {}).get("family", "")),
        "heads": json.dumps(model["encoder"]["heads"]),
    }
    to_safetensors(path, to_foreign(model, params), metadata)
    return [f"not in it, as it was not read: {text}" for text in model["source"].get("not_read", [])]


def head_warnings(family: str, model: Mapping[str, Any]) -> list[str]:
    """Sentences where the family's PyTorch models of this width have other attention heads than this one.

    Shapes do not show heads, so such a model loads the file without an error and computes something else.
    """
    encoder, rows = model["encoder"], family_of(family)
    if rows.pyramid:
        return []  # their tables of relative positions show the heads
    heads, width = list(encoder["heads"]), encoder["embed_dim"]
    warnings = []
    usual = rows.heads.get(width)
    if usual is None or heads != [usual[0]] * (len(heads) - 1) + [usual[1]]:
        theirs = "there is no published model" if usual is None else f"a model has {_shown(usual, len(heads))}"
        changes = [
            f"; then a = model.blocks[{i}].attn; a.num_heads, a.head_dim, a.scale = {n}, {d}, {d}**-0.5"
            for i, (n, d) in enumerate((n, width // n) for n in heads)
            if n != heads[0]
        ]
        warnings.append(
            f"this model has {_shown(heads, len(heads))} attention heads, and in the family {family!r} at width "
            f"{width} {theirs}. Shapes do not show heads: the family's usual model loads this file without an error "
            f"and computes something else. Build it with num_heads={heads[0]}{''.join(changes)} (the file's metadata "
            "have the numbers under 'heads')"
        )
    if "decoder" in model and rows.decoder_heads.get(model["decoder"]["embed_dim"]) != model["decoder"]["heads"]:
        warnings.append(
            f"the decoder has {model['decoder']['heads']} attention heads, which is not what the published model of "
            "its width has: build it with decoder_num_heads of that number"
        )
    return warnings


def to_safetensors(
    path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a state dict as a safetensors file: either the whole file appears at `path`, or nothing changes.

    Args:
      path: replaced if it exists.
      state_dict: arrays by name.
      metadata: texts for the file's header. `format` is "pt" unless given, which PyTorch programs look for.

    Raises:
      OSError: the folder is missing or full, or may not be written to.
    """
    path = pathlib.Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    # The library writes the memory of an array as it is: a transposed view would be written wrong.
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(arrays, temporary, {"format": "pt"} | dict(metadata or {}))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except SafetensorError as error:  # it has the number of an OSError only in its text
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _shown(heads: tuple[int, int] | list[int], depth: int) -> str:
    """'12'; '12 x 11, 16' if only the last block differs; otherwise the number of each block."""
    first, last = heads[0], heads[-1]
    if set(heads) == {first}:
        return str(first)
    if list(heads) == [first] * (depth - 1) + [last] or len(heads) != depth:
        return f"{first} x {depth - 1}, {last}"
    return ", ".join(map(str, heads))
