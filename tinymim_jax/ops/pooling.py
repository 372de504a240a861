"""Pooling of feature maps, with the conventions of torch."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.ops.products import full_precision

Maps = Float[Array, "batch rows columns channels"]


def adaptive_pool(maps: Maps, size: int) -> Float[Array, "batch size size channels"]:
    """Means over size x size bins, which overlap unless `size` divides the input, as nn.AdaptiveAvgPool2d."""
    precision, (rows, columns) = full_precision(maps.dtype), maps.shape[1:3]
    maps = jnp.einsum("rh,bhwc->brwc", jnp.asarray(bin_means(rows, size), maps.dtype), maps, precision=precision)
    return jnp.einsum("sw,brwc->brsc", jnp.asarray(bin_means(columns, size), maps.dtype), maps, precision=precision)


@functools.cache
def bin_means(length: int, bins: int) -> np.ndarray:
    """[bins, length]: bin i averages from floor(i length / bins) to ceil((i + 1) length / bins)."""
    weights = np.zeros((bins, length), np.float32)
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def max_pool(maps: Maps) -> Float[Array, "batch half_rows half_columns channels"]:
    """The largest of each 2 x 2 values; an odd last row or column is left out, as nn.MaxPool2d(2) does.

    Of equal values the first gets the gradient, as in torch.
    """
    rows, columns = maps.shape[1] // 2, maps.shape[2] // 2
    cells = maps[:, : 2 * rows, : 2 * columns].reshape(maps.shape[0], rows, 2, columns, 2, maps.shape[3])
    # jnp.max divides its gradient by the number of values that equal the largest. Where the compiler computes a value
    # twice, rounded differently, that number can be 0.
    upper = _larger(cells[:, :, 0, :, 0], cells[:, :, 0, :, 1])
    return _larger(upper, _larger(cells[:, :, 1, :, 0], cells[:, :, 1, :, 1]))


def _larger(first: Array, second: Array) -> Array:
    return jnp.where(first >= second, first, second)
