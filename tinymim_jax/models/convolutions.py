"""Convolutions and batch norm for feature maps `[batch, rows, columns, channels]`."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.ops.batch_norm import batch_moments, batch_norm, update_running_stats
from tinymim_jax.ops.placement import split_batch
from tinymim_jax.ops.products import full_precision

STATISTICS = "batch_stats"
"""The collection of the running statistics of batch norm."""

BATCH_NORM_EPS = 1e-5

Maps = Float[Array, "batch rows columns channels"]


class BatchNorm(nn.Module):
    """torch's BatchNorm2d: eps 1e-5, statistics over the whole batch in training, running statistics otherwise.

    In training the collection STATISTICS must be mutable; it then holds the statistics for the next step.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, *, train: bool) -> Maps:
        dim = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, dim)
        bias = self.param("bias", nn.initializers.zeros, dim)
        mean = self.variable(STATISTICS, "mean", jnp.zeros, dim)
        variance = self.variable(STATISTICS, "variance", jnp.ones, dim)
        moments = mean.value, variance.value
        if train:
            moments = batch_moments(x)
            running = {"mean": mean.value, "variance": variance.value}
            new = update_running_stats(running, *moments, count=math.prod(x.shape[:-1]))
            mean.value, variance.value = new["mean"], new["variance"]
        return (batch_norm(x, *moments, eps=BATCH_NORM_EPS) * scale + bias).astype(self.dtype)


class Conv(nn.Module):
    """A square convolution that keeps the grid, or halves it with stride 2; zeros on both sides, as torch pads.

    Attributes:
      features: output channels.
      size: rows and columns of the kernel, an odd number.
      start: initializer of the kernel.
    """

    features: int
    size: int
    stride: int = 1
    use_bias: bool = False
    start: Any = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "batch new_rows new_columns features"]:
        kernel = self.param("kernel", self.start, (self.size, self.size, x.shape[-1], self.features))
        x, kernel = split_batch(x).astype(self.dtype), kernel.astype(self.dtype)
        precision, half = full_precision(self.dtype), self.size // 2
        if self.size == 1:
            y = jnp.matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0], precision=precision)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                ((half, half), (half, half)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return split_batch(y)


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU: mmcv's ConvModule."""

    features: int
    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, *, train: bool) -> Float[Array, "batch rows columns features"]:
        x = Conv(self.features, self.size, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(self.dtype, name="norm")(x, train=train))


def _torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """torch's own start of a transposed convolution and its bias: uniform within 1 / sqrt(4 output channels)."""
    bound = (4 * shape[-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Upsample(nn.Module):
    """Doubles the grid: torch's ConvTranspose2d with a 2 x 2 kernel and stride 2, whose outputs do not overlap.

    The kernel is [inputs, 2, 2, features]: what each input adds to the 2 x 2 outputs in its place.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "batch double_rows double_columns features"]:
        kernel = self.param("kernel", _torch_uniform, (x.shape[-1], 2, 2, self.features))
        bias = self.param("bias", _torch_uniform, (self.features,))
        x, kernel = split_batch(x).astype(self.dtype), kernel.astype(self.dtype)
        batch, rows, columns, _ = x.shape
        cells = jnp.einsum("brci,ihwo->brhcwo", x, kernel, precision=full_precision(self.dtype))
        y = cells.reshape(batch, 2 * rows, 2 * columns, self.features) + bias.astype(self.dtype)
        return split_batch(y)


class ChannelDropout(nn.Module):
    """torch's Dropout2d: whole channels of an image are set to 0 with probability `rate`, the others scaled up."""

    rate: float

    def __call__(self, x: Maps, key: jax.Array | None) -> Maps:
        """`key`: None leaves `x` as it is."""
        if key is None or not self.rate:
            return x
        kept = jax.random.uniform(key, (x.shape[0], 1, 1, x.shape[3])) >= self.rate
        return x * (kept / (1 - self.rate)).astype(x.dtype)


class PixelClassifier(nn.Module):
    """Dropout and a 1 x 1 convolution: float32 logits of every place, as mmseg's `cls_seg`."""

    classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: Maps, key: jax.Array | None) -> Float[Array, "batch rows columns classes"]:
        x = ChannelDropout(self.dropout)(x.astype(jnp.float32), key)
        return Conv(self.classes, 1, use_bias=True, start=nn.initializers.normal(0.01), name="conv")(x)
