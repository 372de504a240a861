"""Attention as Pallas TPU kernels: `softmax(q k^T / sqrt(head_dim) + bias) v` and its gradient, without a map in HBM.

At 197 tokens the whole map of a head, [tokens, tokens] in float32, fits into VMEM, so that no online softmax is needed.
Larger maps are computed in blocks of query rows (`attention_rows`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tinymim_jax.ops.kernels.attention_rows import backward_by_rows, forward_by_rows
from tinymim_jax.ops.kernels.tiles import NN, NT, SHORT, TN, Heads, add, compiler_params, dot, padded_bytes

# A bias and its gradient for all heads, each twice for overlapping copies, should leave most of VMEM to the rest.
_BIAS_BYTES = 6 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused_attention(
    qkv: Float[Array, "batch tokens three_dim"],
    bias: Float[Array, "heads tokens tokens"] | None,
    heads: int,
    interpret: bool = False,
) -> Float[Array, "batch tokens dim"]:
    """Multi-head attention from the output of the joint projection to the input of the output projection.

    Nothing is transposed or split in HBM. The backward pass keeps `qkv` and `bias` alone and computes the map again.

    Args:
      qkv: columns ordered (q|k|v, head, channel), as the projection leaves them.
      bias: float32, added to the logits of every image; None for none.
      heads: attention heads; they divide dim.
      interpret: run in Pallas' interpreter, on any device.
    """
    return _forward(qkv, bias, heads, interpret)


def _forward(qkv: Array, bias: Array | None, heads: int, interpret: bool) -> Array:
    batch, tokens, width = qkv.shape
    dim = width // 3
    cost = _cost(qkv, bias, heads, products=2, arrays=4)
    if not _is_short(bias, tokens):
        return forward_by_rows(qkv, bias, heads, cost, interpret)
    return pl.pallas_call(
        functools.partial(_short_forward, heads=Heads(heads, dim), scale=(dim // heads) ** -0.5),
        grid=(batch,),
        in_specs=[_image(tokens, width), *_shared(bias)],
        out_specs=_image(tokens, dim),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, dim), qkv.dtype),
        compiler_params=compiler_params("parallel"),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_forward",
    )(qkv, *(() if bias is None else (bias,)))


def _saved(qkv: Array, bias: Array | None, heads: int, interpret: bool) -> tuple[Array, tuple]:
    return _forward(qkv, bias, heads, interpret), (qkv, bias)


def _backward(heads: int, interpret: bool, saved: tuple, cotangent: Array) -> tuple[Array, Array | None]:
    qkv, bias = saved
    batch, tokens, width = qkv.shape
    dim = width // 3
    cost = _cost(qkv, bias, heads, products=5, arrays=7)
    if not _is_short(bias, tokens):
        return backward_by_rows(qkv, bias, cotangent, heads, cost, interpret)
    kernel = functools.partial(_short_backward, heads=Heads(heads, dim), scale=(dim // heads) ** -0.5)
    gradient = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
    if bias is None:
        call = functools.partial(pl.pallas_call, out_specs=_image(tokens, width), out_shape=gradient)
        semantics, inputs = "parallel", (qkv, cotangent)
    else:
        # The gradient by the bias is a sum over images: they run one after another, and it stays in VMEM.
        shape = jax.ShapeDtypeStruct(bias.shape, jnp.float32)
        call = functools.partial(
            pl.pallas_call, out_specs=[_image(tokens, width), *_shared(bias)], out_shape=[gradient, shape]
        )
        semantics, inputs = "arbitrary", (qkv, cotangent, bias.swapaxes(1, 2))
    found = call(
        kernel,
        grid=(batch,),
        in_specs=[_image(tokens, width), _image(tokens, dim), *_shared(bias)],
        compiler_params=compiler_params(semantics),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_backward",
    )(*inputs)
    return (found, None) if bias is None else (found[0], found[1].swapaxes(1, 2).astype(bias.dtype))


fused_attention.defvjp(_saved, _backward)


def _is_short(bias: Array | None, tokens: int) -> bool:
    return tokens <= SHORT and (bias is None or padded_bytes(bias.shape) <= _BIAS_BYTES)


def _cost(qkv: Array, bias: Array | None, heads: int, *, products: int, arrays: int) -> pl.CostEstimate:
    """For this many products of a map with features, and this many arrays [batch, tokens, dim] read or written."""
    batch, tokens, width = qkv.shape
    dim = width // 3
    return pl.CostEstimate(
        flops=2 * products * batch * tokens**2 * dim,
        bytes_accessed=arrays * batch * tokens * dim * qkv.dtype.itemsize + (0 if bias is None else 8 * bias.size),
        transcendentals=batch * heads * tokens**2,
    )


def _image(tokens: int, width: int) -> pl.BlockSpec:
    """All of one image, by the only grid dimension."""
    return pl.BlockSpec((1, tokens, width), lambda i: (i, 0, 0))


def _shared(bias: Array | None) -> list[pl.BlockSpec]:
    """All of the bias, for every image."""
    return [] if bias is None else [pl.BlockSpec(bias.shape, lambda i: (0, 0, 0))]


def _short_forward(qkv_ref, *refs, heads: Heads, scale: float) -> None:
    bias_ref, out_ref = refs if len(refs) == 2 else (None, *refs)

    def logits(head: int) -> Array:
        query, key = (qkv_ref[0, :, heads.window(head, part)] for part in (0, 1))
        products = dot(heads.only(query, head), key, NT) * scale  # [queries, keys]
        return products if bias_ref is None else products + bias_ref[head]

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


def _short_backward(qkv_ref, cotangent_ref, *refs, heads: Heads, scale: float) -> None:
    """The map is [keys, queries]: reductions run over sublanes, and two of three gradients need no transposition."""
    bias_ref, gradient_ref, d_bias_ref = refs if len(refs) == 3 else (None, *refs, None)
    if d_bias_ref is not None:

        @pl.when(pl.program_id(0) == 0)
        def _():
            d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    def products(head: int) -> tuple[Array, Array, Array, Array]:
        query = heads.only(qkv_ref[0, :, heads.window(head, 0)], head)
        cotangent = heads.only(cotangent_ref[0, :, heads.window(head)], head)
        key, value = (qkv_ref[0, :, heads.window(head, part)] for part in (1, 2))
        logits = dot(key, query, NT) * scale
        if bias_ref is not None:
            logits = logits + bias_ref[head]
        return logits, dot(value, cotangent, NT), query, cotangent

    d_query = d_key = d_value = None
    current: Any = products(0)
    for head in range(heads.heads):
        ahead = products(head + 1) if head + 1 < heads.heads else None
        logits, d_weights, query, cotangent = current
        powers = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
        weights = powers * (1.0 / jnp.sum(powers, axis=0, keepdims=True))
        mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        exact = weights * (d_weights - mean)
        if d_bias_ref is not None:
            d_bias_ref[head] += exact
        d_logits = (exact * scale).astype(query.dtype)
        weights = weights.astype(query.dtype)
        d_query = heads.merge(dot(d_logits, qkv_ref[0, :, heads.window(head, 1)], TN), d_query, head)
        # query and cotangent are zero in the lanes of other heads, so these two simply add up over a window.
        d_key = add(dot(d_logits, query, NN), d_key, heads.first(head))
        d_value = add(dot(weights, cotangent, NN), d_value, heads.first(head))
        if heads.last(head):
            for part, gradient in enumerate((d_query, d_key, d_value)):
                gradient_ref[0, :, heads.window(head, part)] = gradient.astype(gradient_ref.dtype)
        current = ahead
