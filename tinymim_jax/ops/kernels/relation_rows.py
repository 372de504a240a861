"""The relation kernel for many tokens: a block of query rows at a time, on the grid (image, group of heads, block)."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tinymim_jax.ops.kernels.divergence import Relations, in_lanes, kl_and_difference
from tinymim_jax.ops.kernels.tiles import LANES, NN, NT, ROWS, TN, Heads, add, compiler_params, dot, valid_rows


def kl_by_rows(student, teacher, own: Heads, other: Heads, relations: Relations, cost, interpret, gradient):
    """(losses [batch, relations], gradient by `student` or None) of q, k, v [batch, tokens, 3 * dim].

    Args:
      own, other: the heads of student and teacher.
      cost: pl.CostEstimate of it all.
      gradient: whether the gradient is made.
    """
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
            _kernel,
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


def _kernel(*refs, own: Heads, other: Heads, relations: Relations, tokens: int, scale: float, gradient: bool) -> None:
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
            divergence, difference = kl_and_difference(logits, teacher_logits, axis=1)
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
    loss_ref[0, 0] += in_lanes(totals)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        for result_ref, each in finished:
            result_ref[0] = each[:tokens].astype(result_ref.dtype)


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
