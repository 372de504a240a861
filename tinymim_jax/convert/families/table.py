"""What a family of PyTorch checkpoints is: a table of tensors with their names, shapes and layouts there and here.

Both directions of a conversion, and the sizes of the model, are derived from these tables.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a PyTorch array becomes ours (`ours`), and the inverse given the shape in PyTorch (`torch`)."""

    ours: Callable[[np.ndarray], np.ndarray]
    torch: Callable[[np.ndarray, Shape], np.ndarray]
    our_shape: Callable[[Shape], Shape]


SAME = Layout(lambda x: x, lambda x, shape: x, lambda shape: shape)
# nn.Linear keeps [out, in], we [in, out].
TRANSPOSED = Layout(lambda x: x.T, lambda x, shape: x.T, lambda shape: shape[::-1])
# nn.Conv2d keeps [dim, channel, row, column]; our patches are flattened as (row, column, channel).
PATCHES = Layout(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x, shape: x.reshape(*shape[2:], shape[1], shape[0]).transpose(3, 2, 0, 1),
    lambda shape: (math.prod(shape[1:]), shape[0]),
)
# Of nn.Conv2d [out, in, row, column]; ours is [row, column, in, out].
CONV = Layout(
    lambda x: x.transpose(2, 3, 1, 0),
    lambda x, shape: x.transpose(3, 2, 0, 1),
    lambda shape: (shape[2], shape[3], shape[1], shape[0]),
)
# Of nn.ConvTranspose2d [in, out, row, column]; ours is [in, row, column, out].
UPSAMPLE = Layout(
    lambda x: x.transpose(0, 2, 3, 1),
    lambda x, shape: x.transpose(0, 3, 1, 2),
    lambda shape: (shape[0], shape[2], shape[3], shape[1]),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or one tensor of each block.

    torch, ours: its name in PyTorch and its path in our parameters; `{i}` stands for the number of the block.
    shape: its shape in PyTorch. A size is a product such as `3d` or `3pp` of a number and letters, or a sum of such
      products, `d+4c`. The letters:
      d width, m hidden width of the MLP, n tokens (CLS and DIST included), p patch size, k classes, e width of the
      decoder, w width of widened tokens, f width of the norm behind pooling, r rows of a relative position bias, h
      attention heads, c and a channels of a segmentation network's head and auxiliary head.
    layout: its layout in PyTorch.
    part: the optional part of the model that it belongs to; '' if every model of the family has it.
    """

    torch: str
    ours: str
    shape: str
    layout: Layout = SAME
    part: str = ""


Rows = tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A row with its numbers filled in; in `shape`, an unknown size is still given by its letters."""

    torch: str
    ours: str
    shape: tuple[Any, ...]
    layout: Layout

    @property
    def our_shape(self) -> Shape:
        return self.layout.our_shape(self.shape)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of PyTorch checkpoints.

    rows: its tensors in the order of its state dict.
    heads: attention heads by width, which no tensor shows: (all blocks but the last, the last block).
    decoder_heads: attention heads of an MAE decoder by its width.
    ignored: a pattern of tensor names that a file may have and that are neither read nor written.
    pyramid: of a family of segmentation networks; '' for others.
    """

    rows: Rows
    heads: Mapping[int, tuple[int, int]]
    decoder_heads: Mapping[int, int] = dataclasses.field(default_factory=dict)
    ignored: str = ""
    pyramid: str = ""

    def rows_with(self, parts: set[str]) -> Rows:
        """The rows of a model that has these optional parts."""
        return tuple(row for row in self.rows if not row.part or row.part in parts)

    @property
    def anchor(self) -> str:
        """The name of the patch embedding's weight, which every ViT has once; it shows where a state dict is."""
        return next(row.torch for row in self.rows if "p p" in row.shape)


def sizes_shown(rows: Rows, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes that tensors of these shapes (by PyTorch's names) show.

    Keys are the letters of the rows, with the size from the first tensor that has the letter alone as a dimension
    (whether the other tensors agree is not checked); and what stands before the number of a block in names ('blocks.'),
    with the number of blocks, at least 1.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        letters, shape = row.shape.split(), shapes.get(row.torch.format(i=0), ())
        if len(letters) == len(shape):
            for letter, size in zip(letters, shape):
                if letter.isalpha() and len(letter) == 1:
                    sizes.setdefault(letter, size)
        stem = _stem(row)
        if stem is not None:
            # Blocks are counted. The highest number in a name could be anything, and lists are built of this length.
            pattern = re.compile(re.escape(row.torch).replace(re.escape("{i}"), r"\d+"))
            sizes[stem] = max(1, sizes.get(stem, 0), sum(bool(pattern.fullmatch(name)) for name in shapes))
    return sizes


def leaves(rows: Rows, sizes: Sizes) -> list[Leaf]:
    """Every tensor of a model of these rows, in the order of PyTorch's state dict; sizes as of `sizes_shown`."""
    found: list[Leaf] = []
    for stem, group in itertools.groupby(rows, key=_stem):
        members = list(group)
        if stem is None:
            found += [_leaf(row, sizes) for row in members]
        else:  # all rows of a block come before those of the next
            found += [_leaf(row, sizes, i) for i in range(sizes[stem]) for row in members]
    return found


def _stem(row: Row) -> str | None:
    """What stands before the number of the block: 'blocks.'; None for a tensor outside the blocks."""
    stem, numbered, _ = row.torch.partition("{i}")
    return stem if numbered else None


def _leaf(row: Row, sizes: Sizes, i: int = 0) -> Leaf:
    shape = tuple(_size(size, sizes) for size in row.shape.split())
    return Leaf(row.torch.format(i=i), row.ours.format(i=i), shape, row.layout)


def _size(size: str, sizes: Sizes) -> int | str:
    terms = [_product(term, sizes) for term in size.split("+")]
    known = [term for term in terms if isinstance(term, int)]
    return sum(known) if len(known) == len(terms) else size


def _product(size: str, sizes: Sizes) -> int | str:
    number = size.rstrip("abcdefghijklmnopqrstuvwxyz")
    letters = size.removeprefix(number)
    if not all(letter in sizes for letter in letters):
        return size
    return int(number or 1) * math.prod(sizes[letter] for letter in letters)
