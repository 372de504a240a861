"""The attention core: softmax in float32, products in the dtype that comes in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinymim_jax.ops.platform import on_cpu
from tinymim_jax.ops.products import HeadFeatures, full_precision, scaled_products


def attention(q: HeadFeatures, k: HeadFeatures, v: HeadFeatures) -> HeadFeatures:
    """`softmax(q k^T / sqrt(head_dim)) v` for every head, [batch, tokens, heads, head_dim]."""
    if on_cpu():
        return attention_for_cpu(q, k, v)
    weights = jax.nn.softmax(scaled_products(q, k), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=full_precision(v.dtype))


@jax.custom_vjp
def attention_for_cpu(q: HeadFeatures, k: HeadFeatures, v: HeadFeatures) -> HeadFeatures:
    """The same with a gradient written out, and barriers that keep the exponentials from being computed again.

    The products have the heads in front of the tokens: across that order XLA's for CPUs take up to twice as long.
    """
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    q, k, v = (_swap(x) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    powers = jax.lax.optimization_barrier(powers)  # [batch, heads, queries, keys]
    # Dividing the head_dim columns of the result is less work than dividing all the keys.
    inverse = 1.0 / jnp.sum(powers, axis=-1, keepdims=True)  # [batch, heads, queries, 1]
    powers = powers.astype(v.dtype)
    product = jnp.einsum("bhqk,bhkd->bhqd", powers, v, preferred_element_type=jnp.float32)
    output = (product * inverse).astype(v.dtype)
    return _swap(output), (q, k, v, powers, inverse, output)


def _backward(saved: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    q, k, v, powers, inverse, output = saved
    scaled = _swap(cotangent).astype(jnp.float32) * inverse
    # The softmax's gradient subtracts each query's mean, which is the dot product of output and cotangent.
    mean = jnp.sum(scaled * output.astype(jnp.float32), axis=-1, keepdims=True)
    scaled = scaled.astype(v.dtype)
    d_v = jnp.einsum("bhqk,bhqd->bhkd", powers, scaled)
    d_weights = jnp.einsum("bhqd,bhkd->bhqk", scaled, v, preferred_element_type=jnp.float32)
    d_logits = powers.astype(jnp.float32) * (d_weights - mean) * q.shape[-1] ** -0.5
    d_logits = jax.lax.optimization_barrier(d_logits.astype(v.dtype))
    d_q = jnp.einsum("bhqk,bhkd->bhqd", d_logits, k)
    d_k = jnp.einsum("bhqk,bhqd->bhkd", d_logits, q)
    return _swap(d_q), _swap(d_k), _swap(d_v)


def _swap(x: Array) -> Array:
    """[batch, tokens, heads, head_dim] to [batch, heads, tokens, head_dim], and back."""
    return jnp.swapaxes(x, 1, 2)


attention_for_cpu.defvjp(_forward, _backward)
