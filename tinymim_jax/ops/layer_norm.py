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
    if on_cpu():
        return layer_norm_for_cpu(x.astype(jnp.float32), scale, bias, eps)
    if x.dtype == jnp.bfloat16:
        return layer_norm_of_bfloat16(x, scale, bias, eps)
    return _forward(x.astype(jnp.float32), scale, bias, eps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm_for_cpu(x: Features, scale: Vector, bias: Vector, eps: float = EPS) -> Float[Array, "*batch dim"]:
    """layer_norm for a float32 `x` on CPUs, with a custom gradient."""
    return _forward(x, scale, bias, eps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm_of_bfloat16(x: Features, scale: Vector, bias: Vector, eps: float = EPS) -> Float[Array, "*batch dim"]:
    """layer_norm for a bfloat16 `x` on accelerators, in one pass, keeping no float32 array of the size of `x`.

    The variance is E[x^2] - E[x]^2. Where the mean is 2^8 times the standard deviation, float32 loses 2^16 of 2^24 in
    that difference, a relative error of 0.4 %; but there x has lost all digits of its deviations in bfloat16 before.
    The backward pass keeps `x` in bfloat16 and two numbers of each row.
    """
    return _forward_in_one_pass(x, scale, bias, eps)[0]


def _forward(x: Features, scale: Vector, bias: Vector, eps: float) -> tuple[Array, tuple]:
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    return (x - mean) * (inverse * scale) + bias, (x, mean, inverse, scale)


def _forward_in_one_pass(x: Features, scale: Vector, bias: Vector, eps: float) -> tuple[Array, tuple]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    inverse = jax.lax.rsqrt(variance + eps)
    return (wide - mean) * (inverse * scale) + bias, (x, mean, inverse, scale)


def _backward(eps: float, saved: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    del eps
    x, mean, inverse, scale = saved
    normed = (x.astype(jnp.float32) - mean) * inverse
    leading = tuple(range(x.ndim - 1))
    inner = cotangent * scale
    d_x = inner - inner.mean(-1, keepdims=True) - normed * (inner * normed).mean(-1, keepdims=True)
    d_scale, d_bias = (cotangent * normed).sum(leading), cotangent.sum(leading)
    return (d_x * inverse).astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


layer_norm_for_cpu.defvjp(_forward, _backward)
layer_norm_of_bfloat16.defvjp(_forward_in_one_pass, _backward)
