"""UPerNet (arXiv 1807.10221) and the FCN head that trains beside it, as in mmsegmentation 0.11."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.convolutions import ConvNormRelu, PixelClassifier
from tinymim_jax.ops.pooling import adaptive_pool
from tinymim_jax.ops.segmentation import resize_bilinear

Maps = Float[Array, "batch rows columns channels"]
AnyMap = Float[Array, "batch _ _ _"]  # of any size
Logits = Float[Array, "batch rows columns classes"]


class UperNet(nn.Module):
    """Logits on the grid of the finest map (uper_head.py).

    Attributes:
      channels: of all its convolutions.
      pool_scales: bins on a side of the pooled maps that are added to the coarsest map.
      dropout: probability of dropping a channel before the last convolution.
    """

    classes: int
    channels: int = 768
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[AnyMap], *, train: bool, drop_key: jax.Array | None = None) -> Logits:
        """float32. `maps`: from fine to coarse."""

        def block(name: str, size: int, x: AnyMap) -> AnyMap:
            return ConvNormRelu(self.channels, size, self.dtype, name=name)(x, train=train)

        coarsest = maps[-1]
        bins = [adaptive_pool(coarsest, scale) for scale in self.pool_scales]
        pooled = [block(f"pool_{i}", 1, each) for i, each in enumerate(bins)]
        context = jnp.concatenate([coarsest, *(resize_bilinear(each, _grid(coarsest)) for each in pooled)], axis=-1)
        merged = [block("bottleneck", 3, context)]  # from coarse to fine
        for i in reversed(range(len(maps) - 1)):
            lateral = block(f"lateral_{i}", 1, maps[i])
            merged.append(lateral + resize_bilinear(merged[-1], _grid(lateral)))
        last, *finer = merged
        fused = [block(f"fpn_{i}", 3, each) for i, each in enumerate(reversed(finer))] + [last]
        grid = _grid(fused[0])
        fused = block("fpn_bottleneck", 3, jnp.concatenate([resize_bilinear(each, grid) for each in fused], axis=-1))
        return PixelClassifier(self.classes, self.dropout, name="classifier")(fused, drop_key)


class Fcn(nn.Module):
    """A 3 x 3 convolution and logits on one map (fcn_head.py with one convolution)."""

    classes: int
    channels: int = 256
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Maps, *, train: bool, drop_key: jax.Array | None = None) -> Logits:
        """float32."""
        x = ConvNormRelu(self.channels, 3, self.dtype, name="conv")(maps, train=train)
        return PixelClassifier(self.classes, self.dropout, name="classifier")(x, drop_key)


def _grid(maps: AnyMap) -> tuple[int, int]:
    return maps.shape[1], maps.shape[2]
