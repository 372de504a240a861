"""Rotary position embedding in two dimensions: pairs of channels of q and k are rotated by angles of their patch."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rope:
    """A variant of 2-D rotary embedding.

    centred: positions are the patches' centres in -1..1 along each side, and a period of 1 is a full turn (DINOv3).
      Otherwise positions count patches, and angles are positions divided by powers of theta (EVA-02, PE).
    layout: 'halves' rotates channel c with channel c + head_dim / 2, 'pairs' rotates channels 2c and 2c + 1.
    order: 'yx' if the first half of the angles comes from the row, 'xy' if from the column.
    theta: base of the periods.
    periods: the periods themselves, head_dim / 4 of them, where a file has them rounded; () computes them from theta.
    offset: number of the first row and column; not used if centred.
    reference: grid (rows, columns) to which positions are scaled; None leaves them; not used if centred.
    """

    centred: bool = False
    layout: str = "pairs"
    order: str = "yx"
    theta: float = 10000.0
    periods: tuple[float, ...] = ()
    offset: int = 0
    reference: Grid | None = None

    def record(self) -> dict[str, Any]:
        """Plain JSON, the inverse of `from_record`."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Rope":
        """The inverse of `record`."""
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}
        return cls(**fields)


@functools.lru_cache(maxsize=64)
def angles(rope: Rope, grid: Grid, head_dim: int) -> np.ndarray:
    """Angle by which each channel of each patch is turned, float32 [rows * columns, head_dim]; computed in float64."""
    if head_dim % 4:
        raise ValueError(f"rotary positions need heads whose width is divisible by 4, got {head_dim}")
    sides = [_positions(rope, side, size) for side, size in enumerate(grid)]
    row, column = (x.reshape(-1, 1) for x in np.meshgrid(*sides, indexing="ij"))
    first, second = (row, column) if rope.order == "yx" else (column, row)
    turns = np.concatenate([first * _frequencies(rope, head_dim), second * _frequencies(rope, head_dim)], axis=1)
    repeated = np.tile(turns, (1, 2)) if rope.layout == "halves" else np.repeat(turns, 2, axis=1)
    return repeated.astype(np.float32)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    angle: Float[Array | np.ndarray, "*batch patches head_dim"],
    layout: str,
) -> Float[Array, "batch tokens heads head_dim"]:
    """q or k with the last tokens, those of patches, rotated; tokens in front of them are unchanged.

    Computed in float32, returned in the dtype of `x`.

    Args:
      angle: [patches, head_dim], or [batch, patches, head_dim] where each image has other visible patches.
      layout: see `Rope.layout`.
    """
    prefix = x.shape[1] - angle.shape[-2]
    patches = x[:, prefix:].astype(jnp.float32)
    if layout == "halves":
        first, second = jnp.split(patches, 2, axis=-1)
        partner = jnp.concatenate([-second, first], axis=-1)
    else:
        partner = jnp.stack([-patches[..., 1::2], patches[..., ::2]], axis=-1).reshape(patches.shape)
    angle = jnp.asarray(angle, jnp.float32)[..., None, :]
    rotated = patches * jnp.cos(angle) + partner * jnp.sin(angle)
    return jnp.concatenate([x[:, :prefix], rotated.astype(x.dtype)], axis=1)


def _positions(rope: Rope, side: int, size: int) -> np.ndarray:
    if rope.centred:
        return 2 * (np.arange(size) + 0.5) / size - 1
    positions = np.arange(size, dtype=np.float64) + rope.offset
    return positions if rope.reference is None else positions / size * rope.reference[side]


def _frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians for each unit of position, float64 [head_dim / 4]."""
    count = head_dim // 4
    periods = np.asarray(rope.periods, np.float64) if rope.periods else rope.theta ** (np.arange(count) / count)
    if len(periods) != count:
        raise ValueError(f"the rotary embedding has {len(periods)} periods, but heads of {head_dim} need {count}")
    return (2 * np.pi if rope.centred else 1.0) / periods
