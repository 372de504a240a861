"""The relation kernel for few tokens: all maps of an image at once, on the grid (image)."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from tinymim_jax.ops.kernels.divergence import Relations, in_lanes, kl_and_difference
from tinymim_jax.ops.kernels.tiles import LANES, NN, NT, TN, Heads, add, compiler_params, dot


def kl_at_once(student, teacher, own: Heads, other: Heads, relations: Relations, cost, interpret, gradient):
    """(losses [batch, relations], gradient by `student` or None) of q, k, v [batch, tokens, 3 * dim].

    Args:
      own, other: the heads of student and teacher.
      cost: pl.CostEstimate of it all.
      gradient: whether the gradient is made.
    """
    batch, tokens, width = student.shape

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, width), lambda i: (i, 0, 0))

    out_specs = [pl.BlockSpec((1, 1, LANES), lambda i: (i, 0, 0))]
    out_shape = [jax.ShapeDtypeStruct((batch, 1, LANES), jnp.float32)]
    if gradient:
        out_specs.append(block(width))
        out_shape.append(jax.ShapeDtypeStruct(student.shape, student.dtype))
    found = pl.pallas_call(
        functools.partial(_kernel, own=own, other=other, relations=relations),
        grid=(batch,),
        in_specs=[block(width), block(teacher.shape[-1])],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=compiler_params("parallel"),
        cost_estimate=cost,
        interpret=interpret,
        name="relation_kl",
    )(student, teacher)
    return found[0][:, 0, : len(relations)], found[1] if gradient else None


def _kernel(student_ref, teacher_ref, loss_ref, *gradient_refs, own: Heads, other: Heads, relations: Relations) -> None:
    """One image, with maps as [keys, queries]: reductions run over sublanes."""
    tokens = student_ref.shape[1]
    tasks = [(column, *pair, head) for column, pair in enumerate(relations) for head in range(own.heads)]
    scale = 1.0 / (own.heads * tokens)

    def products(left: int, right: int, head: int) -> tuple[Array, Array, Array]:
        query = own.only(student_ref[0, :, own.window(head, left)], head)
        teacher_query = other.only(teacher_ref[0, :, other.window(head, left)], head)
        logits = dot(student_ref[0, :, own.window(head, right)], query, NT) * own.head_dim**-0.5
        teacher_logits = dot(teacher_ref[0, :, other.window(head, right)], teacher_query, NT) * other.head_dim**-0.5
        return logits, teacher_logits, query

    if gradient_refs:
        for part in set(range(3)) - {part for pair in relations for part in pair}:
            unused = slice(part * own.dim, (part + 1) * own.dim)
            gradient_refs[0][0, :, unused] = jnp.zeros((tokens, own.dim), gradient_refs[0].dtype)
    totals = [jnp.zeros((1, 1), jnp.float32)] * len(relations)
    d_left = d_right = None
    current: Any = products(*tasks[0][1:])
    for index, (column, left, right, head) in enumerate(tasks):
        # The next head's products are issued before this head's softmax, so that the matrix unit has work meanwhile.
        ahead = products(*tasks[index + 1][1:]) if index + 1 < len(tasks) else None
        logits, teacher_logits, query = current
        divergence, difference = kl_and_difference(logits, teacher_logits, axis=0)
        totals[column] += jnp.sum(divergence, axis=1, keepdims=True)
        if gradient_refs:
            d_logits = (difference * (own.head_dim**-0.5 * scale)).astype(query.dtype)
            key = student_ref[0, :, own.window(head, right)]
            d_left = own.merge(dot(d_logits, key, TN), d_left, head)
            d_right = add(dot(d_logits, query, NN), d_right, own.first(head))  # zero in the lanes of other heads
            if own.last(head):
                for part, value in _by_part(left, right, d_left, d_right):
                    gradient_refs[0][0, :, own.window(head, part)] = value.astype(gradient_refs[0].dtype)
        current = ahead
    loss_ref[0] = in_lanes([total * scale for total in totals])


def _by_part(left: int, right: int, d_left: Array, d_right: Array) -> Iterator[tuple[int, Array]]:
    """(q, k or v as 0, 1, 2; its gradient) of one relation."""
    if left == right:
        yield left, d_left + d_right
    else:
        yield left, d_left
        yield right, d_right
