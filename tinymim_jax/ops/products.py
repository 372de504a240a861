"""Products of all pairs of tokens in each head, and the precision of matrix products."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.ops.platform import on_cpu, target

HeadFeatures = Float[Array, "batch tokens heads head_dim"]
Logits = Float[Array, "batch heads queries keys"]


def full_precision(dtype: Any) -> jax.lax.Precision | None:
    """The `precision` of a product of operands of this dtype: float32 means float32 on every device.

    By default TPUs multiply float32 operands as bfloat16, and GPUs as TF32. Products of bfloat16 are not affected.
    LiteRT's converter knows no precision; its float32 is float32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 and target() != "litert" else None


def linear_product(
    rows: Float[Array | np.ndarray, "*batch dim"], kernel: Float[Array | np.ndarray, "dim features"]
) -> Float[Array, "*batch features"]:
    """`rows @ kernel` in the dtype of both."""
    if on_cpu() and rows.dtype == jnp.bfloat16:
        return linear_product_for_cpu(rows, kernel)
    return jnp.matmul(rows, kernel, precision=full_precision(rows.dtype))


@jax.custom_vjp
def linear_product_for_cpu(
    rows: Float[Array | np.ndarray, "*batch dim"], kernel: Float[Array | np.ndarray, "dim features"]
) -> Float[Array, "*batch features"]:
    """linear_product for bfloat16, rounded after the product.

    XLA's CPU compiler has fast products of bfloat16 with a float32 result only. For others it converts the operands to
    float32 first, and so does a gradient of mixed dtypes, hence the gradient of its own. The rounding is the same.
    """
    return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32).astype(rows.dtype)


def _linear_forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear_product_for_cpu(rows, kernel), (rows, kernel)


def _linear_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    rows, kernel = saved
    by_rows = jnp.einsum("...f,df->...d", cotangent, kernel, preferred_element_type=jnp.float32)
    by_kernel = jnp.einsum("...d,...f->df", rows, cotangent, preferred_element_type=jnp.float32)
    return by_rows.astype(rows.dtype), by_kernel.astype(kernel.dtype)


linear_product_for_cpu.defvjp(_linear_forward, _linear_backward)


def add_bias(x: Float[Array, "*batch dim"], bias: Float[Array | np.ndarray, "dim"]) -> Float[Array, "*batch dim"]:
    """`x + bias` in the dtype of `x`."""
    if target() == "tpu" and x.dtype == jnp.bfloat16 and bias.dtype == jnp.float32:
        return add_bias_for_tpu(x, jnp.asarray(bias))
    return x + bias.astype(x.dtype)


@jax.custom_vjp
def add_bias_for_tpu(x: Float[Array, "*batch dim"], bias: Float[Array, "dim"]) -> Float[Array, "*batch dim"]:
    """The same with the gradient by `bias` as a matrix product of ones with the cotangent, in float32.

    Only worth it where the cotangent comes out of a kernel: the TPU compiler cannot fuse its sum over batch and tokens
    with anything then, takes five times as long for it by its own estimate, and rounds it to bfloat16.
    """
    return x + bias.astype(x.dtype)


def _add_bias(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias_for_tpu(x, bias), None


def _bias_gradient(_: None, cotangent: Array) -> tuple[Array, Array]:
    leading = cotangent.shape[:-1]
    # Eight equal rows fill a tile; a product with a single row would be turned into a sum again.
    ones, axes = jnp.ones((8, *leading), cotangent.dtype), range(len(leading))
    dimensions = ((tuple(axis + 1 for axis in axes), tuple(axes)), ((), ()))
    return cotangent, jax.lax.dot_general(ones, cotangent, dimensions, preferred_element_type=jnp.float32)[0]


add_bias_for_tpu.defvjp(_add_bias, _bias_gradient)


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
