"""Products of all pairs of tokens in each head, and the precision of matrix products."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.ops.platform import target

HeadFeatures = Float[Array, "batch tokens heads head_dim"]
Logits = Float[Array, "batch heads queries keys"]


def full_precision(dtype: Any) -> jax.lax.Precision | None:
    """The `precision` of a product of operands of this dtype: float32 means float32 on every device.

    By default TPUs multiply float32 operands as bfloat16, and GPUs as TF32. Products of bfloat16 are not affected.
    LiteRT's converter knows no precision; its float32 is float32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 and target() != "litert" else None


@jax.custom_vjp
def scaled_products(left: HeadFeatures, right: HeadFeatures) -> Logits:
    """`left . right / sqrt(head_dim)`, float32 [batch, heads, tokens, tokens].

    The gradient's products are of the operands' dtype, as they are under PyTorch's autocast. jax's own rule would
    multiply by the float32 cotangent: with bfloat16 operands, float32 products over all pairs of tokens.
    """
    precision = full_precision(left.dtype)
    products = jnp.einsum("bqhd,bkhd->bhqk", left, right, precision=precision, preferred_element_type=jnp.float32)
    return products * left.shape[-1] ** -0.5


def _forward(left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    return scaled_products(left, right), (left, right)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    left, right = saved
    cotangent = (cotangent * left.shape[-1] ** -0.5).astype(left.dtype)
    precision = full_precision(left.dtype)
    by_left = jnp.einsum("bhqk,bkhd->bqhd", cotangent, right, precision=precision)
    return by_left, jnp.einsum("bhqk,bqhd->bkhd", cotangent, left, precision=precision)


scaled_products.defvjp(_forward, _backward)
