"""Pairs of student and teacher blocks: which are compared, with how many heads, the losses, and their adapters."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.layers import Dense
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.tasks.distill.targets import Target, find_target
from tinymim_jax.tasks.task import Params, PerExample

HEADS = ("adaptive", "own", "resplit")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A student block and a teacher block, counted from 1, and the weight of their comparison."""

    student: int
    teacher: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two blocks, the target that compares them, and the names of the parts of their loss in the logs."""

    blocks: Blocks
    target: Target
    names: tuple[str, ...]


def find_blocks(distill: ConfigDict, student_depth: int, teacher_depth: int, teacher_tap: int) -> tuple[Blocks, ...]:
    """The pairs of `distill.taps`, or the single one of `distill.student_tap` and `teacher_tap`."""
    taps, student_tap = distill.taps, distill.student_tap
    if taps is None:
        _check_block("distill.student_tap", student_tap or student_depth, student_depth, "student")
        return (Blocks(student_tap or student_depth, teacher_tap),)
    if student_tap is not None or distill.teacher.tap is not None:
        raise ValueError(
            f"distill.taps={taps!r} gives all pairs of blocks, but distill.student_tap={student_tap} or "
            f"distill.teacher.tap={distill.teacher.tap} gives a block too: set both to None, or distill.taps to None"
        )
    if not isinstance(taps, Sequence) or isinstance(taps, str) or not taps:
        raise _not_taps(taps)
    pairs = [_blocks(triple, taps) for triple in taps]
    for pair in pairs:
        _check_block("distill.taps", pair.student, student_depth, "student")
        _check_block("distill.taps", pair.teacher, teacher_depth, "teacher")
    if len({(pair.student, pair.teacher) for pair in pairs}) < len(pairs):
        raise ValueError(f"distill.taps={taps!r} has a pair twice: leave one out and add its weight to the other's")
    return tuple(pairs)


def _blocks(triple: Any, taps: Any) -> Blocks:
    if not isinstance(triple, Sequence) or len(triple) != 3:
        raise _not_taps(taps)
    student, teacher, weight = triple
    if not (isinstance(student, int) and isinstance(teacher, int) and isinstance(weight, int | float) and weight > 0):
        raise _not_taps(taps)
    return Blocks(student, teacher, float(weight))


def _not_taps(taps: Any) -> ValueError:
    return ValueError(
        f"distill.taps={taps!r} is not a list of (student block, teacher block, positive weight): write for example "
        "distill.taps='((12, 18, 1.0), (6, 9, 0.5))'"
    )


def _check_block(key: str, block: int, depth: int, whose: str) -> None:
    if not 1 <= block <= depth:
        raise ValueError(f"{key}: the {whose} has no block {block}; it has blocks 1 to {depth}")


def align_heads(distill: ConfigDict, student: ViT, teacher: ViT, pairs: Sequence[Blocks]) -> ViT:
    """The student with the attention heads that `distill.heads` asks for."""
    if distill.heads not in HEADS:
        raise unknown("distill.heads", distill.heads, HEADS)
    if distill.relation_heads is not None and distill.heads != "resplit":
        raise ValueError(
            f"distill.relation_heads={distill.relation_heads} needs distill.heads='resplit', but that is "
            f"{distill.heads!r}: set it, or distill.relation_heads=None"
        )
    if distill.heads != "adaptive":
        return student
    heads, given = list(student.block_heads), {}
    for pair in pairs:
        count = teacher.block_heads[pair.teacher - 1]
        gives = f"distill.heads='adaptive' gives the student's block {pair.student} the {count} heads of the teacher's"
        if given.setdefault(pair.student, count) != count:
            raise ValueError(f"{gives} block {pair.teacher} and {given[pair.student]} of another: set it to 'resplit'")
        if student.embed_dim % count:
            raise ValueError(
                f"{gives} block {pair.teacher}, which do not divide the student's width {student.embed_dim}: set "
                "distill.heads='resplit'"
            )
        heads[pair.student - 1] = count
    return student.clone(heads=tuple(heads))


def make_pairs(distill: ConfigDict, student: ViT, teacher: ViT, blocks: Sequence[Blocks]) -> tuple[Pair, ...]:
    """The pairs with their targets; there are as many relation heads as the teacher has unless the config says more."""
    losses = {
        "relation_loss": distill.relation_loss,
        "relation_form": distill.relation_form,
        "feature_loss": distill.feature_loss,
        "beta": distill.beta,
    }
    pairs = []
    for pair in blocks:
        target = find_target(distill.target, **losses)
        if distill.heads == "resplit" and not target.adapted:
            heads = distill.relation_heads or teacher.block_heads[pair.teacher - 1]
            _check_relation_heads(heads, student.embed_dim, teacher.embed_dim)
            target = find_target(distill.target, **losses, relation_heads=heads)
        single = len(blocks) == 1
        names = target.names if single else tuple(f"{n}_{pair.student}_{pair.teacher}" for n in target.names)
        pairs.append(Pair(pair, target, names))
    return tuple(pairs)


def _check_relation_heads(heads: int, student: int, teacher: int) -> None:
    if heads < 1 or student % heads or teacher % heads:
        common = math.gcd(student, teacher)
        choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"{heads} relation heads do not divide the widths of both student ({student}) and teacher ({teacher}): "
            f"set distill.relation_heads. Choices: {choices}"
        )


def compare(pairs: Sequence[Pair], adapters: Params, student: Sequence[Tap], teacher: Sequence[Tap]) -> PerExample:
    """Losses by name, each unweighted, and their weighted sum as "loss"; the teacher gets no gradient.

    Args:
      adapters: from `init_adapters`; not read where no target has adapters.
      student, teacher: the tap of each pair.
    """
    weighted, parts = [], {}
    for i, (pair, seen, wanted) in enumerate(zip(pairs, student, teacher, strict=True)):
        extracted = pair.target.extract(seen)
        if pair.target.adapted:
            extracted = {name: _adapt(adapters[f"taps_{i}"][name], value) for name, value in extracted.items()}
        losses = pair.target.loss(extracted, jax.lax.stop_gradient(pair.target.extract(wanted)))
        weight = pair.blocks.weight
        weighted += [value if weight == 1 else weight * value for value in losses.values()]
        parts |= dict(zip(pair.names, losses.values(), strict=True))
    return {"loss": jnp.sum(jnp.stack(weighted), axis=0), **parts}


def init_adapters(key: jax.Array, pairs: Sequence[Pair], student: ViT, teacher: ViT) -> Params:
    """A Linear from the student's width to the teacher's for each feature of each pair; {} where no target needs it."""
    feature = jnp.zeros((1, student.embed_dim))
    linear = Dense(teacher.embed_dim)
    return {
        f"taps_{i}": {
            name: linear.init(fold_in_name(key, f"adapter {i} {name}"), feature)["params"] for name in pair.target.names
        }
        for i, pair in enumerate(pairs)
        if pair.target.adapted
    }


def adapter_record(distill: ConfigDict, pairs: Sequence[Pair], teacher: ViT) -> dict[str, Any]:
    """What the adapters were trained for, as plain JSON: they fit no other target, blocks or width."""
    blocks = [[pair.blocks.student, pair.blocks.teacher] for pair in pairs]
    return {"target": distill.target, "blocks": blocks, "embed_dim": teacher.embed_dim}


def _adapt(params: Params, features: jax.Array) -> jax.Array:
    width = params["bias"].shape[0]
    adapted: Any = Dense(width, dtype=features.dtype).apply({"params": params}, features)
    return adapted
