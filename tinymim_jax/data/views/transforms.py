"""Turns an image of any size into the uint8 input of a model: crop, resize, flip, RandAugment.

A *view* is a stateless function of an image and a random generator that returns an image of fixed size: `Augment` for
training, `EvalView` for evaluation. Color jitter, mixup and normalization run on the device.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from kornia_rs import imgproc
from PIL import Image

from tinymim_jax.data.sources.examples import Example
from tinymim_jax.data.views.decoding import Picture
from tinymim_jax.data.views.randaugment import RandAugment
from tinymim_jax.data.views.resizers import RESIZERS, check_resizer
from tinymim_jax.errors import unknown

# Images with a smaller side are resized by Pillow: others treat borders differently, which shows in small images.
_FAST_RESIZE_MIN = 64
# A crop is taken from a reduced image only if, in both directions, it is still this many times as large as the result.
# The bicubic filter then hides most of the effect of the reduction. Pillow's `thumbnail` uses the same gap.
_REDUCING_GAP = 2
# Limit of pixels for a whole resized image; above it only the central crop is computed. An image of 30000 x 2 pixels,
# resized to a short side of 256, would take almost 3 GB.
_MAX_RESIZED = 1 << 26
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class View(Protocol):
    """Makes, from one example, a row of each array of a batch."""

    @property
    def arrays(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of a row of each array, by name. "image" is required. `label` and `valid` are added later."""
        ...

    def make(self, picture: Picture, example: Example, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        """One row of each of `arrays`. It must depend on these arguments only.

        Args:
          picture: the example's image, not decoded yet.
          example: the record of the source, which may hold more than the image, such as a mask.
          rng: the only source of random numbers.

        Raises Undecodable if a part of the example is damaged; the pipeline then uses another example.
        """
        ...


class ImageView(abc.ABC):
    """Base class of views that turn an image into an image of fixed size and need nothing else."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""

    @abc.abstractmethod
    def __call__(self, image: Picture | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Turns a picture, or its pixels uint8 `[any, any, 3]`, into uint8 `[*size, 3]`."""

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"image": ((*self.size, 3), np.uint8)}

    def make(self, picture: Picture, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": self(picture, rng)}


@dataclasses.dataclass(frozen=True)
class Augment(ImageView):
    """The training view: random resized crop, horizontal flip with probability 0.5, then RandAugment.

    image_size: side of the square result, or (height, width), in pixels.
    crop_scale, crop_ratio: bounds of the crop's fraction of the area, and of its width / height. The defaults are
        those of the published pre-training (torchvision's RandomResizedCrop, bicubic).
    flip: set to False if a mirrored image has another meaning, as with digits.
    rand_augment: a policy such as "rand-m9-mstd0.5-inc1" (`RandAugment.parse`); empty means none.
    mean: RGB in 0..1, the fill color of RandAugment.
    resizer: a name in `resizers.RESIZERS`; it must be installed.
    """

    image_size: int | tuple[int, int]
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rand_augment: str = ""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    resizer: str = "kornia"

    def __post_init__(self):
        check_resizer(self.resizer)
        _height_width(self.image_size)
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={self.crop_scale}: needs 0 < lower <= upper <= 1, fractions of the area")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio={self.crop_ratio}: needs 0 < lower <= upper, width over height")
        _ = self._policy  # parse it here, so that an invalid string raises before any worker starts

    @functools.cached_property
    def _policy(self) -> RandAugment | None:
        return RandAugment.parse(self.rand_augment, mean=self.mean) if self.rand_augment else None

    @property
    def size(self) -> tuple[int, int]:
        return _height_width(self.image_size)

    def __call__(self, image: Picture | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picture = Picture.of(image)
        box = random_resized_crop_params(rng, *picture.size, self.crop_scale, self.crop_ratio)
        view = resized_crop(picture, box, self.size, self.resizer)
        view = flip_horizontally(view) if self.flip and rng.random() < 0.5 else view
        return self._policy(view, rng) if self._policy else view


@dataclasses.dataclass(frozen=True)
class EvalView(ImageView):
    """The evaluation view: resizes the short side to `resize` pixels, then takes a center crop of `image_size`.

    The pixels equal, bit for bit, those of torchvision's Resize (antialiased) and CenterCrop on a Pillow image.

    interpolation: 'bicubic' or 'bilinear'.
    """

    image_size: int | tuple[int, int]
    resize: int
    interpolation: str = "bicubic"

    def __post_init__(self):
        if self.interpolation not in _FILTERS:
            raise unknown("interpolation", self.interpolation, _FILTERS)
        if self.resize < max(self.size):
            raise ValueError(f"resize={self.resize} must be at least the larger side of {self.image_size}")

    @property
    def size(self) -> tuple[int, int]:
        return _height_width(self.image_size)

    def __call__(self, image: Picture | np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        pixels = Picture.of(image).pixels()
        resized = short_side_size(pixels.shape[:2], self.resize)
        if resized[0] * resized[1] > _MAX_RESIZED:
            return _resized_center(pixels, resized, self.size, self.interpolation)
        return center_crop(resize_exact(pixels, resized, self.interpolation), self.size)


def random_resized_crop_params(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, drawn as by torchvision's `RandomResizedCrop.get_params`.

    The area is uniform in `scale` (fractions of the image), width / height log-uniform in `ratio`, the position
    uniform. If ten draws do not fit the image, the result is the largest center crop whose ratio is within bounds.
    """
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resized_crop(
    picture: Picture, box: tuple[int, int, int, int], size: tuple[int, int], resizer: str = "kornia"
) -> np.ndarray:
    """Crops `picture` to `box` (top, left, height, width) and resizes it to `size` (height, width) as `resize` does.

    If the crop is several times as large as `size`, the image is decoded at 1/2, 1/4 or 1/8 of its size. The result
    then differs from that of full decoding by a PSNR of about 45 dB.
    """
    top, left, height, width = box
    room = min(height / size[0], width / size[1]) / _REDUCING_GAP
    reduction = next((factor for factor in (8, 4, 2) if factor <= room), 1) if picture.reducible else 1
    if reduction == 1:
        return resize(picture.pixels(rows=top + height)[top : top + height, left : left + width], size, resizer)
    corners = (left / reduction, top / reduction, (left + width) / reduction, (top + height) / reduction)
    # Pillow's filter reaches a few pixels beyond the corners.
    return _pillow_resize(picture.pixels(reduction, rows=top + height + 8 * reduction), size, corners)


def resize(image: np.ndarray, size: tuple[int, int], resizer: str = "kornia") -> np.ndarray:
    """Antialiased bicubic (a = -0.5) resize of uint8 `[height, width, 3]` to `size` (height, width).

    If all sides have at least 64 pixels, `resizer` is used, a name in RESIZERS, which takes less than half the time of
    `resize_exact`; resizers.py says how much they differ from it. Smaller images use `resize_exact`, since the others
    are less accurate there (kornia: 43 dB on the digits).
    """
    if size != image.shape[:2] and min(*size, *image.shape[:2]) >= _FAST_RESIZE_MIN:
        return RESIZERS[resizer](image, size)
    return resize_exact(image, size)


def resize_exact(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Pillow's antialiased resize of uint8 `[height, width, 3]` to `size` (height, width)."""
    return image if size == image.shape[:2] else _pillow_resize(image, size, interpolation=interpolation)


def short_side_size(size: Sequence[int], short: int) -> tuple[int, int]:
    """(height, width) after scaling the short side to `short`; the long side is rounded down, as in torchvision."""
    height, width = size
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The center crop of `size` (height, width); offsets of half a pixel are rounded to even, as in torchvision."""
    top = round((image.shape[0] - size[0]) / 2)
    left = round((image.shape[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]


def flip_horizontally(image: np.ndarray) -> np.ndarray:
    """Mirrors uint8 `[height, width, 3]` left to right; returns a contiguous array."""
    return imgproc.horizontal_flip(np.ascontiguousarray(image))  # 10 times as fast as a copy of image[:, ::-1]


def _pillow_resize(
    image: np.ndarray,
    size: tuple[int, int],
    corners: tuple[float, float, float, float] | None = None,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Resizes the part of `image` within `corners` (left, top, right, bottom), in pixels; None means all of it."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), _FILTERS[interpolation], corners))


def _resized_center(
    image: np.ndarray, resized: tuple[int, int], size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """The center crop of `image` resized to `resized` (height, width), without computing the rest."""
    down, across = image.shape[0] / resized[0], image.shape[1] / resized[1]
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    corners = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
    return _pillow_resize(image, size, corners, interpolation)


def _height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size={image_size}: needs a positive side, or positive (height, width)")
    return height, width
