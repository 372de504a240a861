"""The last block in fine-tuning. Distillation of relations trains only its first norm and q, k and v."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from tinymim_jax.errors import unknown
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.pretrained import Loaded
from tinymim_jax.tasks.task import Params


def _zero_init(block: Params, previous: Params) -> Params:
    """Zero outputs of both branches: the block starts as the identity."""
    del previous
    proj = jax.tree.map(np.zeros_like, block["attn"]["proj"])
    fc2 = jax.tree.map(np.zeros_like, block["mlp"]["fc2"])
    return block | {"attn": block["attn"] | {"proj": proj}, "mlp": block["mlp"] | {"fc2": fc2}}


def _copy_previous(block: Params, previous: Params) -> Params:
    attn = block["attn"] | {"proj": previous["attn"]["proj"]}
    return block | {"attn": attn, "norm2": previous["norm2"], "mlp": previous["mlp"]}


# (last block, the block before it) -> new last block.
_REMEDIES: dict[str, Callable[[Params, Params], Params]] = {"zero_init": _zero_init, "copy_previous": _copy_previous}
LAST_BLOCK = ("keep", *_REMEDIES, "drop")


def check_last_block(choice: str, *, pretrained: bool) -> None:
    """Raises ValueError for an unknown choice, and for one that changes a pre-trained block where there is none."""
    if choice not in LAST_BLOCK:
        raise unknown("classify.last_block", choice, LAST_BLOCK)
    if choice != "keep" and not pretrained:
        raise ValueError(
            f"classify.last_block={choice!r} changes a pre-trained encoder's last block, but init is empty: name a "
            "checkpoint, or set classify.last_block='keep'"
        )


def with_last_block(loaded: Loaded, choice: str) -> Loaded:
    """The checkpoint with its last block changed by `choice`, one of LAST_BLOCK.

    A fine-tuned classifier is returned unchanged, as its last block has been trained.
    """
    if choice == "keep" or "classifier" in loaded.model:
        return loaded
    record, params = loaded.model["encoder"], dict(loaded.params["encoder"])
    if record["depth"] < 2:
        raise ValueError(f"classify.last_block={choice!r} needs two blocks, {loaded.path} has {record['depth']}")
    last, switches = f"blocks_{record['depth'] - 1}", dict(record.get("switches", {}))
    wide = switches.pop("last_dim", 0)
    if choice == "drop":
        del params[last]
        params.pop("widen", None)
        record = record | {"depth": record["depth"] - 1, "heads": list(record["heads"])[:-1]}
        record |= {"switches": switches} if wide else {}
    elif choice == "copy_previous" and wide:
        raise ValueError(
            f"classify.last_block='copy_previous': the last block of {loaded.path} is {wide} wide and the one before "
            f"it {record['embed_dim']} (distill.wide_last): choose another, such as 'keep'"
        )
    else:
        params[last] = _REMEDIES[choice](params[last], params[f"blocks_{record['depth'] - 2}"])
    model, params = loaded.model | {"encoder": record}, loaded.params | {"encoder": params}
    return dataclasses.replace(loaded, model=model, params=params)


def without_last_block(encoder: ViT) -> ViT:
    """The encoder that classify.last_block='drop' fine-tunes: one block shorter."""
    switches = dataclasses.replace(encoder.switches, last_dim=0)
    return encoder.clone(depth=encoder.depth - 1, heads=encoder.block_heads[:-1], switches=switches)
