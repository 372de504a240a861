"""Relative position bias of BEiT: a learned bias on each logit by the offset between its two patches."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]


def bias_rows(grid: Grid, prefix: int = 1) -> int:
    """Rows of the table: one for each offset between two patches, and three for each of `prefix` other tokens."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * prefix


@functools.lru_cache(maxsize=16)
def bias_index(grid: Grid, prefix: int = 1) -> Int[np.ndarray, "tokens tokens"]:
    """For query and key the row of the table.

    The last three rows are for CLS to any other token, any other token to CLS, and CLS to CLS. A second token before
    the patches (TinyMIM*-T) has the three rows before those, for itself and the tokens after it.
    """
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    index = np.empty((rows * columns + prefix,) * 2, np.int32)
    offsets = (row[:, None] - row + rows - 1) * (2 * columns - 1) + column[:, None] - column + columns - 1
    index[prefix:, prefix:] = offsets
    for token in range(prefix):
        last = bias_rows(grid, prefix - token)
        index[token, token:], index[token:, token], index[token, token] = last - 3, last - 2, last - 1
    return index


def relative_bias(
    table: Float[Array | np.ndarray, "rows heads"], grid: Grid, prefix: int = 1
) -> Float[Array, "heads tokens tokens"]:
    """The biases of all pairs of tokens of one block."""
    return jnp.transpose(table[bias_index(grid, prefix)], (2, 0, 1))


def resize_bias_table(
    table: Float[np.ndarray, "rows heads"], old: Grid, new: Grid, prefix: int = 1
) -> Float[np.ndarray, "new_rows heads"]:
    """The table for another grid of patches, by BEiT's rule (load_checkpoint of the authors' mmcv_custom).

    The offsets of the old table are taken to lie farther apart from the centre outwards, in a geometric series that
    ends at the largest offset of the new grid. Between them a cubic spline is evaluated. Rows of the tokens before the
    patches are unchanged.
    """
    if old == new:
        return table
    # Half a second to import, and only this function needs it.
    from scipy.interpolate import RectBivariateSpline

    shape = 2 * old[0] - 1, 2 * old[1] - 1
    places = [_geometric_offsets(a, b) for a, b in zip(old, new)]
    targets = [np.arange(-(n - 1), n, dtype=np.float64) for n in new]
    degrees = [min(3, length - 1) for length in shape]
    if min(degrees) < 1:
        raise ValueError(f"relative position biases of a grid of {old[0]}x{old[1]} cannot be resized")
    patches = [
        RectBivariateSpline(*places, column.reshape(shape).astype(np.float64), kx=degrees[0], ky=degrees[1])(*targets)
        for column in table[: shape[0] * shape[1]].T
    ]
    resized = np.stack([each.reshape(-1) for each in patches], axis=1).astype(np.float32)
    return np.concatenate([resized, table[table.shape[0] - 3 * prefix :]])


def _geometric_offsets(old: int, new: int) -> np.ndarray:
    """Ascending positions [2 old - 1] of the old offsets, of which the last is at about new - 1."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(old - 1))
    return np.concatenate([-distances[::-1], [0.0], distances])
