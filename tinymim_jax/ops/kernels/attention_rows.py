"""Attention kernels for many tokens: blocks of query rows, with the keys and values of all tokens in VMEM."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from tinymim_jax.ops.kernels.tiles import LANES, NN, NT, ROWS, TN, Heads, add, compiler_params, dot, valid_rows

# Dimensions of a grid, by name of what they count, and where a kernel finds its block of rows.
_IMAGES_FIRST, _ROWS_LAST = ("image", "group", "rows"), 2
_IMAGES_LAST, _ROWS_SECOND = ("group", "rows", "image"), 1


def forward_by_rows(qkv: Array, bias: Array | None, heads: int, cost: pl.CostEstimate, interpret: bool) -> Array:
    """`attention.fused_attention`; `cost` is that of the whole call."""
    # With a bias, images are the innermost dimension: a block of the bias is read once for all of them.
    order, axis = (_IMAGES_FIRST, _ROWS_LAST) if bias is None else (_IMAGES_LAST, _ROWS_SECOND)
    layout = _Blocks(qkv, heads, order)
    batch, tokens, width = qkv.shape
    return pl.pallas_call(
        functools.partial(_forward, heads=layout.group, scale=layout.scale, tokens=tokens, axis=axis),
        grid=layout.grid,
        in_specs=[layout.rows(0), layout.all(1), layout.all(2), *layout.shared(bias)],
        out_specs=layout.result_rows,
        out_shape=jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype),
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_forward_rows",
    )(*layout.parts, *(() if bias is None else (bias,)))


def backward_by_rows(
    qkv: Array, bias: Array | None, cotangent: Array, heads: int, cost: pl.CostEstimate, interpret: bool
) -> tuple[Array, Array | None]:
    """Gradients by `qkv` and `bias`; `cost` is that of the first."""
    layout = _Blocks(qkv, heads, _IMAGES_FIRST)
    batch, tokens, width = qkv.shape
    shape = jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype)
    gradients = pl.pallas_call(
        functools.partial(_backward, heads=layout.group, scale=layout.scale, tokens=tokens),
        grid=layout.grid,
        in_specs=[layout.rows(0), layout.all(1), layout.all(2), layout.result_rows, *layout.shared(bias)],
        out_specs=[layout.result_rows, layout.result_all, layout.result_all],
        out_shape=[shape] * 3,
        scratch_shapes=[pltpu.VMEM((tokens, layout.group.dim), jnp.float32)] * 2,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_backward_rows",
    )(*layout.parts, cotangent, *(() if bias is None else (bias,)))
    d_qkv = jnp.concatenate(gradients, axis=-1)
    return d_qkv, None if bias is None else _bias_gradient(qkv, bias, cotangent, heads, interpret)


def _bias_gradient(qkv: Array, bias: Array, cotangent: Array, heads: int, interpret: bool) -> Array:
    """A kernel of its own: it sums over images, where the gradients by keys and values are sums over rows."""
    layout = _Blocks(qkv, heads, _IMAGES_LAST)
    batch, tokens, width = qkv.shape
    (spec,) = layout.shared(bias)
    found = pl.pallas_call(
        functools.partial(_backward_of_bias, heads=layout.group, scale=layout.scale, tokens=tokens),
        grid=layout.grid,
        in_specs=[layout.rows(0), layout.all(1), layout.all(2), layout.result_rows, spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * tokens**2 * width // 3,
            bytes_accessed=(qkv.size + cotangent.size) * qkv.dtype.itemsize + 8 * bias.size,
            transcendentals=batch * heads * tokens**2,
        ),
        interpret=interpret,
        name="attention_backward_bias",
    )(*layout.parts, cotangent, bias)
    return found.astype(bias.dtype)


def _forward(query_ref, key_ref, value_ref, *refs, heads: Heads, scale: float, tokens: int, axis: int) -> None:
    bias_ref, out_ref = refs if len(refs) == 2 else (None, *refs)
    out = None
    for head in range(heads.heads):
        window = heads.window(head)
        query = heads.only(valid_rows(query_ref[0, :, window], tokens, axis), head)
        powers, inverse = _softmax(query, key_ref[0, :, window], bias_ref, head, scale, tokens, axis)
        out = heads.merge(dot(powers.astype(value_ref.dtype), value_ref[0, :, window], NN) * inverse, out, head)
        if heads.last(head):
            out_ref[0, :, window] = out.astype(out_ref.dtype)


def _backward(query_ref, key_ref, value_ref, cotangent_ref, *refs, heads: Heads, scale: float, tokens: int) -> None:
    """Gradients by keys and values are summed over the blocks of query rows, in float32 scratch."""
    bias_ref, refs = (refs[0], refs[1:]) if len(refs) == 6 else (None, refs)
    d_query_ref, d_key_ref, d_value_ref, d_key_sum, d_value_sum = refs

    @pl.when(pl.program_id(_ROWS_LAST) == 0)
    def _():
        d_key_sum[...] = jnp.zeros_like(d_key_sum)
        d_value_sum[...] = jnp.zeros_like(d_value_sum)

    d_query = d_key = d_value = None
    for head in range(heads.heads):
        window = heads.window(head)
        query = heads.only(valid_rows(query_ref[0, :, window], tokens, _ROWS_LAST), head)
        cotangent = heads.only(valid_rows(cotangent_ref[0, :, window], tokens, _ROWS_LAST), head)
        key, value = key_ref[0, :, window], value_ref[0, :, window]
        powers, inverse = _softmax(query, key, bias_ref, head, scale, tokens, _ROWS_LAST)
        weights = powers * inverse
        d_logits = (_through_softmax(weights, cotangent, value) * scale).astype(query.dtype)
        d_query = heads.merge(dot(d_logits, key, NN), d_query, head)
        d_key = add(dot(d_logits, query, TN), d_key, heads.first(head))
        d_value = add(dot(weights.astype(query.dtype), cotangent, TN), d_value, heads.first(head))
        if heads.last(head):
            d_query_ref[0, :, window] = d_query.astype(d_query_ref.dtype)
            d_key_sum[:, window] += d_key
            d_value_sum[:, window] += d_value

    @pl.when(pl.program_id(_ROWS_LAST) == pl.num_programs(_ROWS_LAST) - 1)
    def _():
        d_key_ref[0] = d_key_sum[...].astype(d_key_ref.dtype)
        d_value_ref[0] = d_value_sum[...].astype(d_value_ref.dtype)


def _backward_of_bias(
    query_ref, key_ref, value_ref, cotangent_ref, bias_ref, d_bias_ref, *, heads: Heads, scale: float, tokens: int
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    for head in range(heads.heads):
        window = heads.window(head)
        query = heads.only(valid_rows(query_ref[0, :, window], tokens, _ROWS_SECOND), head)
        cotangent = heads.only(valid_rows(cotangent_ref[0, :, window], tokens, _ROWS_SECOND), head)
        powers, inverse = _softmax(query, key_ref[0, :, window], bias_ref, head, scale, tokens, _ROWS_SECOND)
        d_bias_ref[head] += _through_softmax(powers * inverse, cotangent, value_ref[0, :, window])


def _softmax(query, key, bias_ref, head: int, scale: float, tokens: int, axis: int) -> tuple[Array, Array]:
    """(exponentials [query rows, keys], the inverse of their sums)."""
    logits = dot(query, key, NT) * scale
    if bias_ref is not None:
        logits = logits + valid_rows(bias_ref[head], tokens, axis)
    powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return powers, 1.0 / jnp.sum(powers, axis=-1, keepdims=True)


def _through_softmax(weights: Array, cotangent: Array, value: Array) -> Array:
    """The gradient by the logits, [query rows, keys]."""
    d_weights = dot(cotangent, value, NT)
    return weights * (d_weights - jnp.sum(weights * d_weights, axis=-1, keepdims=True))


class _Blocks:
    """A grid over images, groups of heads and blocks of query rows, and the blocks of the arrays.

    A group is one 128-lane tile of `qkv` where heads fill tiles; otherwise all heads, with q, k and v split in HBM.

    Args:
      order: of the grid's dimensions.
    """

    def __init__(self, qkv: Array, heads: int, order: tuple[str, ...]):
        batch, tokens, width = qkv.shape
        dim = width // 3
        self.scale = (dim // heads) ** -0.5
        tiled = dim % LANES == 0 and LANES % (dim // heads) == 0
        self.group = Heads(heads * LANES // dim, LANES) if tiled else Heads(heads, dim)
        self.parts = (qkv,) * 3 if tiled else tuple(jnp.split(qkv, 3, axis=-1))
        self._order, self._groups = order, dim // self.group.dim
        self._tiled, self._tokens = tiled, tokens
        self._rows = min(ROWS, tokens)
        sizes = {"image": batch, "group": self._groups, "rows": pl.cdiv(tokens, self._rows)}
        self.grid = tuple(sizes[name] for name in order)

    def rows(self, part: int) -> pl.BlockSpec:
        """Query rows of q, k or v (part 0, 1, 2)."""
        offset = part * self._groups if self._tiled else 0
        return self._spec(self._rows, lambda image, group, rows: (image, rows, offset + group))

    def all(self, part: int) -> pl.BlockSpec:
        """All tokens of q, k or v."""
        offset = part * self._groups if self._tiled else 0
        return self._spec(self._tokens, lambda image, group, rows: (image, 0, offset + group))

    @property
    def result_rows(self) -> pl.BlockSpec:
        """Query rows of an array [batch, tokens, dim]."""
        return self._spec(self._rows, lambda image, group, rows: (image, rows, group))

    @property
    def result_all(self) -> pl.BlockSpec:
        """All tokens of an array [batch, tokens, dim]."""
        return self._spec(self._tokens, lambda image, group, rows: (image, 0, group))

    def shared(self, bias: Array | None) -> list[pl.BlockSpec]:
        """Query rows of the group's heads in the bias, if there is one."""
        shape = (self.group.heads, self._rows, self._tokens)
        return [] if bias is None else [pl.BlockSpec(shape, self._map(lambda image, group, rows: (group, rows, 0)))]

    def _spec(self, count: int, place: Callable[..., tuple]) -> pl.BlockSpec:
        return pl.BlockSpec((1, count, self.group.dim), self._map(place))

    def _map(self, place: Callable[..., tuple]) -> Callable[..., tuple]:
        return lambda *indices: place(**dict(zip(self._order, indices)))
