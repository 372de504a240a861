"""The attention core: softmax in float32, products in the dtype that comes in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinymim_jax.ops.platform import on_cpu
from tinymim_jax.ops.products import HeadFeatures, scaled_products


def attention(q: HeadFeatures, k: HeadFeatures, v: HeadFeatures) -> HeadFeatures:
    """`softmax(q k^T / sqrt(head_dim)) v` for every head, [batch, tokens, heads, head_dim]."""
    if on_cpu():
        return attention_for_cpu(q, k, v)
    weights = jax.nn.softmax(scaled_products(q, k), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@jax.custom_vjp
def attention_for_cpu(q: HeadFeatures, k: HeadFeatures, v: HeadFeatures) -> HeadFeatures:
    """The same with a gradient written out, and barriers that keep the exponentials from being computed again."""
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    logits = scaled_products(q, k)
    powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    powers = jax.lax.optimization_barrier(powers)  # [batch, heads, queries, keys]
    # Dividing the head_dim columns of the result is less work than dividing all the keys.
    inverse = (1.0 / jnp.sum(powers, axis=-1)).transpose(0, 2, 1)[..., None]  # [batch, queries, heads, 1]
    powers = powers.astype(v.dtype)
    product = jnp.einsum("bhqk,bkhd->bqhd", powers, v, preferred_element_type=jnp.float32)
    output = (product * inverse).astype(v.dtype)
    return output, (q, k, v, powers, inverse, output)


def _backward(saved: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    q, k, v, powers, inverse, output = saved
    scaled = cotangent.astype(jnp.float32) * inverse
    # The softmax's gradient subtracts each query's mean, which is the dot product of output and cotangent.
    mean = jnp.sum(scaled * output.astype(jnp.float32), axis=-1).transpose(0, 2, 1)[..., None]
    scaled = scaled.astype(v.dtype)
    d_v = jnp.einsum("bhqk,bqhd->bkhd", powers, scaled)
    d_weights = jnp.einsum("bqhd,bkhd->bhqk", scaled, v, preferred_element_type=jnp.float32)
    d_logits = powers.astype(jnp.float32) * (d_weights - mean) * q.shape[-1] ** -0.5
    d_logits = jax.lax.optimization_barrier(d_logits.astype(v.dtype))
    d_q = jnp.einsum("bhqk,bkhd->bqhd", d_logits, k)
    d_k = jnp.einsum("bhqk,bqhd->bkhd", d_logits, q)
    return d_q, d_k, d_v


attention_for_cpu.defvjp(_forward, _backward)
