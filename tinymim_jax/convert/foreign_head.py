"""Classifier heads in the files of other authors, where the pooling that they expect is one of ours.

Which tokens a head reads does not show in its tensors alone: it follows from the family, the width of the head and the
norms in the file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.families.entries import Entry, linear, norm

HEADS = ("head", "classifier", "linear_head")
_POOLED_NORMS = ("fc_norm", "pooler.layernorm")
# Families whose heads read the CLS token after the final norm, and those whose heads also read the mean of the patches.
_CLS = ("deit3", "dinov2", "dinov3", "hf_vit", "beit", "clip")
_CLS_AND_MEAN = ("dinov2", "dinov3")


@dataclasses.dataclass(frozen=True)
class Head:
    """What was found.

    entries: tensors that are read; none where the head is not.
    pool: what the head reads, a name in models.heads.CLASSIFIER_POOLS.
    classes: number of its outputs.
    why_not: in words, where it is not read.
    """

    entries: tuple[Entry, ...] = ()
    pool: str = ""
    classes: int = 0
    why_not: str = ""


def head_entries() -> tuple[Entry, ...]:
    """The entries of all heads."""
    found = [entry for name in HEADS for entry in linear(name, "head")]
    return (*found, *(entry for name in _POOLED_NORMS for entry in norm(name, "fc_norm")))


def find_head(family: str, state: Mapping[str, Any], flat: Mapping[str, Any], config: Mapping[str, Any]) -> Head | None:
    """The classifier's head in the file; None if it has none.

    Args:
      family: in PUBLISHED.
      state: arrays by name, without a prefix.
      flat: our parameters of the encoder, by path.
      config: config.json.
    """
    stem = next((name for name in HEADS if len(_shape(state.get(f"{name}.weight"))) == 2), None)
    if stem is None:
        return None
    weight, width = state[f"{stem}.weight"], flat["encoder/patch_embed/kernel"].shape[1]
    if _shape(state.get(f"{stem}.bias")) != (len(weight),) or _is_projection(family, config):
        return Head(why_not="a projection, not a classifier")
    if any(name.startswith("attn_pool.") for name in state):
        return Head(why_not="its input is pooled by attention")
    final, cls = "encoder/norm/scale" in flat, flat.get("encoder/cls_token")
    pooled = next((name for name in _POOLED_NORMS if _shape(state.get(f"{name}.weight")) == (width,)), None)
    entries = linear(stem, "head")
    if pooled and not final and weight.shape[1] == width:
        return Head((*entries, *norm(pooled, "fc_norm")), "mean", len(weight))
    if final and not pooled and cls is not None and cls.shape[1] == 1:
        if family in _CLS and weight.shape[1] == width:
            return Head(entries, "cls", len(weight))
        if family in _CLS_AND_MEAN and weight.shape[1] == 2 * width:
            return Head(entries, "cls_mean", len(weight))
    return Head(
        why_not=f"its classifier has {weight.shape[1]} inputs, which no supported pooling gives (CLS, mean, both)"
    )


def _is_projection(family: str, config: Mapping[str, Any]) -> bool:
    """Whether the head is CLIP's projection to the space of texts: timm's fine-tuned models say so in their tag."""
    tag = str((config.get("pretrained_cfg") or {}).get("tag", ""))
    return family == "clip" and "_ft_" not in f"_{tag}_"


def _shape(value: Any) -> tuple[int, ...]:
    return value.shape if isinstance(value, np.ndarray) else ()
