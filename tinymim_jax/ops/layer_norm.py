"""LayerNorm over the last axis with float32 statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.ops.platform import on_cpu

# The value of timm and of the authors' code; it is neither torch's nor flax's default.
EPS = 1e-6

Features = Float[Array, "*batch dim"]
Vector = Float[Array | np.ndarray, "dim"]


def layer_norm(x: Features, scale: Vector, bias: Vector, *, eps: float = EPS) -> Float[Array, "*batch dim"]:
    """`(x - mean) / sqrt(variance + eps) * scale + bias`, float32 whatever the dtype of `x`."""
    x = x.astype(jnp.float32)
    return layer_norm_for_cpu(x, scale, bias, eps) if on_cpu() else _forward(x, scale, bias, eps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm_for_cpu(x: Features, scale: Vector, bias: Vector, eps: float = EPS) -> Float[Array, "*batch dim"]:
    """The same for a float32 `x`, with a custom gradient."""
    return _forward(x, scale, bias, eps)[0]


def _forward(x: Features, scale: Vector, bias: Vector, eps: float) -> tuple[Array, tuple]:
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    return (x - mean) * (inverse * scale) + bias, (x, mean, inverse, scale)


def _backward(eps: float, saved: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    del eps
    x, mean, inverse, scale = saved
    normed = (x - mean) * inverse
    leading = tuple(range(x.ndim - 1))
    inner = cotangent * scale
    d_x = inner - inner.mean(-1, keepdims=True) - normed * (inner * normed).mean(-1, keepdims=True)
    return d_x * inverse, (cotangent * normed).sum(leading), cotangent.sum(leading)


layer_norm_for_cpu.defvjp(_forward, _backward)
