"""Feature pyramids: maps at strides 4, 8, 16 and 32 from four blocks of a ViT with patches of 16 pixels."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.convolutions import BatchNorm, Conv, Upsample
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.pooling import max_pool

Maps = Float[Array, "batch rows columns channels"]
AnyMap = Float[Array, "batch _ _ _"]  # of any size: they differ within a pyramid
Finer = Float[Array, "batch finer_rows finer_columns features"]


class Pyramid(nn.Module):
    """The published pyramid (Segmentation/TinyMIM/backbone/mae.py): all maps have the encoder's width."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, taps: Sequence[AnyMap], *, train: bool) -> tuple[AnyMap, ...]:
        """`taps`: outputs of four blocks as maps at stride 16."""
        dim = taps[0].shape[-1]
        first = quadruple(dim, dim, self.dtype, taps[0], train)
        second = Upsample(dim, self.dtype, name="up2")(taps[1])
        return first, second, taps[2].astype(self.dtype), max_pool(taps[3].astype(self.dtype))


class StarPyramid(nn.Module):
    """That of TinyMIM*-T (Segmentation/TinyMIMstar-T/backbone/mae.py): all maps have four times the encoder's width.

    The last of `taps` is wider than the others: the tokens after the Widen layer.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, taps: Sequence[AnyMap], *, train: bool) -> tuple[AnyMap, ...]:
        """`taps`: outputs of four blocks as maps at stride 16."""
        dim = taps[0].shape[-1]
        first = quadruple(2 * dim, 4 * dim, self.dtype, taps[0], train)
        second = Upsample(4 * dim, self.dtype, name="up2")(taps[1])
        third = Conv(4 * dim, 1, use_bias=True, dtype=self.dtype, name="same")(taps[2])
        return first, second, third, Conv(4 * dim, 3, 2, use_bias=True, dtype=self.dtype, name="down")(taps[3])


def quadruple(middle: int, features: int, dtype: Any, x: Maps, train: bool) -> Finer:
    """A map of four times the grid, by two transposed convolutions; for use inside a compact module."""
    x = Upsample(middle, dtype, name="up4_first")(x)
    x = gelu(BatchNorm(dtype, name="up4_norm")(x, train=train))
    return Upsample(features, dtype, name="up4_second")(x)


PYRAMIDS = {"plain": Pyramid, "star": StarPyramid}
