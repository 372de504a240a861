"""The name tables: what each PyTorch family calls a tensor, its shape there, and where it goes in our tree.

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
    """How an array of torch's becomes ours (`ours`), and back given the shape it has there (`torch`)."""

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


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or one in each block.

    torch, ours: its name there and its path here; `{i}` stands for the number of the block.
    shape: its shape there. A size is a product such as `3d` or `3pp` of a number and these letters:
      d width, m hidden width of the MLP, n tokens (CLS and DIST included), p patch size, k classes, e width of the
      decoder, w width of widened tokens, f width of the norm of what is pooled.
    layout: how it is laid out there.
    part: the optional part of the model that it belongs to; '' if it is always there.
    """

    torch: str
    ours: str
    shape: str
    layout: Layout = SAME
    part: str = ""


Rows = tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A row with its numbers filled in; in `shape`, a size that is not known stays as its letters."""

    torch: str
    ours: str
    shape: tuple[Any, ...]
    layout: Layout

    @property
    def our_shape(self) -> Shape:
        return self.layout.our_shape(self.shape)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of PyTorch models.

    rows: its tensors in the order of its state dict.
    heads: attention heads by width, which no tensor shows; the last block's may differ.
    """

    rows: Rows
    heads: Mapping[int, tuple[int, int]]

    def rows_with(self, parts: set[str]) -> Rows:
        """The rows of a model that has these optional parts."""
        return tuple(row for row in self.rows if not row.part or row.part in parts)


def sizes_shown(rows: Rows, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes that tensors of these shapes (by torch's names) show.

    By letter, given by the first tensor that has it alone as a dimension: whether the others agree is for the caller
    to check. And by what stands before the number of a block in its names ('blocks.'): how many there are, at least 1.
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
            # Counting, not the highest number: no file shall make us build a list of any length.
            pattern = re.compile(re.escape(row.torch).replace(re.escape("{i}"), r"\d+"))
            sizes[stem] = max(1, sizes.get(stem, 0), sum(bool(pattern.fullmatch(name)) for name in shapes))
    return sizes


def leaves(rows: Rows, sizes: Sizes) -> list[Leaf]:
    """Every tensor of a model of these rows, in the order of torch's state dict; sizes as of `sizes_shown`."""
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
    shape = tuple(_product(size, sizes) for size in row.shape.split())
    return Leaf(row.torch.format(i=i), row.ours.format(i=i), shape, row.layout)


def _product(size: str, sizes: Sizes) -> int | str:
    number = size.rstrip("abcdefghijklmnopqrstuvwxyz")
    letters = size.removeprefix(number)
    if not all(letter in sizes for letter in letters):
        return size
    return int(number or 1) * math.prod(sizes[letter] for letter in letters)


def _part(name: str, *rows: Row) -> Rows:
    return tuple(dataclasses.replace(row, part=name) for row in rows)


def _linear(torch: str, ours: str, outputs: str, inputs: str) -> Rows:
    return (
        Row(f"{torch}.weight", f"{ours}/kernel", f"{outputs} {inputs}", TRANSPOSED),
        Row(f"{torch}.bias", f"{ours}/bias", outputs),
    )


def _norm(torch: str, ours: str, width: str) -> Rows:
    return Row(f"{torch}.weight", f"{ours}/scale", width), Row(f"{torch}.bias", f"{ours}/bias", width)


def _blocks(torch: str, ours: str, width: str, hidden: str) -> Rows:
    torch, ours = torch + ".{i}", ours + "/blocks_{i}"
    return (
        *_norm(f"{torch}.norm1", f"{ours}/norm1", width),
        *_linear(f"{torch}.attn.qkv", f"{ours}/attn/qkv", f"3{width}", width),
        *_linear(f"{torch}.attn.proj", f"{ours}/attn/proj", width, width),
        *_norm(f"{torch}.norm2", f"{ours}/norm2", width),
        *_linear(f"{torch}.mlp.fc1", f"{ours}/mlp/fc1", hidden, width),
        *_linear(f"{torch}.mlp.fc2", f"{ours}/mlp/fc2", width, hidden),
    )


_CLS = Row("cls_token", "encoder/cls_token", "1 1 d")
_DIST = Row("dist_token", "encoder/dist_token", "1 1 d")
_POSITIONS = Row("pos_embed", "encoder/pos_embed", "1 n d")
_TOKENS = (_CLS, _POSITIONS)
_DECODER_TOKENS = (
    Row("mask_token", "decoder/mask_token", "1 1 e"),
    Row("decoder_pos_embed", "decoder/pos_embed", "1 n e"),
)
_BODY = (
    Row("patch_embed.proj.weight", "encoder/patch_embed/kernel", "d 3 p p", PATCHES),
    Row("patch_embed.proj.bias", "encoder/patch_embed/bias", "d"),
    *_blocks("blocks", "encoder", "d", "m"),
)
_NORM = _norm("norm", "encoder/norm", "d")
_DECODER = (
    *_linear("decoder_embed", "decoder/embed", "e", "d"),
    *_blocks("decoder_blocks", "decoder", "e", "4e"),
    *_norm("decoder_norm", "decoder/norm", "e"),
    *_linear("decoder_pred", "decoder/pred", "3pp", "e"),
)

_VIT_HEADS = {192: (3, 3), 384: (6, 6), 768: (12, 12), 1024: (16, 16), 1280: (16, 16)}
# Heads of the decoder by its width (models_mae.py).
DECODER_HEADS = {512: 16}

FAMILIES: dict[str, Family] = {
    # MAE release, models_mae.py; the published files hold the encoder alone or both.
    "mae": Family(
        (*_TOKENS, *_part("decoder", *_DECODER_TOKENS), *_BODY, *_NORM, *_part("decoder", *_DECODER)), _VIT_HEADS
    ),
    # TinyMIM release, models_tinymim.py: the last block has as many heads as the teacher.
    "tinymim": Family((*_TOKENS, *_BODY, *_NORM), {192: (6, 12), 384: (6, 12), 768: (12, 16)}),
    # timm's classifier as in models_vit.py of both releases; 'mean' pooling normalises the mean instead of the tokens.
    # DeiT's distilled models have a second token and head.
    "vit": Family(
        (
            _CLS,
            *_part("dist", _DIST),
            _POSITIONS,
            *_BODY,
            *_part("cls", *_NORM),
            *_part("mean", *_norm("fc_norm", "fc_norm", "d")),
            *_part("head", *_linear("head", "head", "k", "d")),
            *_part("head_dist", *_linear("head_dist", "head_dist", "k", "d")),
        ),
        _VIT_HEADS,
    ),
    # TinyMIM*-T, the fine-tuned file: Segmentation/TinyMIMstar-T/backbone/mae.py has its encoder, log/TinyMIMstar-T.log
    # there names the other tensors (fc_norm, head, head_dist). The class that has them all was not released.
    "tinymim_star": Family(
        (
            _CLS,
            _DIST,
            _POSITIONS,
            *_BODY,
            *_norm("conv1x1.0", "widen/norm", "d"),
            *_linear("conv1x1.1", "widen/linear", "w", "d"),
            *_part("mean", *_norm("fc_norm", "fc_norm", "f")),
            *_part("head", *_linear("head", "head", "k", "w"), *_linear("head_dist", "head_dist", "k", "w")),
        ),
        {192: (12, 12)},
    ),
}
