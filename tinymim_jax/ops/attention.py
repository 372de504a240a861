"""The attention core: softmax in float32, products in the dtype that comes in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HeadFeatures = Float[Array, "batch tokens heads head_dim"]


def attention(q: HeadFeatures, k: HeadFeatures, v: HeadFeatures) -> HeadFeatures:
    """`softmax(q k^T / sqrt(head_dim)) v` for every head, [batch, tokens, heads, head_dim]."""
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * scale, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
