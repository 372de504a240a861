"""Segmenter: what evaluation and prediction need from a network that labels pixels, for images of any size."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from tinymim_jax.errors import unknown

MODES = ("slide", "whole")


@dataclasses.dataclass(frozen=True)
class Windows:
    """How images of any size are shown to a network that takes windows of one size.

    mode: slide: overlapping windows of the resized image, whose logits are averaged | whole: one window, into which the
      image is scaled with its proportions.
    stride: (down, across) pixels between windows; used by slide.
    resize: (long, short): slide scales the image, with its proportions, to the largest size that fits into these sides,
      as published; None keeps its size.
    flip: the probabilities are averaged with those of the mirrored image.
    scales: sizes of the image relative to `resize`; the probabilities of all are averaged.
    """

    mode: str = "slide"
    stride: tuple[int, int] = (341, 341)
    resize: tuple[int, int] | None = (2048, 512)
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown("mode of evaluation", self.mode, MODES)
        if min(self.stride) < 1:
            raise ValueError(f"stride={self.stride}: windows are moved by at least one pixel")
        if self.resize is not None and min(self.resize) < 1:
            raise ValueError(f"resize={self.resize}: (long side, short side) in pixels")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales={self.scales}: needs one or more positive numbers")
        if self.mode == "whole" and len(self.scales) > 1:
            raise ValueError(f"scales={self.scales}: mode 'whole' has one scale, in which the image fits into a window")


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A network that labels pixels, as pure functions.

    logits: (params, frozen, pixels [batch, *size, 3]) -> float32 [batch, rows, columns, classes], at any stride. The
      pixels are uint8 RGB; the function normalizes them.
    size: (height, width) of the pixels.
    classes: their number.
    fill: RGB of the pixels beside an image that is smaller than a window.
    windows: how images of any size are shown to it.
    """

    logits: Callable[[Any, Any, jax.Array], jax.Array]
    size: tuple[int, int]
    classes: int
    fill: tuple[int, int, int]
    windows: Windows = Windows()
