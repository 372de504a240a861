"""Weights files as a whole: converts one, with what its metadata and the files beside it say."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tinymim_jax.convert.architecture import Heads
from tinymim_jax.convert.conversion import family_of, from_state_dict
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.preprocessing import Given, complete_preprocessing
from tinymim_jax.convert.readers import read_contents
from tinymim_jax.convert.sidecar import Sidecar, read_sidecar
from tinymim_jax.convert.state_dict import find_state_dict

METADATA = "tinymim_jax"
"""The name in a safetensors header under which `tinymim export` keeps the content of model.json."""


def convert_file(
    family: str,
    path: str | pathlib.Path,
    *,
    heads: Heads | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    use: str | None = None,
    prefix: str | None = None,
    given: Given | None = None,
    config: str | pathlib.Path | None = None,
) -> tuple[dict, dict]:
    """The architecture and parameters in a PyTorch or safetensors file.

    What is not given is read from the metadata of a file that `tinymim export` wrote, then from config.json of timm or
    Hugging Face beside the file, then assumed.

    Args:
      family, heads, decoder_heads, image_size, use, prefix: as for `from_torch`.
      given: what is known of the preprocessing.
      config: a config.json to read in place of the one beside the file; 'none' for no such file.

    Returns:
      As `from_torch`. The architecture also has
        preprocessing: see `complete_preprocessing`.
        source: the family, the file, its sha256; where they apply, `taken` (which network of the file), `left_out`
          (what else is in it), `assumed` (names of what was assumed) and `notes`.

    Raises:
      ConvertError: as for `from_torch`, or the files beside it do not belong to this model.
    """
    path = pathlib.Path(path).expanduser()
    family_of(family)
    contents = read_contents(path)
    exported, notes = _exported(contents.metadata)
    try:
        sidecar = Sidecar() if exported else read_sidecar(path, config)
        found = find_state_dict(contents.data, family_of(family).anchor, use=use, prefix=prefix)
        encoder, decoder = exported.get("encoder", {}), exported.get("decoder", {})
        model, params = from_state_dict(
            family,
            found.state,
            heads=heads or encoder.get("heads"),
            decoder_heads=decoder_heads or decoder.get("heads"),
            image_size=image_size or _size(encoder.get("image_size")) or _fitting(sidecar, found.state),
        )
        _restore_taps(model, exported)
        preprocessing = complete_preprocessing(model, given or Given(), exported.get("preprocessing", {}), sidecar)
    except ConvertError as error:
        where = f" ({found.place})" if "found" in locals() and found.place else ""
        raise ConvertError(f"cannot convert {path}{where}: {error}") from error
    assumed = ["heads"] * (not heads and not encoder.get("heads"))
    assumed += ["decoder_heads"] * ("decoder" in model and not decoder_heads and not decoder.get("heads"))
    notes += sidecar.notes + _size_note(sidecar, model)
    source = {"family": family, "file": path.name, "sha256": sha256(path)}
    more = {"taken": found.place, "left_out": found.left_out, "assumed": assumed, "notes": notes}
    model["preprocessing"] = preprocessing
    model["source"] = source | {key: value for key, value in more.items() if value}
    return model, params


def sha256(path: str | pathlib.Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exported(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """(the content of model.json that `tinymim export` put into a file, or {} if there is none; notes)."""
    if METADATA not in metadata:
        return {}, []
    try:
        record = json.loads(metadata[METADATA])
        if all(isinstance(record.get(part, {}), dict) for part in ("encoder", "decoder", "segmenter", "preprocessing")):
            return record, []
    except (ValueError, AttributeError, RecursionError):
        pass
    return {}, [f"the file's metadata {METADATA!r} are damaged and were ignored"]


def _restore_taps(model: dict[str, Any], exported: Mapping[str, Any]) -> None:
    """Which blocks the head of a segmentation network sees, which no tensor shows."""
    taps = exported.get("segmenter", {}).get("taps")
    if taps and "segmenter" in model:
        model["segmenter"]["taps"] = [int(tap) for tap in taps]


def _size(value: Any) -> tuple[int, int] | None:
    return (int(value[0]), int(value[1])) if isinstance(value, list) and len(value) == 2 else None


def _fitting(sidecar: Sidecar, state: Mapping[str, Any]) -> tuple[int, int] | None:
    """The sidecar's image size, where it is oblong and the position table may be for it; a square needs no help."""
    height, width = sidecar.values.get("image_size", (1, 1))
    return (height, width) if height != width and "pos_embed" in state else None


def _size_note(sidecar: Sidecar, model: Mapping[str, Any]) -> list[str]:
    said, has = sidecar.values.get("image_size"), tuple(model["encoder"]["image_size"])
    if said is None or tuple(said) == has:
        return []
    name = sidecar.origin["image_size"]
    return [
        f"{name} is for images of {said[0]}x{said[1]}, the position table for {has[0]}x{has[1]}; the latter is used"
    ]
