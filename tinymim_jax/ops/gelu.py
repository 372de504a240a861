"""The exact GELU."""

import jax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x Phi(x)` by the error function, as torch computes it; jax.nn.gelu takes erfc, four times as slow on a CPU."""
    return x * (0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5)))
