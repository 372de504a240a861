"""Relative position bias of BEiT: a learned bias on each logit by the offset between its two patches."""

import functools

import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]


def bias_rows(grid: Grid) -> int:
    """Rows of the table: one for each offset between two patches, and three for CLS."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


@functools.lru_cache(maxsize=16)
def bias_index(grid: Grid) -> Int[np.ndarray, "tokens tokens"]:
    """For query and key the row of the table; the last three rows are for CLS to patch, patch to CLS, CLS to CLS."""
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    index = np.empty((rows * columns + 1,) * 2, np.int32)
    index[1:, 1:] = (row[:, None] - row + rows - 1) * (2 * columns - 1) + column[:, None] - column + columns - 1
    last = bias_rows(grid)
    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


def relative_bias(table: Float[Array, "rows heads"], grid: Grid) -> Float[Array, "heads tokens tokens"]:
    """The biases of all pairs of tokens of one block."""
    return table[bias_index(grid)].transpose(2, 0, 1)
