"""Converts a weights file, with its metadata and the config files beside it."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tinymim_jax.convert.architecture import Heads
from tinymim_jax.convert.cnn import find_cnn, from_cnn
from tinymim_jax.convert.conversion import family_of, fitting_families, from_state_dict
from tinymim_jax.convert.detect import AUTO, check_family, find_weights, names_in, usual_network
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families.jax_names import to_timm
from tinymim_jax.convert.families.published import PUBLISHED
from tinymim_jax.convert.families.spellings import anchor_of
from tinymim_jax.convert.foreign import from_foreign
from tinymim_jax.convert.foreign_architecture import Hints
from tinymim_jax.convert.locate import Weights, locate
from tinymim_jax.convert.preprocessing import PUBLISHED_BY, Given, complete_preprocessing
from tinymim_jax.convert.sidecar import Sidecar, read_config, read_sidecar
from tinymim_jax.convert.state_dict import Found, find_state_dict

METADATA = "tinymim_jax"
"""The name in a safetensors header under which `tinymim export` keeps the content of model.json."""

LICENCES = {"mae": "cc-by-nc-4.0"}
"""Licences of the published weights of FAMILIES, as their releases state them."""


def convert_file(
    family: str,
    path: str | pathlib.Path,
    *,
    heads: Heads | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    use: str | None = None,
    prefix: str | None = None,
    eps: float | None = None,
    activation: str | None = None,
    rope_grid: tuple[int, int] | None = None,
    given: Given | None = None,
    config: str | pathlib.Path | None = None,
    licence: str | None = None,
) -> tuple[dict, dict]:
    """The architecture and parameters in a file or folder of PyTorch's, safetensors or Google's .npz.

    What is not given is read from the metadata of a file that `tinymim export` wrote, then from config.json of timm or
    Hugging Face beside the file, then assumed.

    Args:
      family: a name in FAMILIES or PUBLISHED, or 'auto', which finds it by the names of the tensors.
      path: a file, a folder, or the id of a model in the local cache of the Hugging Face hub.
      heads, decoder_heads, image_size, use, prefix: as for `from_torch`.
      eps, activation, rope_grid: see `foreign_architecture.Hints`.
      given: what is known of the preprocessing.
      config: a config.json to read in place of the one beside the file; 'none' for no such file.
      licence: of the weights; by default what config.json says, or that of the family.

    Returns:
      As `from_torch`. The architecture also has
        preprocessing: see `complete_preprocessing`.
        source: the family, the file, its sha256; where they apply, `licence`, `taken` (which network of the file),
          `left_out` (what else is in it), `not_read` (tensors of the network without a use here), `assumed` (names of
          what was assumed), `notes`, and `names` (of the tensors, for the way back).

    Raises:
      ConvertError: as for `from_torch`, or the files beside it do not belong to this model.
    """
    if family not in (AUTO, *PUBLISHED):
        family_of(family)
    weights = locate(path)
    path = weights.path
    data, metadata = weights.read()
    exported, notes = _exported(metadata)
    if family == AUTO and (state := find_cnn(data)) is not None:
        try:
            _refuse_options(use=use, prefix=prefix, heads=heads, decoder_heads=decoder_heads)
            _refuse_options(eps=eps, activation=activation, rope_grid=rope_grid)
            return _convert_cnn(state, weights, image_size, given or Given(), config, licence)
        except ConvertError as error:
            raise ConvertError(f"cannot convert {path}: {error}") from error
    hints = Hints(heads, image_size, eps, activation, rope_grid)
    found = None
    try:
        sidecar = Sidecar() if exported else read_sidecar(path, config)
        said = {} if exported else read_config(path, config)
        if path.suffix == ".npz":
            _refuse_options(use=use, prefix=prefix, decoder_heads=decoder_heads)
            family, model, params = _from_npz(family, data, said, hints)
        else:
            family, found = _found(family, data, said, bool(exported), use, prefix)
            if family in PUBLISHED:
                _refuse_options(decoder_heads=decoder_heads)
                model, params, more = from_foreign(family, found.state | found.beside, said, hints)
                model["source"] = more
                if "classifier" not in model:
                    sidecar = _without_classes(sidecar)
            else:
                _refuse_options(eps=eps, activation=activation, rope_grid=rope_grid)
                left = sorted({name.partition(".")[0] for name in found.beside})
                found = dataclasses.replace(found, left_out=[*found.left_out, *left])
                model, params = _from_family(family, found, exported, sidecar, heads, decoder_heads, image_size)
                _restore_taps(model, exported)
        sidecar = _with_family(sidecar, family, said)
        preprocessing = complete_preprocessing(model, given or Given(), exported.get("preprocessing", {}), sidecar)
    except ConvertError as error:
        where = f" ({found.place})" if found and found.place else ""
        raise ConvertError(f"cannot convert {path}{where}: {error}") from error
    encoder, decoder = exported.get("encoder", {}), exported.get("decoder", {})
    assumed = model.get("source", {}).get("assumed", [])
    if family not in PUBLISHED:
        assumed = ["heads"] * (not heads and not encoder.get("heads"))
        assumed += ["decoder_heads"] * ("decoder" in model and not decoder_heads and not decoder.get("heads"))
    notes += sidecar.notes + _size_note(sidecar, model)
    source = {"family": family, "file": weights.name, "sha256": weights.sha256()}
    more = model.pop("source", {}) | {"licence": licence or _licence(family, said), "notes": notes, "assumed": assumed}
    if found:
        more |= {"taken": found.place, "left_out": found.left_out}
    model["preprocessing"] = preprocessing
    model["source"] = source | {key: value for key, value in more.items() if value}
    return model, params


def _convert_cnn(
    state: Mapping[str, Any],
    weights: Weights,
    image_size: tuple[int, int] | None,
    given: Given,
    config: str | pathlib.Path | None,
    licence: str | None,
) -> tuple[dict, dict]:
    """As `convert_file`, of a convolutional network; model.json has "backbone" in place of "encoder"."""
    model, params = from_cnn(state, image_size)
    sidecar, said = read_sidecar(weights.path, config), read_config(weights.path, config)
    preprocessing = complete_preprocessing({"encoder": model["backbone"]}, given, {}, sidecar)
    preprocessing["origin"]["image_size"] = "given" if image_size else "assumed"
    source = {"family": model["backbone"]["kind"], "file": weights.name, "sha256": weights.sha256()}
    stated = licence or str((said.get("pretrained_cfg") or said).get("license") or "")
    more = {"licence": stated, "notes": list(sidecar.notes)}
    source |= {key: value for key, value in more.items() if value}
    return model | {"preprocessing": preprocessing, "source": source}, params


def _found(
    family: str, data: Any, said: Mapping[str, Any], exported: bool, use: str | None, prefix: str | None
) -> tuple[str, Found]:
    if family == AUTO and not exported:
        return find_weights(data, said, use=use, prefix=prefix)
    if family in PUBLISHED:
        anchor = anchor_of(names_in(data)) or "patch_embed.proj.weight"
        found = find_state_dict(data, anchor, use=use or usual_network(data), prefix=prefix)
        check_family(family, found, said)
        return family, found
    if family == AUTO:  # what `tinymim export` wrote says its own architecture
        found = find_state_dict(data, "patch_embed.proj.weight", use=use, prefix=prefix)
        return (fitting_families(found.state) or ["vit"])[-1], found
    return family, find_state_dict(data, family_of(family).anchor, use=use, prefix=prefix)


def _from_family(
    family: str,
    found: Found,
    exported: Mapping[str, Any],
    sidecar: Sidecar,
    heads: Heads | None,
    decoder_heads: int | None,
    image_size: tuple[int, int] | None,
) -> tuple[dict, dict]:
    encoder, decoder = exported.get("encoder", {}), exported.get("decoder", {})
    return from_state_dict(
        family,
        found.state,
        heads=heads or encoder.get("heads"),
        decoder_heads=decoder_heads or decoder.get("heads"),
        image_size=image_size or _size(encoder.get("image_size")) or _fitting(sidecar, found.state),
    )


def _from_npz(family: str, arrays: Mapping[str, Any], said: Mapping[str, Any], hints: Hints) -> tuple[str, dict, dict]:
    """Google's files: vision_transformer's have their own place for the position table, the others are big_vision's."""
    if family == AUTO:
        old = any("posembed_input" in name or "pre_logits" in name for name in arrays)
        family = "vit_jax" if old else "big_vision"
    if family not in ("vit_jax", "big_vision"):
        raise ConvertError("a .npz file is read by --from auto, vit_jax or big_vision")
    kernel = next((x for name, x in arrays.items() if name.endswith("embedding/kernel")), None)
    grid = None
    if hints.image_size and kernel is not None:
        grid = hints.image_size[0] // kernel.shape[0], hints.image_size[1] // kernel.shape[1]
    state, left_out = to_timm(arrays, grid)
    model, params, source = from_foreign(family, state, said, hints)
    source.pop("names")  # of no use here: no program needs these weights as .npz again
    model["source"] = source | {"not_read": sorted({name.rpartition("/")[0] for name in left_out})}
    return family, model, params


def _refuse_options(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConvertError(f"--{name} has no meaning for this family")


def _without_classes(sidecar: Sidecar) -> Sidecar:
    """Without the names of the classes of a head that was not read."""
    if "class_names" not in sidecar.values:
        return sidecar
    values = {key: value for key, value in sidecar.values.items() if key != "class_names"}
    return dataclasses.replace(sidecar, values=values, notes=[*sidecar.notes, "class names without their classifier"])


def _with_family(sidecar: Sidecar, family: str, said: Mapping[str, Any]) -> Sidecar:
    """What is known of the pixels of a family, where the files beside the weights do not say it."""
    row = PUBLISHED.get(family)
    if row is None or row.pixels is None:
        return sidecar
    values = dict(zip(("mean", "std"), map(list, row.pixels)))
    where = f"{PUBLISHED_BY} {family!r} models"
    if {"norm_mean", "norm_std"} <= set(said):
        values, where = {"mean": list(said["norm_mean"]), "std": list(said["norm_std"])}, "config.json"
    origin = dict.fromkeys(values, where) | sidecar.origin
    return dataclasses.replace(sidecar, values=values | sidecar.values, origin=origin)


def _licence(family: str, said: Mapping[str, Any]) -> str:
    stated = (said.get("pretrained_cfg") or said).get("license")
    return str(stated or (PUBLISHED[family].licence if family in PUBLISHED else LICENCES.get(family, "")))


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
