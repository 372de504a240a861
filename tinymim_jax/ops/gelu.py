"""The exact GELU."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.ops.platform import target


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x Phi(x)` by the error function, as torch computes it, in the dtype of `x`.

    Value and gradient are computed in float32: in bfloat16 the sum `1 + erf` would lose all digits of negative inputs.
    The backward pass keeps `x` alone and evaluates the error function again; float32 intermediates would take four
    times the memory. (jax.nn.gelu uses erfc, which is four times as slow on a CPU.)
    """
    if target() == "litert":
        return _NAMED(x, approximate="none")
    y = x.astype(jnp.float32)
    return (y * _phi(y)).astype(x.dtype)


def _phi(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The distribution function of the standard normal."""
    return 0.5 * (1.0 + jax.lax.erf(y * 0.5**0.5))


def _forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _backward(x: Array, cotangent: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    slope = _phi(y) + y * jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


# LiteRT's converter turns an operation of this name into its own GELU, and would turn the error function into a chain
# of polynomials, which takes a quarter longer for a whole ViT.
_NAMED = jax.lax.composite(lambda x, *, approximate: x * _phi(x), name="aten.gelu.default")

gelu.defvjp(_forward, _backward)
