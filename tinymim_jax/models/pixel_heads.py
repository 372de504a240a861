"""Decoders without a pyramid, on maps at stride 16: a linear one, and a light one of ours."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.convolutions import BatchNorm, ConvNormRelu, PixelClassifier, Upsample
from tinymim_jax.ops.gelu import gelu

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
