"""Linear layers with 8-bit weights and activations, for frozen networks: no gradient passes through them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

_LEVELS = 127  # of each sign; -128 is not used, so that both signs have the same step
_SMALLEST = 1e-30  # a row of zeros is divided by this instead of zero


def quantized_kernel(kernel: np.ndarray) -> tuple[Int8[np.ndarray, "dim features"], Float[np.ndarray, "features"]]:
    """(weights as integers, float32 factor of each output channel): `kernel` is about their product."""
    kernel = np.asarray(kernel, np.float32)
    scale = np.maximum(np.abs(kernel).max(axis=0), _SMALLEST) / _LEVELS
    return np.rint(kernel / scale).astype(np.int8), scale.astype(np.float32)


def int8_product(
    x: Float[Array, "*batch dim"], kernel: Int8[Array, "dim features"], scale: Float[Array, "features"]
) -> Float[Array, "*batch features"]:
    """`x @ (kernel * scale)` in the dtype of `x`, as a product of integers with sums in 32 bits.

    Activations are quantized when they come (dynamically): each row is divided by its own largest magnitude.
    """
    wide = x.astype(jnp.float32)
    step = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), _SMALLEST) / _LEVELS
    rows = jnp.round(wide / step).astype(jnp.int8)
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    product = jax.lax.dot_general(rows, kernel, dimensions, preferred_element_type=jnp.int32)
    return (product.astype(jnp.float32) * (step * scale)).astype(x.dtype)


def in_int8(layers: dict[str, Any], rest: Any) -> dict[str, Any]:
    """A tree of parameters whose linear layers (kernel [dim, features]) have 8-bit weights and a "kernel_scale".

    Args:
      layers: nested dicts of float arrays.
      rest: dtype of all other arrays.
    """
    made: dict[str, Any] = {}
    for name, leaf in layers.items():
        if isinstance(leaf, dict):
            made[name] = in_int8(leaf, rest)
        elif name == "kernel" and np.ndim(leaf) == 2:
            made["kernel"], made["kernel_scale"] = quantized_kernel(leaf)
        else:
            made[name] = np.asarray(leaf, rest)
    return made
