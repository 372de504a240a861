"""Relation losses as Pallas TPU kernels: q, k, v of student and teacher in, KL and gradients out, no map in HBM."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tinymim_jax.ops.kernels.tiles import LANES, NN, NT, ROWS, SHORT, TN, Heads, add, compiler_params, dot, valid_rows

# A relation as two parts of (q, k, v): "qk" is (0, 1).
Relations = tuple[tuple[int, int], ...]


def relations_of(names: Sequence[str]) -> Relations:
    """("qk", "vv") as ((0, 1), (2, 2)).

    Raises ValueError where a letter occurs in two relations: its gradient would be a sum of two, and the kernels keep
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
    run = _run_short if tokens <= SHORT else _run_long
    return run(student, teacher, own, other, relations, cost, interpret, gradient)


def _run_short(student, teacher, own: Heads, other: Heads, relations: Relations, cost, interpret, gradient):
    batch, tokens, width = student.shape

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, width), lambda i: (i, 0, 0))

    out_specs = [pl.BlockSpec((1, 1, LANES), lambda i: (i, 0, 0))]
    out_shape = [jax.ShapeDtypeStruct((batch, 1, LANES), jnp.float32)]
    if gradient:
        out_specs.append(block(width))
        out_shape.append(jax.ShapeDtypeStruct(student.shape, student.dtype))
    found = pl.pallas_call(
        functools.partial(_short, own=own, other=other, relations=relations),
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


def _short(student_ref, teacher_ref, loss_ref, *gradient_refs, own: Heads, other: Heads, relations: Relations) -> None:
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
        divergence, difference = _divergence(logits, teacher_logits, axis=0)
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
    loss_ref[0] = _in_lanes([total * scale for total in totals])


def _divergence(logits: Array, teacher_logits: Array, axis: int) -> tuple[Array, Array]:
    """(KL of each query, softmax of student less teacher), with the keys along `axis`."""
    weights, shifted, log_total = _softmax(logits, axis)
    teacher_weights, teacher_shifted, teacher_log_total = _softmax(teacher_logits, axis)
    # Of logits less their maximum: where the teacher's weight lies both are near zero, and nothing large cancels.
    expected = jnp.sum(teacher_weights * (teacher_shifted - shifted), axis=axis, keepdims=True)
    return expected - teacher_log_total + log_total, weights - teacher_weights


def _softmax(logits: Array, axis: int) -> tuple[Array, Array, Array]:
    """(softmax, logits less their maximum, logarithm of the sum of exponentials of these)."""
    shifted = logits - jnp.max(logits, axis=axis, keepdims=True)
    powers = jnp.exp(shifted)
    total = jnp.sum(powers, axis=axis, keepdims=True)
    return powers * (1.0 / total), shifted, jnp.log(total)


def _by_part(left: int, right: int, d_left: Array, d_right: Array) -> Iterator[tuple[int, Array]]:
    """(q, k or v as 0, 1, 2; its gradient) of one relation."""
    if left == right:
        yield left, d_left + d_right
    else:
        yield left, d_left
        yield right, d_right


def _in_lanes(values: list[Array]) -> Array:
    """Numbers [1, 1] as the first lanes of [1, LANES]; zeros behind them."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = jnp.zeros((1, LANES), jnp.float32)
    for index, value in enumerate(values):
        row = jnp.where(lane == index, value, row)
    return row


def _run_long(student, teacher, own: Heads, other: Heads, relations: Relations, cost, interpret, gradient):
    """Grid (image, group of heads, block of query rows)."""
    batch, tokens, _ = student.shape
    size = _group(own, other)
    groups = own.heads // size if size else 1
    rows = min(ROWS, tokens)
    blocks = pl.cdiv(tokens, rows)

    inputs, in_specs = [], []
    for array, heads in ((student, own), (teacher, other)):
        width = heads.dim // groups
        parts = (array,) * 3 if size else jnp.split(array, 3, axis=-1)
        for left, right in relations:
            inputs += [parts[left], parts[right]]
            in_specs += [
                pl.BlockSpec((1, rows, width), _column(left * groups if size else 0, by_rows=True)),
                pl.BlockSpec((1, tokens, width), _column(right * groups if size else 0, by_rows=False)),
            ]
    out_specs = [pl.BlockSpec((1, 1, 1, LANES), lambda i, j, r: (i, j, 0, 0))]
    out_shape = [jax.ShapeDtypeStruct((batch, groups, 1, LANES), jnp.float32)]
    scratch = []
    width = own.dim // groups
    if gradient:
        for left, right in relations:
            if left != right:
                out_specs.append(pl.BlockSpec((1, rows, width), _column(0, by_rows=True)))
            out_specs.append(pl.BlockSpec((1, tokens, width), _column(0, by_rows=False)))
            out_shape += [jax.ShapeDtypeStruct((batch, tokens, own.dim), student.dtype)] * len({left, right})
            scratch.append(pltpu.VMEM((blocks * rows, width), jnp.float32))
    found = pl.pallas_call(
        functools.partial(
            _long,
            own=Heads(own.heads // groups, width),
            other=Heads(own.heads // groups, other.dim // groups),
            relations=relations,
            tokens=tokens,
            scale=1.0 / (own.heads * tokens),
            gradient=gradient,
        ),
        grid=(batch, groups, blocks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="relation_kl_rows",
    )(*inputs)
    losses = found[0][:, :, 0, : len(relations)].sum(axis=1)
    if not gradient:
        return losses, None
    by_part = dict.fromkeys(range(3), jnp.zeros((batch, tokens, own.dim), student.dtype))
    gradients = iter(found[1:])
    for left, right in relations:
        for part in (left,) if left == right else (left, right):
            by_part[part] = next(gradients)
    return losses, jnp.concatenate([by_part[part] for part in range(3)], axis=-1)


def _group(own: Heads, other: Heads) -> int:
    """The smallest number of heads that fills whole tiles on both sides; 0 where there is none."""
    for size in range(1, own.heads + 1):
        filled = size * own.head_dim % LANES == 0 and size * other.head_dim % LANES == 0
        if own.heads % size == 0 and filled:
            return size
    return 0


def _column(offset: int, *, by_rows: bool):
    """The index map of a block in column `offset` + group, with all tokens or a block of rows."""
    return lambda i, j, r: (i, r if by_rows else 0, offset + j)


def _long(
    *refs, own: Heads, other: Heads, relations: Relations, tokens: int, scale: float, gradient: bool
) -> None:  # fmt: skip
    """One block of query rows; gradients by the right-hand sides are summed in float32 scratch."""
    count = len(relations)
    student_refs, teacher_refs, refs = refs[: 2 * count], refs[2 * count : 4 * count], refs[4 * count :]
    loss_ref, refs = refs[0], refs[1:]
    sums, results = (refs[-count:], iter(refs[:-count])) if gradient else ((), iter(()))
    block, rows = pl.program_id(2), student_refs[0].shape[1]

    @pl.when(block == 0)
    def _():
        loss_ref[...] = jnp.zeros_like(loss_ref)
        for each in sums:
            each[...] = jnp.zeros_like(each)

    here = pl.ds(pl.multiple_of(block * rows, 8), rows) if rows < tokens else slice(0, tokens)
    totals, finished = [], []
    for column, (left, right) in enumerate(relations):
        left_ref, right_ref = student_refs[2 * column : 2 * column + 2]
        teacher_left_ref, teacher_right_ref = teacher_refs[2 * column : 2 * column + 2]
        d_left_ref = next(results) if gradient and left != right else None
        total = jnp.zeros((1, 1), jnp.float32)
        d_left = d_right = None
        for head in range(own.heads):
            window, teacher_window = own.window(head), other.window(head)
            query = own.only(valid_rows(left_ref[0, :, window], tokens), head)
            teacher_query = other.only(valid_rows(teacher_left_ref[0, :, teacher_window], tokens), head)
            key = right_ref[0, :, window]
            logits = dot(query, key, NT) * own.head_dim**-0.5  # [query rows, keys]
            teacher_logits = dot(teacher_query, teacher_right_ref[0, :, teacher_window], NT) * other.head_dim**-0.5
            # Rows beyond the last token are zero on both sides: two uniform softmaxes, of which the KL is zero.
            divergence, difference = _divergence(logits, teacher_logits, axis=1)
            total += jnp.sum(divergence, axis=0, keepdims=True)
            if not gradient:
                continue
            d_logits = (difference * (own.head_dim**-0.5 * scale)).astype(query.dtype)
            d_left = own.merge(dot(d_logits, key, NN), d_left, head)
            d_right = add(dot(d_logits, query, TN), d_right, own.first(head))
            if own.last(head):
                sums[column][:tokens, window] += d_right
                if d_left_ref is None:
                    sums[column][here, window] += d_left
                else:
                    d_left_ref[0, :, window] = d_left.astype(d_left_ref.dtype)
        totals.append(total * scale)
        if gradient:
            finished.append((next(results), sums[column]))
    loss_ref[0, 0] += _in_lanes(totals)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        for result_ref, each in finished:
            result_ref[0] = each[:tokens].astype(result_ref.dtype)
