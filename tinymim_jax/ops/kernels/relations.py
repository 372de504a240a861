"""Relation losses as Pallas TPU kernels: q, k, v of student and teacher in, KL and gradients out, no map in HBM."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tinymim_jax.ops.kernels.divergence import Relations
from tinymim_jax.ops.kernels.relation_at_once import kl_at_once
from tinymim_jax.ops.kernels.relation_rows import kl_by_rows
from tinymim_jax.ops.kernels.tiles import SHORT, Heads


def relations_of(names: Sequence[str]) -> Relations:
    """("qk", "vv") as ((0, 1), (2, 2)).

    Raises ValueError if a letter occurs in two relations: its gradient would be a sum of two, and the kernels keep
    one for each letter.
    """
    letters = [letter for name in names for letter in set(name)]
    if len(set(letters)) < len(letters):
        raise ValueError(f"fused relations take each of q, k and v once, but {'_'.join(names)!r} has one twice")
    return tuple(("qkv".index(name[0]), "qkv".index(name[1])) for name in names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def fused_relation_kl(
    student: Float[Array, "batch tokens three_dim"],
    teacher: Float[Array, "batch tokens three_teacher_dim"],
    heads: int,
    relations: Relations,
    interpret: bool = False,
) -> Float[Array, "batch relations"]:
    """KL(teacher || student) of each token relation: `ops.relations.relation_kl`, float32, one column a relation.

    Differentiated by `student`, the same pass makes the gradient: the loss of an image is one number, so that its
    cotangent only scales it. The teacher gets none.

    Args:
      student, teacher: outputs of the joint projections, columns ordered (q|k|v, head, channel), after any rotation.
        The widths may differ, the numbers of tokens and heads may not.
      heads: heads of both.
      relations: from `relations_of`.
      interpret: run in Pallas' interpreter, on any device.
    """
    return _run(student, teacher, heads, relations, interpret, gradient=False)[0]


def _saved(student: Array, teacher: Array, heads: int, relations: Relations, interpret: bool):
    losses, gradient = _run(student, teacher, heads, relations, interpret, gradient=True)
    return losses, (gradient, teacher)


def _backward(heads: int, relations: Relations, interpret: bool, saved: tuple[Array, Array], cotangent: Array):
    del heads, interpret
    gradient, teacher = saved
    batch, tokens, width = gradient.shape
    factors = jnp.zeros((batch, 3), jnp.float32)
    for column, pair in enumerate(relations):
        factors = factors.at[:, list(set(pair))].set(cotangent[:, column, None])
    parts = gradient.reshape(batch, tokens, 3, width // 3).astype(jnp.float32) * factors[:, None, :, None]
    return parts.reshape(gradient.shape).astype(gradient.dtype), jnp.zeros_like(teacher)


fused_relation_kl.defvjp(_saved, _backward)


def _run(
    student: Array, teacher: Array, heads: int, relations: Relations, interpret: bool, *, gradient: bool
) -> tuple[Array, Array | None]:
    """(losses [batch, relations], gradient by `student` or None)."""
    batch, tokens, width = student.shape
    own, other = Heads(heads, width // 3), Heads(heads, teacher.shape[-1] // 3)
    moved = 2 * student.size if gradient else student.size
    cost = pl.CostEstimate(
        flops=2 * len(relations) * batch * tokens**2 * (own.dim * (3 if gradient else 1) + other.dim),
        bytes_accessed=moved * student.dtype.itemsize + teacher.size * teacher.dtype.itemsize,
        transcendentals=2 * len(relations) * batch * heads * tokens**2,
    )
    run = kl_at_once if tokens <= SHORT else kl_by_rows
    return run(student, teacher, own, other, relations, cost, interpret, gradient)
