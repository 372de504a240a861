"""A convolutional stem in place of the linear patch embedding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.convolutions import Conv
from tinymim_jax.models.layers import Dense, LayerNorm
from tinymim_jax.ops.gelu import gelu


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with LayerNorm over its channels and GELU, then a linear layer.

    After "Early convolutions help transformers see better" (arXiv 2106.14881), which has batch norm and ReLU. There are
    log2(patch_size) convolutions; the last has `features` channels, each one before it half as many.
    """

    features: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch patches features"]:
        count = self.patch_size.bit_length() - 1
        if 1 << count != self.patch_size or self.features % (1 << (count - 1)):
            raise ValueError(
                f"a convolutional stem halves the image until patches of {self.patch_size} pixels are one: choose "
                f"model.patch_size among 2, 4, 8, 16, and a width (now {self.features}) that is divisible by half of it"
            )
        x = images.astype(self.dtype)
        for i in range(count):
            width = self.features >> (count - 1 - i)
            x = Conv(width, 3, stride=2, use_bias=True, dtype=self.dtype, name=f"conv_{i}")(x)
            x = gelu(LayerNorm(self.dtype, name=f"norm_{i}")(x))
        x = x.reshape(x.shape[0], -1, self.features)  # [batch, patches, features]
        return Dense(self.features, self.dtype, name="proj")(x)
