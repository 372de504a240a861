"""What the kernels share: products with float32 sums, and heads as parts of 128-lane tiles."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # the last dimension of a TPU's vector registers
SHORT = 400  # up to so many tokens a kernel works on the whole map of a head at once
ROWS = 256  # query rows of a block, beyond that

# Contracted dimensions of `dot`.
NT = (((1,), (1,)), ((), ()))  # a b^T
NN = (((1,), (0,)), ((), ()))  # a b
TN = (((0,), (0,)), ((), ()))  # a^T b

_VMEM_BYTES = 64 * 2**20  # of the 128 MiB that v5e, v6e and tpu7x have


def dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    """A product with a float32 result; operands in float32 are multiplied in float32 too."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def compiler_params(*semantics: Any) -> Any:
    """For `pallas_call`: the kind of each grid dimension ("parallel" or "arbitrary"), and the VMEM that is allowed."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES)


def add(new: jax.Array, before: jax.Array | None, first: bool) -> jax.Array:
    """`new`, added to what earlier heads of a window left, unless there are none."""
    return new if first or before is None else before + new


def padded_bytes(shape: tuple[int, ...]) -> int:
    """Of a float32 array in VMEM, where the last two dimensions are padded to whole tiles."""
    *leading, rows, columns = shape
    return 4 * math.prod(leading) * -(-rows // 8) * 8 * -(-columns // LANES) * LANES


def valid_rows(x: jax.Array, tokens: int, axis: int = 2) -> jax.Array:
    """A block of rows `[rows, width]`, by this grid dimension, with zeros where it reaches beyond the last token.

    What is read there is undefined.
    """
    rows = x.shape[0]
    if tokens % rows == 0:
        return x
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + pl.program_id(axis) * rows
    return jnp.where(row < tokens, x, jnp.zeros_like(x))


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where each head's columns lie in an array `[..., dim]`, read in windows of whole 128-lane tiles.

    Two heads of 64 share a tile. Products then take the whole tile, with the other head's lanes set to zero on one
    side: cheaper than shifting lanes. Heads that do not divide a tile (80 lanes of ViT-H) are windows of their own.
    """

    heads: int
    dim: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def shared(self) -> bool:
        """Whether several heads lie in one window."""
        return LANES % self.head_dim == 0 and self.head_dim < LANES

    def window(self, head: int, part: int = 0) -> slice:
        """Columns of the window that holds `head`, in part 0, 1, 2 (q, k, v) of an array `[..., 3 dim]`."""
        start = head * self.head_dim
        width = self.head_dim
        if self.shared:
            start = start // LANES * LANES
            width = min(LANES, self.dim - start)
        return slice(part * self.dim + start, part * self.dim + start + width)

    def first(self, head: int) -> bool:
        """Whether no head before this one lies in its window."""
        return not self.shared or head * self.head_dim % LANES == 0

    def last(self, head: int) -> bool:
        """Whether no head after this one lies in its window."""
        return not self.shared or (head + 1) * self.head_dim % LANES == 0 or head == self.heads - 1

    def only(self, x: jax.Array, head: int) -> jax.Array:
        """A window `[rows, width]` with zeros in the lanes of other heads."""
        return jnp.where(self._mask(x.shape, head), x, jnp.zeros_like(x)) if self.shared else x

    def merge(self, x: jax.Array, before: jax.Array | None, head: int) -> jax.Array:
        """`x` in the lanes of `head`, and `before` (what earlier heads of the window left) in the others."""
        return x if before is None or self.first(head) else jnp.where(self._mask(x.shape, head), x, before)

    def _mask(self, shape: tuple[int, ...], head: int) -> jax.Array:
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        start = head * self.head_dim % LANES
        return (lane >= start) & (lane < start + self.head_dim)
