"""Conversion of the families of `families/published.py`: their parameters, their architecture, and the way back."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinymim_jax.convert.architecture import Heads, make_image_size, parse_heads, ratio
from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.families.entries import to_ours, to_theirs
from tinymim_jax.convert.families.published import PUBLISHED, Published
from tinymim_jax.convert.families.spellings import ANCHORS, IGNORED, anchor_of, block_entries, fits, outer_entries

_MAX_LISTED = 8
_BUFFERS = re.compile(
    r"mask_token|position_ids|relative_position_index|num_batches_tracked|bias_mask|rope\b.*|rope_embed"
)
_MASKED, _SHARED = "qkv.bias_mask", "rel_pos_bias.relative_position_bias_table"
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


def from_foreign(
    name: str, state: Mapping[str, Any], config: Mapping[str, Any], hints: Hints
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The architecture and parameters of a state dict, and what to record about its source.

    Args:
      name: of the family, in PUBLISHED.
      state: arrays by name, without a prefix.
      config: Hugging Face's or timm's config.json; {} without one.

    Raises:
      ConvertError: unknown names, missing or misshapen tensors (listed), or something that must be given: the message
        names the option.
    """
    family = PUBLISHED[name]
    rewritten = _rewritten(state)
    flat, used, unread = _read(rewritten)
    ignored = [key for key in unread if IGNORED.fullmatch(key)]
    if strange := [printable(key) for key in unread if key not in ignored]:
        shown = ", ".join(strange[:_MAX_LISTED]) + ", ..." * (len(strange) > _MAX_LISTED)
        raise ConvertError(f"these tensors are not known of a {name!r} model: {shown}")
    if "encoder/patch_embed/kernel" not in flat or "encoder/blocks_0/norm1/scale" not in flat:
        raise ConvertError(f"the file does not hold a {name!r} model: it has no patch projection or no blocks")
    _split_leading(flat, config, state)
    encoder, assumed = _architecture(name, family, flat, state, config, hints)
    params: dict[str, Any] = {}
    for path, array in flat.items():
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.array(array, np.float32, order="C", copy=True)
    _check_shapes(name, encoder, params)
    source: dict[str, Any] = {"names": used}
    if any(key.endswith(_MASKED) for key in state):
        source["masked_k_bias"] = True
    if _SHARED in state:
        source["shared_relative_bias"] = True
    if assumed:
        source["assumed"] = assumed
    if ignored:
        source["not_read"] = _groups(ignored)
    return {"encoder": encoder}, params, source


def to_foreign(model: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict with the names that the model was read from: bit for bit the tensors that were read.

    Raises:
      ConvertError: the model was not read from such a file.
    """
    source = model.get("source", {})
    if "names" not in source:
        raise ConvertError("this model was not read from a file of its family, so the names of its tensors are unknown")
    used = {tuple(names) for names in source["names"]}
    flat = {path: np.asarray(array, np.float32) for path, array in _flatten(params)}
    encoder = model["encoder"]
    stems = {name.partition(".{i}.")[0] for names in used for name in names if ".{i}." in name}
    if any("patch_generator" in names[0] for names in used) and "encoder/registers" in flat:
        flat["encoder/leading"] = np.concatenate([flat.pop("encoder/cls_token"), flat.pop("encoder/registers")], axis=1)
    state: dict[str, np.ndarray] = {}
    for found in (*outer_entries(), *(e for stem in stems for e in block_entries(stem))):
        if found.torch not in used:
            continue
        for i in range(encoder["depth"] if "{i}" in found.torch[0] else 1):
            paths = [path.format(i=i) for path in found.ours]
            if all(path in flat for path in paths):
                tensors = to_theirs(found, [flat.pop(path) for path in paths], encoder["patch_size"])
                names = [name.format(i=i) for name in found.torch]
                state |= {key: np.asarray(x, order="C") for key, x in zip(names, tensors, strict=True)}
    if flat:
        raise ConvertError(f"these parameters have no names in the file's layout: {', '.join(sorted(flat)[:8])}")
    if source.get("masked_k_bias"):
        _mask_again(state)
    if source.get("shared_relative_bias"):
        tables = [key for key in state if key.endswith("relative_position_bias_table")]
        state[_SHARED] = [state.pop(key) for key in tables].pop()
    return state


def _rewritten(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with two things in the names of others: DINOv3's masked bias of k, BEiT's shared position biases."""
    result = dict(state)
    for name in state:
        if name.endswith(_MASKED) and name.removesuffix("_mask") in state:
            q, _, v = np.split(np.asarray(result.pop(name.removesuffix("_mask"))), 3)
            mask_q, mask_k, mask_v = np.split(np.nan_to_num(np.asarray(state[name], np.float32)), 3)
            if np.any(mask_k) or not (np.all(mask_q == 1) and np.all(mask_v == 1)):
                raise ConvertError(f"{name} is not the published mask (1 for q and v, 0 for k)")
            stem = name.removesuffix(_MASKED)
            result |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
    if _SHARED in result:
        table = result.pop(_SHARED)
        for i in range(_depth(state)):
            result[f"blocks.{i}.attn.relative_position_bias_table"] = table
    return result


def _mask_again(state: dict[str, np.ndarray]) -> None:
    for name in [name for name in state if name.endswith("attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        q, v = state.pop(name), state.pop(f"{stem}v_bias")
        state[f"{stem}qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
        state[f"{stem}{_MASKED}"] = np.concatenate([np.ones_like(q), np.zeros_like(q), np.ones_like(v)])


def _depth(state: Mapping[str, Any]) -> int:
    pattern = r"(?:blocks|layers?)\.(\d{1,3})\."
    return 1 + max((int(n) for key in state for n in re.findall(pattern, key)), default=0)


def _read(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[list[str]], list[str]]:
    """(our parameters by path, the names of the entries that were used, names that were not read)."""
    anchor = anchor_of([key for key in state if isinstance(key, str)])
    stems = [stem for stem in ANCHORS.get(anchor or "", ()) if any(key.startswith(f"{stem}.0.") for key in state)]
    flat: dict[str, np.ndarray] = {}
    used, unread = [], set(state)
    for found in (*outer_entries(), *(e for stem in stems for e in block_entries(stem))):
        for i in range(_depth(state) if "{i}" in found.torch[0] else 1):
            names = [name.format(i=i) for name in found.torch]
            if unread.issuperset(names) and fits(found, state, i):
                flat |= zip((path.format(i=i) for path in found.ours), to_ours(found, [state[n] for n in names]))
                unread -= set(names)
                if list(found.torch) not in used:
                    used.append(list(found.torch))
    return flat, used, sorted(unread, key=str)


def _split_leading(flat: dict[str, np.ndarray], config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """RADIO's CLS tokens and registers, which lie in one tensor."""
    if (leading := flat.pop("encoder/leading", None)) is None:
        return
    count = config.get("num_cls_tokens")
    if count is None:
        raise ConvertError(
            f"the file has {leading.shape[1]} tokens before the patches, and does not say how many of them are CLS "
            "tokens: put its config.json beside it, or name it by --config"
        )
    flat["encoder/cls_token"] = leading[:, : int(count)]
    if leading.shape[1] > int(count):
        flat["encoder/registers"] = leading[:, int(count) :]


def _architecture(
    name: str,
    family: Published,
    flat: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    hints: Hints,
) -> tuple[dict[str, Any], list[str]]:
    """(the architecture as model.json has it, names of what was assumed)."""
    said = config.get("model_args") or {}
    kernel = flat["encoder/patch_embed/kernel"]
    width, patch = kernel.shape[1], round((kernel.shape[0] / 3) ** 0.5)
    depth = sum(bool(re.fullmatch(r"encoder/blocks_\d+/norm1/scale", path)) for path in flat)
    heads = hints.heads or config.get("num_attention_heads") or said.get("num_heads")
    assumed = [] if heads else ["heads"]
    heads = heads or family.heads.get(width)
    if heads is None:
        raise ConvertError(f"no published {name!r} model is {width} wide, so name its attention heads: --heads 6")
    parsed = parse_heads(heads, depth, width)
    switches = _switches(name, family, flat, state, config, hints)
    if rope := switches.get("rope"):
        switches["rope"] = _rope(rope, state, said, hints, width // parsed[0])
    size, positions = _size(flat, patch, config, said, hints, switches)
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


def _switches(
    name: str,
    family: Published,
    flat: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    hints: Hints,
) -> dict[str, Any]:
    """All switches but the positions: those that tensors show, then those of config.json, of the user or the family."""
    block = "encoder/blocks_0"
    switches: dict[str, Any] = dict(family.switches)
    eps = hints.eps or config.get("layer_norm_eps") or config.get("rms_norm_eps")
    if eps is None:
        theirs = any(key.startswith("embeddings.") for key in state)  # the names of transformers
        eps = family.eps or (None if theirs else 1e-6)
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
    activation = activation or family.activation
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


def _rope(
    rope: Mapping[str, Any], state: Mapping[str, Any], said: Mapping[str, Any], hints: Hints, head_dim: int
) -> dict[str, Any]:
    """The record of a rotary embedding, complete, with the file's periods where it has them."""
    from tinymim_jax.ops.rope import Rope  # here because it imports jax, which nothing else in this package needs

    settings = dict(rope)
    if "reference" in settings:
        settings["reference"] = hints.rope_grid or said.get("ref_feat_shape") or settings["reference"]
        settings["reference"] = tuple(int(n) for n in settings["reference"])
    periods = state.get("rope_embed.periods")
    known = tuple(float(x) for x in np.asarray(periods, np.float32)) if periods is not None else ()
    if known and len(known) != head_dim // 4:
        raise ConvertError(
            f"the file has {len(known)} rotary periods, for heads {4 * len(known)} wide, and these heads would be "
            f"{head_dim} wide: give the right number by --heads"
        )
    return Rope(**(settings | {"periods": known})).record()


def _size(
    flat: Mapping[str, np.ndarray],
    patch: int,
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    hints: Hints,
    switches: Mapping[str, Any],
) -> tuple[Sequence[int], str]:
    """((height, width) in pixels, which tokens the position table covers)."""
    table = flat.get("encoder/pos_embed")
    configured = said.get("img_size") or config.get("image_size")
    size = hints.image_size or ((configured,) * 2 if isinstance(configured, int) else configured)
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


def _check_shapes(name: str, encoder: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Compares names and shapes with those of the encoder that the architecture describes."""
    import jax  # here because nothing else in this package needs it
    import jax.numpy as jnp

    from tinymim_jax.models.vit import ViT

    image = jnp.zeros((1, *encoder["image_size"], 3))
    expected: Any = jax.eval_shape(ViT.from_record(dict(encoder)).init, jax.random.key(0), image)
    shapes = {f"encoder/{path}": leaf.shape for path, leaf in _flatten(expected["params"])}
    got = {path: leaf.shape for path, leaf in _flatten(params)}
    wrong = [path for path in sorted(shapes | got) if got.get(path) != shapes.get(path)]
    if wrong:
        lines = "\n  ".join(f"{p}: got {got.get(p)}, expected {shapes.get(p)}" for p in wrong[:_MAX_LISTED])
        raise ConvertError(f"the file does not hold a {name!r} model; of our parameters these differ:\n  {lines}")


def _groups(names: Sequence[str]) -> list[str]:
    """'head (2 tensors)' for each first part of these names."""
    firsts: dict[str, int] = {}
    for name in names:
        whole = _BUFFERS.search(name)
        first = whole[0] if whole else name.partition(".")[0]
        firsts[first] = firsts.get(first, 0) + 1
    return [f"{printable(first)} ({count} tensor{'s' * (count > 1)})" for first, count in firsts.items()]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        leaves += _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return leaves
