"""Attention as Pallas TPU kernels: `softmax(q k^T / sqrt(head_dim)) v` and its gradient, without a map in HBM.

At 197 tokens the whole map of a head, [tokens, tokens] in float32, fits into VMEM, so that no online softmax is needed.
Beyond `SHORT` tokens the kernels take blocks of query rows, with the keys and values of all tokens in VMEM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tinymim_jax.ops.kernels.tiles import LANES, NN, NT, ROWS, SHORT, TN, Heads, add, compiler_params, dot, valid_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fused_attention(
    qkv: Float[Array, "batch tokens three_dim"], heads: int, interpret: bool = False
) -> Float[Array, "batch tokens dim"]:
    """Multi-head attention from the output of the joint projection to the input of the output projection.

    Nothing is transposed or split in HBM. The backward pass keeps `qkv` alone and computes the map again.

    Args:
      qkv: columns ordered (q|k|v, head, channel), as the projection leaves them.
      heads: attention heads; they divide dim.
      interpret: run in Pallas' interpreter, on any device.
    """
    return _forward(qkv, heads, interpret)


def _forward(qkv: Array, heads: int, interpret: bool) -> Array:
    batch, tokens, width = qkv.shape
    dim = width // 3
    size = qkv.dtype.itemsize
    cost = pl.CostEstimate(
        flops=4 * batch * tokens**2 * dim,
        bytes_accessed=batch * tokens * 4 * dim * size,
        transcendentals=batch * heads * tokens**2,
    )
    if tokens <= SHORT:
        return _whole(_short_forward, (qkv,), dim, Heads(heads, dim), cost, "attention_forward", interpret)
    layout = _Blocks(qkv, heads)
    return pl.pallas_call(
        functools.partial(_long_forward, heads=layout.group, scale=layout.scale, tokens=tokens),
        grid=layout.grid,
        in_specs=[layout.rows(0), layout.all(1), layout.all(2)],
        out_specs=layout.result_rows,
        out_shape=jax.ShapeDtypeStruct((batch, tokens, dim), qkv.dtype),
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_forward_rows",
    )(*layout.parts)


def _saved(qkv: Array, heads: int, interpret: bool) -> tuple[Array, Array]:
    return _forward(qkv, heads, interpret), qkv


def _backward(heads: int, interpret: bool, qkv: Array, cotangent: Array) -> tuple[Array]:
    batch, tokens, width = qkv.shape
    dim = width // 3
    size = qkv.dtype.itemsize
    cost = pl.CostEstimate(
        flops=10 * batch * tokens**2 * dim,
        bytes_accessed=batch * tokens * 7 * dim * size,
        transcendentals=batch * heads * tokens**2,
    )
    if tokens <= SHORT:
        inputs = (qkv, cotangent)
        return (_whole(_short_backward, inputs, width, Heads(heads, dim), cost, "attention_backward", interpret),)
    layout = _Blocks(qkv, heads)
    shape = jax.ShapeDtypeStruct((batch, tokens, dim), qkv.dtype)
    gradients = pl.pallas_call(
        functools.partial(_long_backward, heads=layout.group, scale=layout.scale, tokens=tokens),
        grid=layout.grid,
        in_specs=[layout.rows(0), layout.all(1), layout.all(2), layout.result_rows],
        out_specs=[layout.result_rows, layout.result_all, layout.result_all],
        out_shape=[shape] * 3,
        scratch_shapes=[pltpu.VMEM((tokens, layout.group.dim), jnp.float32)] * 2,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_backward_rows",
    )(*layout.parts, cotangent)
    return (jnp.concatenate(gradients, axis=-1),)


fused_attention.defvjp(_saved, _backward)


def _whole(kernel, inputs: tuple[Array, ...], out_width: int, heads: Heads, cost, name: str, interpret: bool) -> Array:
    """One image a grid step, all of its tokens and heads at once."""
    batch, tokens, _ = inputs[0].shape

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, width), lambda i: (i, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, heads=heads, scale=heads.head_dim**-0.5),
        grid=(batch,),
        in_specs=[block(each.shape[-1]) for each in inputs],
        out_specs=block(out_width),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, out_width), inputs[0].dtype),
        compiler_params=compiler_params("parallel"),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*inputs)


def _short_forward(qkv_ref, out_ref, *, heads: Heads, scale: float) -> None:
    def logits(head: int) -> Array:
        query, key = (qkv_ref[0, :, heads.window(head, part)] for part in (0, 1))
        return dot(heads.only(query, head), key, NT) * scale  # [queries, keys]

    current: Any = logits(0)
    out = None
    for head in range(heads.heads):
        # The next head's product is issued before this head's softmax, so that the matrix unit has work meanwhile.
        ahead = logits(head + 1) if head + 1 < heads.heads else None
        powers = jnp.exp(current - jnp.max(current, axis=-1, keepdims=True))
        inverse = 1.0 / jnp.sum(powers, axis=-1, keepdims=True)
        value = qkv_ref[0, :, heads.window(head, 2)]
        # Dividing head_dim columns of the result is less work than dividing the map.
        out = heads.merge(dot(powers.astype(value.dtype), value, NN) * inverse, out, head)
        if heads.last(head):
            out_ref[0, :, heads.window(head)] = out.astype(out_ref.dtype)
        current = ahead


def _short_backward(qkv_ref, cotangent_ref, gradient_ref, *, heads: Heads, scale: float) -> None:
    """The map is [keys, queries]: reductions run over sublanes, and two of three gradients need no transposition."""

    def products(head: int) -> tuple[Array, Array, Array, Array]:
        query = heads.only(qkv_ref[0, :, heads.window(head, 0)], head)
        cotangent = heads.only(cotangent_ref[0, :, heads.window(head)], head)
        key, value = (qkv_ref[0, :, heads.window(head, part)] for part in (1, 2))
        return dot(key, query, NT) * scale, dot(value, cotangent, NT), query, cotangent

    d_query = d_key = d_value = None
    current: Any = products(0)
    for head in range(heads.heads):
        ahead = products(head + 1) if head + 1 < heads.heads else None
        logits, d_weights, query, cotangent = current
        powers = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
        weights = powers * (1.0 / jnp.sum(powers, axis=0, keepdims=True))
        mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        d_logits = (weights * (d_weights - mean) * scale).astype(query.dtype)
        weights = weights.astype(query.dtype)
        d_query = heads.merge(dot(d_logits, qkv_ref[0, :, heads.window(head, 1)], TN), d_query, head)
        # query and cotangent are zero in the lanes of other heads, so these two simply add up over a window.
        d_key = add(dot(d_logits, query, NN), d_key, heads.first(head))
        d_value = add(dot(weights, cotangent, NN), d_value, heads.first(head))
        if heads.last(head):
            for part, gradient in enumerate((d_query, d_key, d_value)):
                gradient_ref[0, :, heads.window(head, part)] = gradient.astype(gradient_ref.dtype)
        current = ahead


def _long_forward(query_ref, key_ref, value_ref, out_ref, *, heads: Heads, scale: float, tokens: int) -> None:
    out = None
    for head in range(heads.heads):
        window = heads.window(head)
        query = heads.only(valid_rows(query_ref[0, :, window], tokens), head)
        logits = dot(query, key_ref[0, :, window], NT) * scale  # [query rows, keys]
        powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        inverse = 1.0 / jnp.sum(powers, axis=-1, keepdims=True)
        out = heads.merge(dot(powers.astype(value_ref.dtype), value_ref[0, :, window], NN) * inverse, out, head)
        if heads.last(head):
            out_ref[0, :, window] = out.astype(out_ref.dtype)


def _long_backward(
    query_ref, key_ref, value_ref, cotangent_ref, d_query_ref, d_key_ref, d_value_ref, d_key_sum, d_value_sum, *,
    heads: Heads, scale: float, tokens: int,
) -> None:  # fmt: skip
    """Gradients by keys and values are summed over the blocks of query rows, in float32 scratch."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_key_sum[...] = jnp.zeros_like(d_key_sum)
        d_value_sum[...] = jnp.zeros_like(d_value_sum)

    d_query = d_key = d_value = None
    for head in range(heads.heads):
        window = heads.window(head)
        query = heads.only(valid_rows(query_ref[0, :, window], tokens), head)
        cotangent = heads.only(valid_rows(cotangent_ref[0, :, window], tokens), head)
        key, value = key_ref[0, :, window], value_ref[0, :, window]
        logits = dot(query, key, NT) * scale  # [query rows, keys]
        powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        weights = powers * (1.0 / jnp.sum(powers, axis=-1, keepdims=True))
        d_weights = dot(cotangent, value, NT)
        mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_logits = (weights * (d_weights - mean) * scale).astype(query.dtype)
        d_query = heads.merge(dot(d_logits, key, NN), d_query, head)
        d_key = add(dot(d_logits, query, TN), d_key, heads.first(head))
        d_value = add(dot(weights.astype(query.dtype), cotangent, TN), d_value, heads.first(head))
        if heads.last(head):
            d_query_ref[0, :, window] = d_query.astype(d_query_ref.dtype)
            d_key_sum[:, window] += d_key
            d_value_sum[:, window] += d_value

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_key_ref[0] = d_key_sum[...].astype(d_key_ref.dtype)
        d_value_ref[0] = d_value_sum[...].astype(d_value_ref.dtype)


class _Blocks:
    """The grid (image, group of heads, block of query rows) and its blocks.

    A group is one 128-lane tile of `qkv` where heads fill tiles; otherwise all heads, with q, k and v split in HBM.
    """

    def __init__(self, qkv: Array, heads: int):
        batch, tokens, width = qkv.shape
        dim = width // 3
        self.scale = (dim // heads) ** -0.5
        tiled = dim % LANES == 0 and LANES % (dim // heads) == 0
        self.group = Heads(heads * LANES // dim, LANES) if tiled else Heads(heads, dim)
        self.parts = (qkv,) * 3 if tiled else tuple(jnp.split(qkv, 3, axis=-1))
        self._groups = dim // self.group.dim
        self._tiled, self._tokens = tiled, tokens
        self._rows = min(ROWS, tokens)
        self.grid = (batch, self._groups, pl.cdiv(tokens, self._rows))

    def rows(self, part: int) -> pl.BlockSpec:
        """Query rows of q, k or v (part 0, 1, 2)."""
        offset = part * self._groups if self._tiled else 0
        return pl.BlockSpec((1, self._rows, self.group.dim), lambda i, j, r: (i, r, offset + j))

    def all(self, part: int) -> pl.BlockSpec:
        """All tokens of q, k or v."""
        offset = part * self._groups if self._tiled else 0
        return pl.BlockSpec((1, self._tokens, self.group.dim), lambda i, j, r: (i, 0, offset + j))

    @property
    def result_rows(self) -> pl.BlockSpec:
        """Query rows of an array [batch, tokens, dim]."""
        return pl.BlockSpec((1, self._rows, self.group.dim), lambda i, j, r: (i, r, j))

    @property
    def result_all(self) -> pl.BlockSpec:
        """All tokens of an array [batch, tokens, dim]."""
        return pl.BlockSpec((1, self._tokens, self.group.dim), lambda i, j, r: (i, 0, j))
