"""The losses of all pairs of blocks, and what they need: adapters of the student, statistics of the teacher."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.tasks.distill.adapters import adapt, init_adapter
from tinymim_jax.tasks.distill.pairs import Pair, tapped_widths
from tinymim_jax.tasks.distill.statistics import no_statistics, standardize, update_statistics
from tinymim_jax.tasks.distill.target import Extracted
from tinymim_jax.tasks.task import RUNNING, Params


def compare(
    pairs: Sequence[Pair],
    params: Params,
    student: Sequence[Tap],
    teacher: Sequence[Tap],
    *,
    prefix: int,
    images: int = 0,
) -> dict[str, Any]:
    """Losses by name, each unweighted, and their weighted sum as "loss"; the teacher gets no gradient.

    Args:
      params: "adapter" and "statistics" of `init_comparison`; not read where no target has them.
      student, teacher: the tap of each pair.
      prefix: number of tokens before the patches in both.
      images: the statistics of the teacher are those of the first so many images, in training. They are then among the
        results, under RUNNING. 0, in evaluation: they stay as they are.
    """
    weighted, parts, counted = [], {}, {}
    for pair, seen, wanted in zip(pairs, student, teacher, strict=True):
        if pair.patches_only:
            seen, wanted = (jax.tree.map(lambda tokens: tokens[:, prefix:], tap) for tap in (seen, wanted))
        own, other = pair.target.extract(seen), jax.lax.stop_gradient(pair.target.extract(wanted))
        if pair.target.adapted:
            adapters = params.get("adapter", {}).get(pair.key, {})
            own = {name: adapt(pair.target.adapter, adapters.get(name), value) for name, value in own.items()}
        if pair.target.standardized:
            other, counted[pair.key] = _standardized(other, params["statistics"][pair.key], images)
        losses = pair.target.loss(own, other)
        weighted += [value if pair.weight == 1 else pair.weight * value for value in losses.values()]
        parts |= dict(zip(pair.names, losses.values(), strict=True))
    values = {"loss": jnp.sum(jnp.stack(weighted), axis=0), **parts}
    return values | ({RUNNING: {"statistics": counted}} if counted and images else {})


def _standardized(teacher: Extracted, statistics: Params, images: int) -> tuple[Extracted, Params]:
    """(the teacher's features, standardized; the statistics, which include these features in training)."""
    statistics = jax.lax.stop_gradient(statistics)
    if images:
        statistics = {name: update_statistics(statistics[name], value, images) for name, value in teacher.items()}
    return {name: standardize(value, statistics[name]) for name, value in teacher.items()}, statistics


def init_comparison(key: jax.Array, pairs: Sequence[Pair], student: ViT, teacher: ViT | ConvNet) -> Params:
    """Fresh "adapter" and "statistics" for each array of each pair, as far as the targets have them."""
    adapters, statistics = {}, {}
    for i, pair in enumerate(pairs):
        sizes = _sizes(pair, student, teacher)
        made = {
            name: init_adapter(pair.target.adapter, fold_in_name(key, f"adapter {i} {name}"), *sizes)
            for name in pair.target.names
            if pair.target.adapted
        }
        if made := {name: adapter for name, adapter in made.items() if adapter is not None}:
            adapters[pair.key] = made
        if pair.target.standardized:
            statistics[pair.key] = {name: no_statistics(sizes[1]) for name in pair.target.names}
    return ({"adapter": adapters} if adapters else {}) | ({"statistics": statistics} if statistics else {})


def comparison_record(distill: ConfigDict, pairs: Sequence[Pair], teacher: ViT | ConvNet) -> dict[str, Any]:
    """What adapters and statistics were made for, as plain JSON: they fit no other target, blocks or width."""
    blocks = [[pair.blocks.student, pair.blocks.teacher] for pair in pairs]
    record = {"target": distill.target, "blocks": blocks, "embed_dim": teacher.embed_dim}
    return record | ({"kind": distill.adapter} if distill.adapter != "linear" else {})


def _sizes(pair: Pair, student: ViT, teacher: ViT | ConvNet) -> tuple[int, int]:
    """Of student and teacher: the numbers of heads for an adapter of attention maps, else the widths."""
    if pair.target.adapter == "heads":
        return student.block_heads[pair.blocks.student - 1], teacher.block_heads[pair.blocks.teacher - 1]
    return tapped_widths(pair.blocks, student, teacher)
