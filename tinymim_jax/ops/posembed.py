"""Position tables: fixed 2-D sin-cos tables, and bicubic resizing of a table to another grid, as in torch."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymim_jax.ops.token_grid import bilinear_matrix

Grid = tuple[int, int]


@functools.cache
def sincos_table(dim: int, grid: Grid, prefix: int = 1) -> np.ndarray:
    """Fixed table, float32 [1, prefix + rows * columns, dim], zeros for the tokens before the patches.

    The first half of the channels encodes the column, the second the row (MAE release, util/pos_embed.py).
    `dim` must be a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a sin-cos position table needs a width divisible by 4, got {dim}")
    rows, columns = grid
    frequency = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    halves = []
    for position in (column, row):
        angle = position.reshape(-1, 1) * frequency  # [patches, dim / 4]
        halves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(halves, axis=1)
    return np.concatenate([np.zeros((prefix, dim)), table])[None].astype(np.float32)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of torch's bicubic interpolation: a = -0.75, align_corners False, no antialiasing."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(centre - (left + offset))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        # torch pads by repeating the border value.
        column = np.clip(left + offset, 0, old - 1)
        np.add.at(weights, (np.arange(new), column), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def resize_table(
    table: Float[Array | np.ndarray, "1 tokens dim"], old: Grid, new: Grid, rule: str = "bicubic"
) -> Float[Array | np.ndarray, "1 new_tokens dim"]:
    """Resizes a learned position table; the rows of leading tokens (CLS, DIST) are unchanged.

    Args:
      table: [1, prefix + rows * columns, dim] for the grid `old`.
      old: grid (rows, columns) of the table.
      new: grid of the result.
      rule: 'bicubic' or 'square', see models.switches.Switches.table.
    """
    patches = old[0] * old[1]
    prefix = table.shape[1] - patches
    if prefix < 0:
        raise ValueError(f"a position table of {table.shape[1]} tokens is too short for a grid of {old[0]}x{old[1]}")
    if old == new:
        return table
    grid = table[:, prefix:].reshape(old[0], old[1], table.shape[2])
    matrix, whole = (bilinear_matrix, (max(new),) * 2) if rule == "square" else (bicubic_matrix, new)
    grid = jnp.einsum("rh,hwd->rwd", matrix(old[0], whole[0]), grid, precision="highest")
    grid = jnp.einsum("cw,rwd->rcd", matrix(old[1], whole[1]), grid, precision="highest")
    grid = grid[: new[0], : new[1]]
    return jnp.concatenate([table[:, :prefix], grid.reshape(1, new[0] * new[1], -1)], axis=1)
