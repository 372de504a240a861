"""Windows of images of any size, and the matrices that put their logits together at the image's own size.

The logits of a window are enlarged bilinearly to its size, averaged over the windows that overlap, and resized to the
original image. All of that is linear and works on rows and columns apart. So the result is the sum, over windows, of
`rows @ logits @ columns.T` with two matrices for each window; only the matrices depend on the image's size.
"""

from typing import NamedTuple

import numpy as np

from tinymim_jax.data.views.segmentation import resize_bilinear, scaled_size
from tinymim_jax.ops.token_grid import bilinear_matrix
from tinymim_jax.tasks.segmenter import Windows

Size = tuple[int, int]


class Shown(NamedTuple):
    """An image as it is cut into windows: `[height, width, 3]`, resized, and mirrored if `mirrored`."""

    pixels: np.ndarray
    mirrored: bool


class Cut(NamedTuple):
    """The windows of a Shown image, row by row, and where they count in the original image.

    windows: [windows, *size, 3], padded to the right and below with the fill colour.
    rows: float32 [windows, original height, rows of the logits]. columns: the same for the width.
    """

    windows: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def shown_images(pixels: np.ndarray, how: Windows, size: Size) -> list[Shown]:
    """The image uint8 `[height, width, 3]` in every scale, and mirrored, as `how` says, for windows of `size`."""
    found = []
    for scale in how.scales:
        if how.mode == "whole":
            factor = min(size[0] / pixels.shape[0], size[1] / pixels.shape[1])
            height, width = (min(max(1, int(a * factor + 0.5)), b) for a, b in zip(pixels.shape, size))
        else:
            height, width = scaled_size(pixels.shape, how.resize, scale)
        resized = resize_bilinear(pixels, (height, width))
        found.append(Shown(resized, False))
        if how.flip:
            found.append(Shown(resized[:, ::-1], True))
    return found


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one moved back to end with the image."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride + window, side) - window, 0) for number in range(count)]


def cut(shown: Shown, original: Size, size: Size, grid: Size, stride: Size, fill: tuple[int, ...]) -> Cut:
    """Cuts an image into windows.

    Args:
      original: (height, width) of the image before it was resized.
      size: of the windows. grid: of their logits.
      stride: (down, across) between windows.
      fill: colour beside an image that is smaller than a window.
    """
    height, width = shown.pixels.shape[:2]
    tops, lefts = (starts(side, part, step) for side, part, step in zip((height, width), size, stride))
    windows = np.empty((len(tops) * len(lefts), *size, 3), shown.pixels.dtype)
    windows[:] = fill
    places = [(top, left) for top in tops for left in lefts]
    for window, (top, left) in zip(windows, places):
        part = shown.pixels[top : top + size[0], left : left + size[1]]
        window[: part.shape[0], : part.shape[1]] = part
    rows = _matrices(tops, height, original[0], size[0], grid[0])
    columns = _matrices(lefts, width, original[1], size[1], grid[1])
    if shown.mirrored:
        columns = columns[:, ::-1]
    number = np.arange(len(places))
    return Cut(windows, rows[number // len(lefts)], columns[number % len(lefts)])


def _matrices(begins: list[int], side: int, original: int, window: int, grid: int) -> np.ndarray:
    """float32 [windows, original, grid]: what the logits along one axis add to each original pixel."""
    enlarged = bilinear_matrix(grid, window).astype(np.float64)
    placed = np.zeros((len(begins), side, grid))
    for place, begin in zip(placed, begins):
        part = place[begin : begin + window]
        part[:] = enlarged[: len(part)]
    placed /= (placed.sum(-1) > 0).sum(0)[:, None]  # the number of windows at each place
    # Bilinear resizing to the original size, by its two weights instead of a large matrix.
    centre = np.clip((np.arange(original) + 0.5) * (side / original) - 0.5, 0, side - 1)
    first = np.floor(centre).astype(int)
    share = (centre - first)[:, None]
    resized = (1 - share) * placed[:, first] + share * placed[:, np.minimum(first + 1, side - 1)]
    return resized.astype(np.float32)
