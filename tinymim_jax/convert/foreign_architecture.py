"""The architecture of the families of `families/published.py`: from tensors, config.json, the user and the family."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinymim_jax.convert.architecture import Heads, make_image_size, parse_heads, ratio
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families.published import Published

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the user says of what tensors do not show; None where he says nothing.

    heads: attention heads.
    image_size: (height, width) in pixels.
    eps: of the norms.
    activation: of the MLPs, a name in models.switches.CHOICES.
    rope_grid: (rows, columns) to which rotary positions are scaled.
    """

    heads: Heads | None = None
    image_size: tuple[int, int] | None = None
    eps: float | None = None
    activation: str | None = None
    rope_grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Known:
    """All that tells the architecture of a model.

    name, family: its key and row in PUBLISHED.
    flat: its parameters by our path.
    state: its tensors by the file's names.
    config: Hugging Face's or timm's config.json; {} without one.
    """

    name: str
    family: Published
    flat: Mapping[str, np.ndarray]
    state: Mapping[str, Any]
    config: Mapping[str, Any]
    hints: Hints

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of the model's constructor in timm, if config.json has them."""
        return self.config.get("model_args") or {}


def foreign_architecture(known: Known) -> tuple[dict[str, Any], list[str]]:
    """(the architecture in the format of model.json, names of the values that were assumed)."""
    flat, hints, said = known.flat, known.hints, known.arguments
    kernel = flat["encoder/patch_embed/kernel"]
    width, patch = kernel.shape[1], round((kernel.shape[0] / 3) ** 0.5)
    depth = sum(bool(re.fullmatch(r"encoder/blocks_\d+/norm1/scale", path)) for path in flat)
    heads = hints.heads or known.config.get("num_attention_heads") or said.get("num_heads")
    assumed = [] if heads else ["heads"]
    heads = heads or known.family.heads.get(width)
    if heads is None:
        raise ConvertError(f"no published {known.name!r} model is {width} wide, so name its attention heads: --heads 6")
    parsed = parse_heads(heads, depth, width)
    switches = _switches(known)
    if rope := switches.get("rope"):
        switches["rope"] = _rope(known, rope, width // parsed[0])
    size, positions = _size(known, patch, switches)
    if positions != "all":
        switches["positions"] = positions
    hidden = flat["encoder/blocks_0/mlp/fc2/kernel"].shape[0]
    return {
        "embed_dim": width,
        "depth": depth,
        "heads": parsed,
        "patch_size": patch,
        "image_size": list(size),
        "mlp_ratio": ratio(hidden, width),
        "pos_embed": "learned",
        "final_norm": "encoder/norm/scale" in flat,
        "switches": switches,
    }, assumed


def _switches(known: Known) -> dict[str, Any]:
    """All switches but the positions: those that tensors show, then those of config.json, of the user or the family."""
    name, flat, config, hints, block = known.name, known.flat, known.config, known.hints, "encoder/blocks_0"
    switches: dict[str, Any] = dict(known.family.switches)
    eps = hints.eps or config.get("layer_norm_eps") or config.get("rms_norm_eps")
    if eps is None:
        theirs = any(key.startswith("embeddings.") for key in known.state)  # the names of transformers
        eps = known.family.eps or (None if theirs else 1e-6)
    if eps is None:
        raise ConvertError(
            f"the eps of the norms of a {name!r} model is in its config.json (usually 1e-12): put it beside the file, "
            "name it by --config, or give --eps"
        )
    if eps != 1e-6:
        switches["eps"] = float(eps)
    cls_tokens = flat["encoder/cls_token"].shape[1] if "encoder/cls_token" in flat else 0
    if cls_tokens != 1:
        switches["cls_tokens"] = cls_tokens
    if "encoder/registers" in flat:
        switches["registers"] = flat["encoder/registers"].shape[1]
    shown = {
        "patch_norm": "encoder/patch_norm/scale",
        "pre_norm": "encoder/pre_norm/scale",
        "attention_norm": f"{block}/attn/norm/scale",
        "layer_scale": f"{block}/scale1",
        "mlp_norm": f"{block}/mlp/norm/scale",
    }
    switches |= {switch: True for switch, path in shown.items() if path in flat}
    if "encoder/patch_embed/bias" not in flat:
        switches["patch_bias"] = False
    if f"{block}/attn/proj/bias" not in flat:
        switches["linear_bias"] = False
    if f"{block}/attn/qkv/bias" not in flat:
        switches["qkv_bias"] = "qv" if f"{block}/attn/q_bias" in flat else "none"
    if f"{block}/mlp/gate/kernel" in flat:
        return switches | {"mlp": "gated", "activation": "silu"}
    activation = hints.activation or _ACTIVATIONS.get(str(config.get("hidden_act"))) or _timm_activation(name, config)
    activation = activation or known.family.activation
    if activation is None:
        raise ConvertError(
            f"models of {name!r} have different activations, and the tensors do not show which: put config.json beside "
            "the file, or give --activation (quick_gelu: OpenAI, MetaCLIP, DFN; gelu: OpenCLIP's LAION and DataComp; "
            "gelu_tanh: SigLIP)"
        )
    return switches | ({"activation": activation} if activation != "gelu" else {})


def _timm_activation(name: str, config: Mapping[str, Any]) -> str | None:
    architecture = str(config.get("architecture", ""))
    if not architecture:
        return None
    if name == "clip":
        tag = str((config.get("pretrained_cfg") or {}).get("tag", ""))
        quick = "quickgelu" in architecture or tag.startswith(("openai", "metaclip", "dfn"))
        return "quick_gelu" if quick else "gelu"
    if name == "siglip":
        return "gelu_tanh" if re.search("so400m|giantopt|gelutanh", architecture) else "gelu"
    return None


def _rope(known: Known, rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The record of a rotary embedding, complete, with the file's periods where it has them."""
    from tinymim_jax.ops.rope import Rope  # here because it imports jax, which nothing else in this package needs

    settings: dict[str, Any] = dict(rope)
    if "reference" in settings:
        settings["reference"] = known.hints.rope_grid or known.arguments.get("ref_feat_shape") or settings["reference"]
        settings["reference"] = tuple(int(n) for n in settings["reference"])
    periods = known.state.get("rope_embed.periods")
    stored = () if periods is None else tuple(float(x) for x in np.asarray(periods, np.float32))
    settings["periods"] = stored
    if stored and len(stored) != head_dim // 4:
        raise ConvertError(
            f"the file has {len(stored)} rotary periods, for heads {4 * len(stored)} wide, and these heads would be "
            f"{head_dim} wide: give the right number by --heads"
        )
    return Rope(**settings).record()


def _size(known: Known, patch: int, switches: Mapping[str, Any]) -> tuple[Sequence[int], str]:
    """((height, width) in pixels, which tokens the position table covers)."""
    flat, hints = known.flat, known.hints
    table = flat.get("encoder/pos_embed")
    configured: Any = known.arguments.get("img_size") or known.config.get("image_size")
    size: Any = hints.image_size or ((configured,) * 2 if isinstance(configured, int) else configured)
    if table is None:
        if size is None and "encoder/blocks_0/attn/relative_bias" in flat:
            rows = flat["encoder/blocks_0/attn/relative_bias"].shape[0] - 3
            size = ((round(rows**0.5) + 1) // 2 * patch,) * 2
        return tuple(size or (224 // patch * patch,) * 2), "none"
    rows, tokens = table.shape[1], switches.get("cls_tokens", 1)
    area = size and size[0] * size[1] // patch**2
    if switches.get("table") == "square":
        return make_image_size(rows, 0, patch, None), "patches"
    if area in (rows, rows - tokens):
        only = area == rows
    else:
        only = round(rows**0.5) ** 2 == rows
        size = hints.image_size
    only = only or not tokens
    return make_image_size(rows, 0 if only else tokens, patch, size), "patches" if only else "all"
