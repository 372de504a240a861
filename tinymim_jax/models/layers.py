"""Linear layers and norms."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.switches import Switches
from tinymim_jax.ops.int8 import int8_product
from tinymim_jax.ops.layer_norm import EPS, layer_norm
from tinymim_jax.ops.placement import split_batch
from tinymim_jax.ops.platform import on_cpu
from tinymim_jax.ops.products import add_bias, linear_product


class Dense(nn.Module):
    """A linear layer: Xavier-uniform kernel, zero bias, computed in `dtype`.

    If its parameters have a "kernel_scale", the kernel is one of 8 bits (ops.int8), and so is the product.

    Attributes:
      into_kernel: the output goes into an attention kernel, see `ops.products.add_bias`.
    """

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    into_kernel: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch features"]:
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
        x = split_batch(x).astype(self.dtype)
        rows = x.reshape(-1, x.shape[-1]) if on_cpu() else x
        if self.has_variable("params", "kernel_scale"):
            product = int8_product(rows, kernel, self.get_variable("params", "kernel_scale"))
        else:
            product = linear_product(rows, kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            product = add_bias(product, bias) if self.into_kernel else product + bias.astype(self.dtype)
        return split_batch(product.reshape(*x.shape[:-1], self.features))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with float32 statistics; the output has `dtype`."""

    dtype: Any = jnp.float32
    eps: float = EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, eps=self.eps).astype(self.dtype)


class RmsNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis in float32; the output has `dtype`."""

    dtype: Any = jnp.float32
    eps: float = EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * inverse * scale).astype(self.dtype)


def make_norm(switches: Switches, dtype: Any) -> nn.Module:
    """The norm that an encoder with these switches uses everywhere."""
    return (RmsNorm if switches.norm == "rms" else LayerNorm)(dtype, switches.eps)
