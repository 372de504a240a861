"""The names that Vision Transformers of other authors have for their parts, all layouts together.

A file is read by the entries whose tensors it has. Names mean the same in all families, but for a gated MLP whose two
halves have the name of a plain layer, which their shapes show.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.families.entries import (
    FLAT_PATCHES,
    WITHOUT_ONE,
    WITHOUT_TWO,
    Entry,
    entry,
    gated,
    linear,
    norm,
)
from tinymim_jax.convert.families.table import PATCHES, TRANSPOSED

_OURS = "encoder/blocks_{i}"

# By the name of the patch projection's weight, which a file has once: what stands before the number of a block.
# "blocks" are timm's names and most authors', "transformer.resblocks" CLIP's, the others Hugging Face's.
ANCHORS: dict[str, tuple[str, ...]] = {
    "patch_embed.proj.weight": ("blocks",),
    "conv1.weight": ("transformer.resblocks",),
    "embeddings.patch_embeddings.projection.weight": ("encoder.layer",),
    "embeddings.patch_embeddings.weight": ("layer", "model.layer"),
    "embeddings.patch_embedding.weight": ("encoder.layers",),
    "embeddings.patch_embed.weight": ("encoder.layers",),
    "patch_generator.embedder.weight": ("blocks",),
}

# Tensors that are left out on purpose: heads and pooling, text towers, buffers.
IGNORED = re.compile(
    r"(.*\.)?(mask_token|position_ids|relative_position_index|num_batches_tracked|bias_mask)"
    r"|(.*\.)?rope\.freqs_(cos|sin)|rope_embed\.periods|summary_idxs"
    r"|(lm_head|head|head_dist|linear_head|fc_norm|classifier|pooler|attn_pool|decoder|local_cls_norm|pre_logits|projection_head)\..*"
    r"|proj|logit_scale|logit_bias|attn_mask|text_projection|(text_model|text|token_embedding|ln_final)\..*"
)


def anchor_of(names: Iterable[str]) -> str | None:
    """The name of the patch projection's weight that these names, with any prefix, have; None for other models."""
    names = list(names)
    for anchor, stems in ANCHORS.items():
        if any(n == anchor or n.endswith(f".{anchor}") for n in names) and any(
            re.search(rf"(^|\.){re.escape(stem)}\.0\.", n) for stem in stems for n in names
        ):
            return anchor
    return None


def outer_entries() -> tuple[Entry, ...]:
    """The entries outside the blocks."""
    projections = ("patch_embed.proj", "conv1", "embeddings.patch_embeddings.projection", "embeddings.patch_embeddings")
    projections += ("embeddings.patch_embedding", "embeddings.patch_embed")
    entries: list[Entry] = []
    for name in projections:
        entries.append(entry(f"{name}.weight", "encoder/patch_embed/kernel", PATCHES, 4))
        entries.append(entry(f"{name}.bias", "encoder/patch_embed/bias"))
    entries.append(entry("patch_generator.embedder.weight", "encoder/patch_embed/kernel", FLAT_PATCHES, 2))
    entries.append(entry("patch_generator.embedder.bias", "encoder/patch_embed/bias"))
    for name in ("patch_embed.norm", "embeddings.rms_norm"):
        entries += norm(name, "encoder/patch_norm")
    for name in ("cls_token", "embeddings.cls_token"):
        entries.append(entry(name, "encoder/cls_token", axes=3))
    for name in ("class_embedding", "embeddings.class_embedding"):
        entries.append(entry(name, "encoder/cls_token", WITHOUT_TWO, 1))
    entries.append(Entry(("patch_generator.cls_token.token",), ("encoder/leading",), WITHOUT_ONE, 2))
    for name in ("reg_token", "register_tokens", "storage_tokens", "embeddings.register_tokens"):
        entries.append(entry(name, "encoder/registers", axes=3))
    tables = ("pos_embed", "embeddings.position_embeddings", "patch_generator.pos_embed")
    for name in (*tables, "embeddings.position_embedding"):
        entries.append(entry(name, "encoder/pos_embed", axes=3))
    for name in ("positional_embedding", "embeddings.position_embedding.weight"):
        entries.append(entry(name, "encoder/pos_embed", WITHOUT_ONE, 2))
    for name in ("norm_pre", "ln_pre", "pre_layrnorm"):
        entries += norm(name, "encoder/pre_norm")
    for name in ("norm", "ln_post", "layernorm", "post_layernorm", "rms_norm"):
        entries += norm(name, "encoder/norm")
    return tuple(entries)


def block_entries(stem: str) -> tuple[Entry, ...]:
    """The entries of a block whose names begin with `stem` and its number."""
    name = stem + ".{i}."
    entries: list[Entry] = []
    for first, second in (
        ("norm1", "norm2"),
        ("ln_1", "ln_2"),
        ("layernorm_before", "layernorm_after"),
        ("layer_norm1", "layer_norm2"),
        ("rms_norm1", "rms_norm2"),
    ):
        entries += [*norm(name + first, f"{_OURS}/norm1"), *norm(name + second, f"{_OURS}/norm2")]
    entries += linear(f"{name}attn.qkv", f"{_OURS}/attn/qkv")
    entries.append(entry(f"{name}attn.in_proj_weight", f"{_OURS}/attn/qkv/kernel", TRANSPOSED, 2))
    entries.append(entry(f"{name}attn.in_proj_bias", f"{_OURS}/attn/qkv/bias"))
    for attention, names in (
        ("attn", ("q_proj", "k_proj", "v_proj")),
        ("attention", ("q_proj", "k_proj", "v_proj")),
        ("self_attn", ("q_proj", "k_proj", "v_proj")),
        ("attention.attention", ("query", "key", "value")),
    ):
        stems = [f"{name}{attention}.{one}" for one in names]
        entries.append(Entry(tuple(f"{s}.weight" for s in stems), (f"{_OURS}/attn/qkv/kernel",), TRANSPOSED))
        entries.append(Entry(tuple(f"{s}.bias" for s in stems), (f"{_OURS}/attn/qkv/bias",)))
        # Reached only where k has no bias.
        entries.append(entry(f"{stems[0]}.bias", f"{_OURS}/attn/q_bias"))
        entries.append(entry(f"{stems[2]}.bias", f"{_OURS}/attn/v_bias"))
    entries.append(entry(f"{name}attn.q_bias", f"{_OURS}/attn/q_bias"))
    entries.append(entry(f"{name}attn.v_bias", f"{_OURS}/attn/v_bias"))
    for bias in ("attn", "attention.attention.relative_position_bias"):
        entries.append(entry(f"{name}{bias}.relative_position_bias_table", f"{_OURS}/attn/relative_bias"))
    for inner in ("attn.norm", "attn.inner_attn_ln"):
        entries += norm(name + inner, f"{_OURS}/attn/norm")
    projections = ("attn.proj", "attn.out_proj", "self_attn.out_proj", "attention.out_proj", "attention.o_proj")
    for projection in (*projections, "attention.output.dense"):
        entries += linear(name + projection, f"{_OURS}/attn/proj")
    for scale in ("ls{}.gamma", "gamma_{}", "ls_{}.gamma", "layer_scale{}.lambda1", "lambda_{}"):
        entries += [entry(name + scale.format(n), f"{_OURS}/scale{n}") for n in (1, 2)]
    return (*entries, *_mlp_entries(name))


def _mlp_entries(name: str) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    ours = f"{_OURS}/mlp"
    for both in ("mlp.w12", "mlp.weights_in", "mlp.fc1"):
        entries += gated(name + both, ours)
    for gate, value in (
        ("mlp.fc1_g", "mlp.fc1_x"),
        ("mlp.w1", "mlp.w2"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("ffn.gate_proj", "ffn.up_proj"),
    ):
        entries += [*linear(name + gate, f"{ours}/gate"), *linear(name + value, f"{ours}/fc1")]
    for first in ("mlp.fc1", "mlp.c_fc", "intermediate.dense"):
        entries += linear(name + first, f"{ours}/fc1")
    for inner in ("mlp.norm", "mlp.ffn_ln"):
        entries += norm(name + inner, f"{ours}/norm")
    last = ("mlp.w3", "mlp.fc2", "mlp.weights_out", "mlp.c_proj", "output.dense", "mlp.down_proj", "ffn.down_proj")
    for second in last:
        entries += linear(name + second, f"{ours}/fc2")
    return tuple(entries)


def fits(found: Entry, state: Mapping[str, Any], i: int) -> bool:
    """Whether the tensors of an entry exist and have the described shapes."""
    tensors = [state.get(name.format(i=i)) for name in found.torch]
    if not all(isinstance(tensor, np.ndarray) for tensor in tensors):
        return False
    first: Any = tensors[0]
    if found.axes is not None and first.ndim != found.axes:
        return False
    if len(found.ours) == 2:  # a gated MLP: only then is the first layer twice as wide as the last one's input
        stem = found.torch[0].format(i=i).rpartition("mlp.")[0]
        last = [state.get(f"{stem}mlp.{name}.weight") for name in ("w3", "weights_out", "fc2")]
        hidden = next((tensor.shape[1] for tensor in last if isinstance(tensor, np.ndarray)), 0)
        return len(first) == 2 * hidden
    return True
