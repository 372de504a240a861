"""Encoders from the config, and checkpoints as the start or the teacher of a training."""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_params, load_record, merge
from tinymim_jax.checkpoints.tables import biases_on_grid
from tinymim_jax.class_names import match_classes
from tinymim_jax.errors import unknown
from tinymim_jax.models.switches import PLAIN, Switches
from tinymim_jax.models.vit import PRESETS, ViT
from tinymim_jax.ops.color import IMAGENET_MEAN, IMAGENET_STD
from tinymim_jax.ops.posembed import resize_table

log = logging.getLogger(__name__)

Params = Any  # nested dicts of arrays
Numbers = tuple[float, ...]

# Attention heads of every block in the authors' fine-tuning code, by width (models_vit.py).
OFFICIAL_HEADS = {192: 3, 384: 6, 768: 12}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_encoder(model: ConfigDict, **overrides: Any) -> ViT:
    """The encoder that `config.model` describes: a preset, with the values that the config sets.

    Args:
      overrides: fields of ViT that replace those of the config.
    """
    if model.variant not in PRESETS:
        raise unknown("model.variant", model.variant, PRESETS)
    fields: dict[str, Any] = dict(PRESETS[model.variant])
    for name in ("embed_dim", "depth", "heads"):
        if model[name] is not None:
            fields[name] = model[name]
    if not isinstance(fields["heads"], int):
        fields["heads"] = tuple(fields["heads"])
    fields |= {
        "patch_size": model.patch_size,
        "image_size": tuple(model.image_size),
        "mlp_ratio": model.mlp_ratio,
        "dist_token": model.dist_token,
        "pos_embed": model.pos_embed,
        "drop_path": model.drop_path,
        "drop_path_schedule": model.drop_path_schedule,
        "scan": model.scan,
        "remat": model.remat,
        "attention": model.attention,
        "dtype": compute_dtype(model),
        "switches": Switches(stem=model.stem),
    }
    return ViT(**(fields | overrides))


def started_encoder(config: ConfigDict, **overrides: Any) -> ViT:
    """The encoder that `config.model` describes, with the switches of the checkpoint that `config.init` names, if any.

    So an encoder that starts from another author's model (LayerScale, registers, rotary positions, ...) is that model.
    `model.stem` counts where it is not the default, so that a stem that the checkpoint lacks is not left out unsaid.

    Args:
      overrides: fields of ViT that replace those of the config.
    """
    switches = _switches_of(config.init)
    if config.model.stem != PLAIN.stem:
        switches = dataclasses.replace(switches, stem=config.model.stem)
    return build_encoder(config.model, switches=switches, **overrides)


def _switches_of(path: str) -> Switches:
    """The switches of a checkpoint; PLAIN without a path, and for a missing checkpoint, which is an error later."""
    if not path:
        return PLAIN
    try:
        model = _KEPT[path].model if _KEPT is not None and path in _KEPT else load_record(path)
    except CheckpointError:
        return PLAIN
    switches = Switches.from_record(model.get("encoder", {}).get("switches", {}))
    if switches != PLAIN:
        log.info("init: the encoder is that of %s: %s", path, switches.record())
    return switches


def compute_dtype(model: ConfigDict) -> Any:
    """`config.model.dtype` as a jax dtype."""
    if model.dtype not in DTYPES:
        raise unknown("model.dtype", model.dtype, DTYPES)
    return DTYPES[model.dtype]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in host memory.

    model: the content of its model.json, the architecture above all.
    params: nested dicts of numpy arrays.
    """

    path: str
    model: dict[str, Any]
    params: Params


_KEPT: dict[str, Loaded] | None = None


@contextlib.contextmanager
def keeping_checkpoints() -> Iterator[dict[str, Loaded]]:
    """Inside the block `load` reads each checkpoint once and keeps it in the returned dict, by path.

    An entry that is added to the dict takes the place of a checkpoint that does not exist yet.
    """
    global _KEPT
    _KEPT = kept = {}
    try:
        yield kept
    finally:
        _KEPT = None


def load(path: str, *, cnn: bool = False) -> Loaded:
    """Reads an export, what `tinymim convert` wrote, or the workdir of a run; see `load_params`."""
    if _KEPT is not None and path in _KEPT:
        return _KEPT[path]
    model, params = load_params(path, cnn=cnn)
    loaded = Loaded(path, model, params)
    if _KEPT is not None:
        _KEPT[path] = loaded
    return loaded


def same_part(loaded: Loaded, part: str, record: dict[str, Any]) -> bool:
    """Whether the checkpoint has this part with this architecture; otherwise logs that it starts from scratch."""
    found = loaded.model.get(part)
    if found is None:
        log.info("init: %s has no %s; it starts from its initialization", loaded.path, part)
    elif found != record:
        message = "init: the %s of %s is %s, the config asks for %s: it starts from its initialization"
        log.warning(message, part, loaded.path, found, record)
    return found == record


def log_unused(loaded: Loaded, taken: Collection[str]) -> None:
    """Logs which parts of the checkpoint, such as a decoder or a classifier's head, the task does not use."""
    if unused := sorted(set(loaded.params) - set(taken)):
        log.info("init: of %s this task does not use %s", loaded.path, ", ".join(unused))


def teacher_pixels(loaded: Loaded, mean: Any, std: Any, key: str) -> tuple[Numbers, Numbers]:
    """(mean, standard deviation) by which pixels in 0..1 are normalized for a teacher, for each of R, G and B.

    Those of the config, or else what the checkpoint's model.json records under "preprocessing", or else ImageNet's.

    Args:
      mean, std: the config's, None if it leaves them to the checkpoint.
      key: the config's section that has both, for messages.
    """
    recorded = loaded.model.get("preprocessing", {})
    chosen, sources = [], []
    for name, given, default in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        values, source = (given, "the config") if given is not None else (recorded.get(name), "its model.json")
        if values is None:
            values, source = default, "ImageNet's, as its model.json has none"
        numbers = isinstance(values, Sequence) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
        if not numbers or (name == "std" and min(values) <= 0):
            need = "three numbers above 0" if name == "std" else "three numbers"
            raise ValueError(f"{key}.{name}={values!r} ({source}): needs {need}, for pixels in 0..1, R, G and B")
        chosen.append(tuple(float(value) for value in values))
        sources.append(source)
    mean, std = chosen
    log.info("%s: pixels are normalized with mean %s (%s) and std %s (%s)", key, mean, sources[0], std, sources[1])
    return mean, std


def teacher_record(loaded: Loaded, pixels: tuple[Numbers, Numbers]) -> dict[str, Any]:
    """What model.json says of a teacher."""
    return {"checkpoint": loaded.path, "mean": list(pixels[0]), "std": list(pixels[1])}


def class_order(loaded: Loaded, class_names: Sequence[str], data: str) -> np.ndarray:
    """int32 `[len(class_names)]`: for each class of the data set `data` the output of the loaded classifier's head.

    Raises ClassMismatch if they are not the same classes; see `class_names.match_classes`.
    """
    known = loaded.model.get("preprocessing", {}).get("class_names", ())
    classes = loaded.model["classifier"]["classes"]
    order = match_classes(known, class_names, classes=classes, classifier=loaded.path, data=repr(data))
    if (order != np.arange(len(order))).any():
        log.info("the classes of %s are put in the order of those of %r", loaded.path, data)
    return order


def fit_positions(loaded: Loaded, encoder: ViT) -> Params:
    """The loaded encoder's parameters with the position table that `encoder` needs.

    A learned table is resized to the encoder's grid by the rule of its family, usually the bicubic interpolation of
    torch, and so are relative position biases; if the encoder has a DIST
    token and the checkpoint has none, its position is zeros, as the CLS token's is. An encoder with a fixed sin-cos
    table has no such parameter, so a table in the checkpoint must equal it; any other is a ValueError.
    """
    record = ViT.from_record(loaded.model["encoder"])
    params = dict(biases_on_grid(loaded.params["encoder"], record, encoder))
    if record.dist_token and not encoder.dist_token:
        raise ValueError(f"{loaded.path} has a distillation token: set model.dist_token=True")
    table = params.pop("pos_embed", None)
    if encoder.switches.positions == "none":
        return params
    if encoder.pos_embed == "learned":
        table = np.asarray(record.fixed_table if table is None else table)
        if encoder.table_prefix > record.table_prefix:
            table = np.insert(table, record.table_prefix, 0.0, axis=1)
        rule = record.switches.table
        params["pos_embed"] = np.asarray(resize_table(table, record.grid, encoder.grid, rule))
    elif table is not None and not np.allclose(table, record.fixed_table, atol=1e-4):
        raise ValueError(
            f"{loaded.path} holds a position table that is not the fixed sin-cos one: set model.pos_embed='learned'"
        )
    return params


def fill_encoder(
    params: Params, loaded: Loaded, encoder: ViT, *, same_heads: bool = True, new: Collection[str] = ()
) -> Params:
    """`params` with the encoder of `loaded`.

    Parameters that differ in name or shape are an error that lists them. Numbers of attention heads do not show in
    shapes, so the recorded ones are compared, unless `same_heads` is False. A DIST token that the checkpoint lacks
    keeps its initial value, with a log line; so does a final norm that an encoder of another author lacks. So do,
    without one, parameters named in `new` that it lacks.
    """
    if same_heads and tuple(loaded.model["encoder"]["heads"]) != encoder.block_heads:
        raise ValueError(
            f"{loaded.path} was trained with {loaded.model['encoder']['heads']} attention heads, block by block, and "
            f"the config asks for {list(encoder.block_heads)}: shapes agree but q, k and v would be cut differently. "
            "Set model.heads to the former"
        )
    unused = () if encoder.final_norm else ("norm",)
    no_token = not loaded.model["encoder"].get("dist_token")
    if encoder.dist_token and no_token:
        log.info("init: %s has no DIST token; it starts from its initialization", loaded.path)
    missing = (*new, *(["dist_token"] if no_token else []))
    if encoder.final_norm and "norm" not in loaded.params["encoder"] and "switches" in loaded.model["encoder"]:
        log.info("init: %s has no final norm; it starts from its initialization", loaded.path)
        missing = (*missing, "norm")
    try:
        filled = merge(params["encoder"], fit_positions(loaded, encoder), allow_missing=missing, allow_unused=unused)
    except CheckpointError as error:
        raise CheckpointError(f"init={loaded.path}: {error}{_other_sizes(loaded, encoder)}") from error
    return params | {"encoder": filled}


def _other_sizes(loaded: Loaded, encoder: ViT) -> str:
    """The overrides that give the config's encoder the sizes of the loaded one; '' if they are equal."""
    record = ViT.from_record(loaded.model["encoder"])
    names = ("embed_dim", "depth", "patch_size", "mlp_ratio")
    words = [
        f"model.{name}={getattr(record, name)}" for name in names if getattr(record, name) != getattr(encoder, name)
    ]
    return f"\nIts sizes differ from those of the config; add {' '.join(words)}" if words else ""
