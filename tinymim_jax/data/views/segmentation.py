"""Views of an image together with the class of every pixel: scaled, cropped, flipped, distorted and padded alike."""

import dataclasses
from typing import Any

import numpy as np
from kornia_rs import imgproc

from tinymim_jax.data.masks.report import wrong_size
from tinymim_jax.data.sources.examples import Example
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.decoding import Picture
from tinymim_jax.data.views.photometric import distort, draw_distortion
from tinymim_jax.data.views.transforms import flip_horizontally

Size = tuple[int, int]
_DRAWS = 10  # crops that are tried to find one without a dominating class


@dataclasses.dataclass(frozen=True)
class SegmentationAugment:
    """The training view of mmsegmentation: resize, crop, flip, photometric distortion, padding.

    size: (height, width) of the result.
    classes: their number; it decides the dtype of `pixel_labels`.
    scale: (long, short) sides into which the image is scaled, with its proportions; None: it is not scaled.
    scale_range: `scale`, or the image's own size, times a uniform draw from this range.
    max_class_share: a crop in which one class has more of the pixels that are not ignored, or in which it is alone, is
      drawn again, up to ten times; the next is taken as it is. 1 takes the first.
    flip: mirror with probability 1/2.
    photometric: random brightness, contrast, saturation and hue.
    fill: RGB to the right of and below an image that is smaller than `size`; its labels there are to be ignored.
    """

    size: Size
    classes: int
    scale: Size | None = (2048, 512)
    scale_range: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: bool = True
    photometric: bool = True
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self):
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"data.scale_range={self.scale_range}: needs 0 < lower <= upper, factors of the size")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"data.max_class_share={self.max_class_share}: a share of the crop, above 0 and up to 1")
        if self.scale is not None and min(self.scale) < 1:
            raise ValueError(f"data.scale={self.scale}: (long side, short side) in pixels, or None")

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`image`, and `pixel_labels` [height, width]: classes, the dtype's largest value for ignored pixels."""
        return _arrays(self.size, self.classes)

    def make(self, picture: Picture, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `View.make`. Raises LabelError if the mask has another size than the image."""
        labels = _labels_of(picture, example)
        size = scaled_size(labels.shape, self.scale, float(rng.uniform(*self.scale_range)))
        rows, columns = nearest(labels.shape[0], size[0]), nearest(labels.shape[1], size[1])
        draws = [_offset(rng, size, self.size) for _ in range(_DRAWS + 1)]
        top, left = self._crop(labels, rows, columns, draws)
        here = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        labels = labels[rows[here[0]]][:, columns[here[1]]]
        pixels = resize_bilinear(picture.pixels(), size)[here]
        if self.flip and rng.random() < 0.5:
            pixels, labels = flip_horizontally(pixels), labels[:, ::-1]
        if self.photometric:
            pixels = distort(pixels, draw_distortion(rng))
        return padded(pixels, labels, self.size, self.fill)

    def _crop(self, labels: np.ndarray, rows: np.ndarray, columns: np.ndarray, draws: list[Size]) -> Size:
        """The first of the offsets at which no class dominates, or the last one."""
        if self.max_class_share == 1:
            return draws[0]
        ignored = int(np.iinfo(labels.dtype).max)
        for top, left in draws[:-1]:
            crop = labels[rows[top : top + self.size[0]]][:, columns[left : left + self.size[1]]]
            counts = np.bincount(crop.ravel())
            counts = counts[:ignored]
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.max_class_share:
                return top, left
        return draws[-1]


@dataclasses.dataclass(frozen=True)
class SegmentationView:
    """The whole image, scaled with its proportions into `size` and padded, without randomness."""

    size: Size
    classes: int
    fill: tuple[int, int, int] = (124, 116, 104)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Those of SegmentationAugment."""
        return _arrays(self.size, self.classes)

    def make(self, picture: Picture, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `View.make`. Raises LabelError if the mask has another size than the image."""
        labels = _labels_of(picture, example)
        factor = min(self.size[0] / labels.shape[0], self.size[1] / labels.shape[1])
        height, width = (min(max(1, int(a * factor + 0.5)), b) for a, b in zip(labels.shape, self.size))
        labels = labels[nearest(labels.shape[0], height)][:, nearest(labels.shape[1], width)]
        return padded(resize_bilinear(picture.pixels(), (height, width)), labels, self.size, self.fill)


def scaled_size(size: tuple[int, ...], scale: Size | None, ratio: float = 1.0) -> Size:
    """(height, width) of an image scaled to fit into `scale` (long, short) times `ratio`, as mmcv's imrescale rounds.

    Without `scale`, its own sides times `ratio`.
    """
    height, width = size[:2]
    factor = ratio
    if scale is not None:
        long, short = int(max(scale) * ratio), int(min(scale) * ratio)
        factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest(old: int, new: int) -> np.ndarray:
    """The positions that OpenCV's nearest resizing takes: int64 [new], floor(position * old / new)."""
    return np.minimum(np.floor(np.arange(new) * (old / new)).astype(np.int64), old - 1)


def resize_bilinear(pixels: np.ndarray, size: Size) -> np.ndarray:
    """OpenCV's bilinear resize, without antialiasing, of uint8 `[height, width, 3]`, to within two levels."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(imgproc.resize(np.ascontiguousarray(pixels), size, "bilinear", False))


def padded(pixels: np.ndarray, labels: np.ndarray, size: Size, fill: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """`image` and `pixel_labels` of `size`, with `fill` and ignored pixels to the right and below."""
    height, width = labels.shape
    if (height, width) == size:
        return {"image": pixels, "pixel_labels": labels}
    image = np.empty((*size, 3), np.uint8)
    image[:] = fill
    image[:height, :width] = pixels
    full = np.full(size, np.iinfo(labels.dtype).max, labels.dtype)
    full[:height, :width] = labels
    return {"image": image, "pixel_labels": full}


def _arrays(size: Size, classes: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    dtype = np.uint8 if classes <= 254 else np.uint16
    return {"image": ((*size, 3), np.uint8), "pixel_labels": (size, dtype)}


def _labels_of(picture: Picture, example: Example) -> np.ndarray:
    labels = example.get("pixel_labels")
    if labels is None:
        raise LabelError("it has no mask")
    if labels.shape != tuple(picture.size):
        raise LabelError(wrong_size(labels.shape, picture.size))
    return labels


def _offset(rng: np.random.Generator, size: Size, crop: Size) -> Size:
    top, left = (int(rng.integers(max(side - part, 0) + 1)) for side, part in zip(size, crop))
    return top, left
