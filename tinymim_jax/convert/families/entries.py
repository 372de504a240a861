"""Entries: which tensors of a file become which of our parameters, and back.

Unlike in `table.py`, one of our parameters may be made of several tensors (q, k and v), or two of one (a gated MLP).
"""

import dataclasses
import math

import numpy as np

from tinymim_jax.convert.families.table import PATCHES, SAME, TRANSPOSED, Layout

# A linear layer on pixels in the order (channel, row, column), whose patches are square.
FLAT_PATCHES = Layout(
    lambda x: PATCHES.ours(x.reshape(len(x), 3, *[math.isqrt(x.shape[1] // 3)] * 2)),
    lambda x, shape: PATCHES.torch(x, (shape[0], 3, *[math.isqrt(shape[1] // 3)] * 2)).reshape(shape),
    lambda shape: shape[::-1],
)
# Tables and tokens without the axes of length 1 that ours have in front.
WITHOUT_ONE = Layout(lambda x: x[None], lambda x, shape: x[0], lambda shape: (1, *shape))
WITHOUT_TWO = Layout(lambda x: x[None, None], lambda x, shape: x[0, 0], lambda shape: (1, 1, *shape))


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tensors of a file, and the parameters that they become.

    torch, ours: names there and paths here, `{i}` is the number of the block; one of the two has one name only. Several
      tensors are joined along their first axis in PyTorch, and one tensor is cut into equal parts along it.
    layout: of each tensor, in PyTorch.
    axes: number of axes of the tensors; other tensors of these names belong to another entry.
    """

    torch: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout = SAME
    axes: int | None = None


def entry(torch: str, ours: str, layout: Layout = SAME, axes: int | None = None) -> Entry:
    """One tensor that is one parameter."""
    return Entry((torch,), (ours,), layout, axes)


def linear(torch: str, ours: str) -> tuple[Entry, ...]:
    """nn.Linear."""
    return entry(f"{torch}.weight", f"{ours}/kernel", TRANSPOSED, 2), entry(f"{torch}.bias", f"{ours}/bias")


def norm(torch: str, ours: str) -> tuple[Entry, ...]:
    """nn.LayerNorm, or an RMSNorm, which has no bias."""
    return entry(f"{torch}.weight", f"{ours}/scale"), entry(f"{torch}.bias", f"{ours}/bias")


def gated(torch: str, ours: str) -> tuple[Entry, ...]:
    """A nn.Linear whose outputs are the gate, then the values."""
    parts = (f"{ours}/gate", f"{ours}/fc1")
    return (
        Entry((f"{torch}.weight",), tuple(f"{part}/kernel" for part in parts), TRANSPOSED),
        Entry((f"{torch}.bias",), tuple(f"{part}/bias" for part in parts)),
    )


def to_ours(found: Entry, tensors: list[np.ndarray]) -> list[np.ndarray]:
    """The parameters of an entry, from the tensors of a file."""
    if len(found.torch) > 1:
        tensors = [np.concatenate(tensors)]
    elif len(found.ours) > 1:
        tensors = np.split(tensors[0], len(found.ours))
    return [found.layout.ours(tensor) for tensor in tensors]


def to_theirs(found: Entry, arrays: list[np.ndarray], patch: int) -> list[np.ndarray]:
    """The tensors of a file, from the parameters of an entry: the inverse of `to_ours`."""
    width = arrays[0].shape[-1]
    if found.layout is PATCHES:
        return [PATCHES.torch(arrays[0], (width, 3, patch, patch))]
    if found.layout is FLAT_PATCHES:
        return [FLAT_PATCHES.torch(arrays[0], (width, 3 * patch * patch))]
    tensors = [found.layout.torch(array, array.shape[::-1]) for array in arrays]
    if len(found.torch) > 1:
        return list(np.split(tensors[0], len(found.torch)))
    return [np.concatenate(tensors)] if len(found.ours) > 1 else tensors
