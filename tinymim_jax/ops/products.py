"""Products of every token with every other, head by head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HeadFeatures = Float[Array, "batch tokens heads head_dim"]
Logits = Float[Array, "batch heads queries keys"]


@jax.custom_vjp
def scaled_products(left: HeadFeatures, right: HeadFeatures) -> Logits:
    """`left . right / sqrt(head_dim)`, float32 [batch, heads, tokens, tokens].

    The gradient's products are of the operands' dtype, as they are under PyTorch's autocast. jax's own rule would
    multiply by the float32 cotangent: with bfloat16 operands, float32 products over all pairs of tokens.
    """
    return jnp.einsum("bqhd,bkhd->bhqk", left, right, preferred_element_type=jnp.float32) * left.shape[-1] ** -0.5


def _forward(left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    return scaled_products(left, right), (left, right)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    left, right = saved
    cotangent = (cotangent * left.shape[-1] ** -0.5).astype(left.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", cotangent, right), jnp.einsum("bhqk,bqhd->bkhd", cotangent, left)


scaled_products.defvjp(_forward, _backward)
