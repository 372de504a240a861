"""Decoders without a pyramid, on maps at stride 16: a linear one, a light one of ours, and a mask transformer."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.blocks import Block
from tinymim_jax.models.convolutions import BatchNorm, ChannelDropout, ConvNormRelu, PixelClassifier, Upsample
from tinymim_jax.models.layers import Dense, LayerNorm
from tinymim_jax.ops.gelu import gelu

MASK_BLOCKS = 2  # of MaskHead, as published
_HEAD_DIM = 64
UNIT_EPS = 1e-12

Maps = Float[Array, "batch rows columns channels"]
Logits = Float[Array, "batch new_rows new_columns classes"]


class LinearHead(nn.Module):
    """Batch norm and a 1 x 1 convolution on the grid of the patches, as DINOv2 and DINOv3 are compared by.

    Several maps are concatenated along their channels.
    """

    classes: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, maps: Sequence[Maps], *, train: bool, drop_key: jax.Array | None = None) -> Logits:
        """float32."""
        x = BatchNorm(name="norm")(jnp.concatenate(maps, axis=-1), train=train)
        return PixelClassifier(self.classes, self.dropout, name="classifier")(x, drop_key)


class LightHead(nn.Module):
    """Ours: the maps are projected to `channels` and fused at stride 16, then brought to stride 4.

    The fusion is that of SegFormer's decoder (arXiv 2105.15203), at the stride of the patches, where it costs a
    sixteenth; two transposed convolutions with a batch norm between them follow, as in the published pyramid.
    """

    classes: int
    channels: int = 256
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Maps], *, train: bool, drop_key: jax.Array | None = None) -> Logits:
        """float32."""

        def conv(name: str, size: int) -> ConvNormRelu:
            return ConvNormRelu(self.channels, size, self.dtype, name=name)

        projected = [conv(f"project_{i}", 1)(each, train=train) for i, each in enumerate(maps)]
        x = conv("fuse", 1)(jnp.concatenate(projected, axis=-1), train=train)
        x = conv("mix", 3)(x, train=train)
        x = Upsample(self.channels // 2, self.dtype, name="up_first")(x)
        x = gelu(BatchNorm(self.dtype, name="up_norm")(x, train=train))
        x = Upsample(self.channels // 2, self.dtype, name="up_second")(x)
        x = nn.relu(BatchNorm(self.dtype, name="last_norm")(x, train=train))
        return PixelClassifier(self.classes, self.dropout, name="classifier")(x, drop_key)


class MaskHead(nn.Module):
    """The mask transformer of Segmenter (arXiv 2105.05633, decoder.py): a token of each class among the patches.

    Two blocks see the patches and the tokens of the classes together. The logit of a class at a patch is the cosine
    between both, each behind a linear layer, normalized over the classes. There is no batch norm.

    It differs from theirs in three ways: norms add 1e-6 to the variance as the encoder's do (theirs 1e-5), dropout is
    of channels behind the blocks (theirs in the blocks), and there is no drop path in the blocks.

    Attributes:
      channels: width of the blocks: a multiple of 64, the dimensions of a head, or less, with one head.
    """

    classes: int
    channels: int = 192
    dropout: float = 0.1
    dtype: Any = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, maps: Sequence[Maps], *, train: bool, drop_key: jax.Array | None = None) -> Logits:
        """float32. `train` changes nothing."""
        del train
        batch, rows, columns, _ = maps[0].shape
        joined = jnp.concatenate(maps, axis=-1).reshape(batch, rows * columns, -1)
        patches = Dense(self.channels, self.dtype, name="project")(joined)
        start = nn.initializers.normal(0.02)
        own = self.param("class_tokens", start, (1, self.classes, self.channels)).astype(self.dtype)
        x = jnp.concatenate([patches, jnp.broadcast_to(own, (batch, *own.shape[1:]))], axis=1)
        block = functools.partial(Block, self.channels, mask_heads(self.channels), attention=self.attention)
        for i in range(MASK_BLOCKS):
            x = block(dtype=self.dtype, name=f"blocks_{i}")(x).output
        x = LayerNorm(self.dtype, name="norm")(x)
        patches = x[:, : rows * columns].reshape(batch, rows, columns, -1)
        patches = ChannelDropout(self.dropout)(patches, drop_key)
        patches = _unit(Dense(self.channels, self.dtype, use_bias=False, name="patches")(patches))
        own = _unit(Dense(self.channels, self.dtype, use_bias=False, name="queries")(x[:, rows * columns :]))
        cosines = jnp.einsum("brcd,bkd->brck", patches, own, precision="highest")
        return LayerNorm(name="mask_norm")(cosines)


def mask_heads(channels: int) -> int:
    """Attention heads of a MaskHead with this many channels. Raises ValueError for an invalid number."""
    heads = max(1, channels // _HEAD_DIM)
    if channels > _HEAD_DIM and channels % _HEAD_DIM:
        raise ValueError(
            f"segment.channels={channels}: attention heads of segment.head='mask' have {_HEAD_DIM} dimensions, so "
            f"choose a multiple of {_HEAD_DIM}, such as {heads * _HEAD_DIM}"
        )
    return heads


def _unit(x: Array) -> Float[Array, "*batch dim"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + UNIT_EPS)
