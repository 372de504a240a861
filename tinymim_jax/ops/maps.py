"""Resizing and pooling of feature maps `[batch, rows, columns, channels]`, with the conventions of torch."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.ops.products import full_precision
from tinymim_jax.ops.token_grid import bilinear_matrix

Grid = tuple[int, int]
Maps = Float[Array, "batch rows columns channels"]


def resize_maps(maps: Maps, size: Grid) -> Float[Array, "batch new_rows new_columns channels"]:
    """Bilinear with align_corners False and without antialiasing, as F.interpolate; in the dtype of `maps`."""
    rows, columns = maps.shape[1:3]
    return _resampled(maps, bilinear_matrix(rows, size[0]), bilinear_matrix(columns, size[1]))


def adaptive_pool(maps: Maps, size: int) -> Float[Array, "batch size size channels"]:
    """Means over size x size bins, which overlap where `size` is no divisor, as nn.AdaptiveAvgPool2d."""
    rows, columns = maps.shape[1:3]
    return _resampled(maps, _bin_means(rows, size), _bin_means(columns, size))


def max_pool(maps: Maps) -> Float[Array, "batch half_rows half_columns channels"]:
    """The largest of each 2 x 2 values; an odd last row or column is left out, as nn.MaxPool2d(2) does."""
    rows, columns = maps.shape[1] // 2, maps.shape[2] // 2
    cells = maps[:, : 2 * rows, : 2 * columns].reshape(maps.shape[0], rows, 2, columns, 2, maps.shape[3])
    return cells.max(axis=(2, 4))


def _resampled(maps: Maps, by_rows: np.ndarray, by_columns: np.ndarray) -> Array:
    """`by_rows` [new rows, rows] and `by_columns` applied to the two axes; an identity is skipped."""
    precision = full_precision(maps.dtype)
    for matrix, equation in ((by_rows, "rh,bhwc->brwc"), (by_columns, "kw,brwc->brkc")):
        if matrix.shape[0] != matrix.shape[1]:
            maps = jnp.einsum(equation, jnp.asarray(matrix, maps.dtype), maps, precision=precision)
    return maps


@functools.cache
def _bin_means(length: int, bins: int) -> np.ndarray:
    """[bins, length]: bin i averages from floor(i length / bins) to ceil((i + 1) length / bins)."""
    weights = np.zeros((bins, length), np.float32)
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights
