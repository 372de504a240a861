"""From an image of any size to the uint8 pixels a model is shown.

A *view* is a record that turns an image into one of fixed size: `Augment` for training, `EvalView` for
evaluation. It is called with the image and a random generator and keeps no state, so what it returns
depends on these alone. Colour jitter, mixup and normalising belong to the device.
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
from tinymim_jax.errors import unknown

# Below this many pixels the borders, which kornia weighs in its own way, are too large a part of the result.
_FAST_RESIZE_MIN = 64
# A crop is taken from a reduced picture only where it is still so many times as large as the result, in both
# directions: then the bicubic filter averages over what the decoder averaged already. Pillow's thumbnails do so too.
_REDUCING_GAP = 2
# A strip of 30000 x 2 pixels resized to a short side of 256 would take a gigabyte: larger than this, only what the
# crop keeps of it is made.
_MAX_RESIZED = 1 << 26
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class View(Protocol):
    """From one example to its row in each array of a batch."""

    @property
    def arrays(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of a row of each array, by name; "image" is one of them. The pipeline adds `label`."""
        ...

    def make(self, picture: Picture, example: Example, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        """One row of each of `arrays`, a function of these arguments alone.

        Args:
          picture: the example's image, not yet decoded.
          example: the record that the source gave, for what else it holds, such as a mask.

        Raises Undecodable where a part of the example is damaged: another example then takes its place.
        """
        ...


class ImageView(abc.ABC):
    """A view that needs nothing but the image, and makes nothing but an image of one size."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""

    @abc.abstractmethod
    def __call__(self, image: Picture | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A picture, or its pixels uint8 `[any, any, 3]`, to uint8 `[*size, 3]`."""

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"image": ((*self.size, 3), np.uint8)}

    def make(self, picture: Picture, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": self(picture, rng)}


@dataclasses.dataclass(frozen=True)
class Augment(ImageView):
    """The training view: a random resized crop, then a horizontal flip of every second image, then RandAugment.

    image_size: side of the square result, or (height, width).
    crop_scale, crop_ratio: bounds of the crop's share of the area and of its width / height. The defaults are
        the published pre-training's (torchvision's RandomResizedCrop, bicubic).
    flip: False where left and right mean something, as in digits.
    rand_augment: such as "rand-m9-mstd0.5-inc1" (`RandAugment.parse`); empty: none.
    mean: RGB in 0..1, what RandAugment fills with.
    """

    image_size: int | tuple[int, int]
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rand_augment: str = ""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)

    def __post_init__(self):
        _height_width(self.image_size)
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={self.crop_scale}: needs 0 < lower <= upper <= 1, parts of the area")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio={self.crop_ratio}: needs 0 < lower <= upper, width over height")
        _ = self._policy  # a mistaken string is refused here, not by a worker

    @functools.cached_property
    def _policy(self) -> RandAugment | None:
        return RandAugment.parse(self.rand_augment, mean=self.mean) if self.rand_augment else None

    @property
    def size(self) -> tuple[int, int]:
        return _height_width(self.image_size)

    def __call__(self, image: Picture | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picture = Picture.of(image)
        box = random_resized_crop_params(rng, *picture.size, self.crop_scale, self.crop_ratio)
        view = resized_crop(picture, box, self.size)
        view = flip_horizontally(view) if self.flip and rng.random() < 0.5 else view
        return self._policy(view, rng) if self._policy else view


@dataclasses.dataclass(frozen=True)
class EvalView(ImageView):
    """The evaluation view: the short side resized to `resize` pixels, then the central `image_size` of it.

    Bit for bit what torchvision's Resize (antialiased) and CenterCrop give for a Pillow image.

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
    """Top, left, height and width of a random crop, as torchvision's `RandomResizedCrop.get_params` draws it.

    Area uniform in `scale` (a part of the whole), width / height log-uniform in `ratio`, position uniform. If
    ten draws do not fit the image: the largest central crop whose ratio is within bounds.
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


def resized_crop(picture: Picture, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """The part of `picture` at `box` (top, left, height, width), resized to `size` (height, width) as by `resize`.

    Where the part is many times as large as `size` the picture is decoded at a half, a quarter or an eighth:
    within some 45 dB of the same from all its pixels.
    """
    top, left, height, width = box
    room = min(height / size[0], width / size[1]) / _REDUCING_GAP
    reduction = next((factor for factor in (8, 4, 2) if factor <= room), 1) if picture.reducible else 1
    if reduction == 1:
        return resize(picture.pixels(rows=top + height)[top : top + height, left : left + width], size)
    corners = (left / reduction, top / reduction, (left + width) / reduction, (top + height) / reduction)
    # Pillow's filter reaches a few pixels beyond the corners.
    return _pillow_resize(picture.pixels(reduction, rows=top + height + 8 * reduction), size, corners)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bicubic (a = -0.5) resize of uint8 `[height, width, 3]` to `size` (height, width).

    The pixels of `resize_exact`, or, where no side is small, within some 68 dB of them on photographs and
    in less than half the time. Small images are always exact: there the fast kernel departs (43 dB on the digits).
    """
    if size != image.shape[:2] and min(*size, *image.shape[:2]) >= _FAST_RESIZE_MIN:
        return np.asarray(imgproc.resize(np.ascontiguousarray(image), size, "bicubic", True))
    return resize_exact(image, size)


def resize_exact(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Pillow's antialiased resize of uint8 `[height, width, 3]` to `size` (height, width)."""
    return image if size == image.shape[:2] else _pillow_resize(image, size, interpolation=interpolation)


def short_side_size(size: Sequence[int], short: int) -> tuple[int, int]:
    """(height, width) with the short side scaled to `short`; the long one truncated, as torchvision does."""
    height, width = size
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The central `size` (height, width); halves are rounded to even offsets, as torchvision does."""
    top = round((image.shape[0] - size[0]) / 2)
    left = round((image.shape[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]


def flip_horizontally(image: np.ndarray) -> np.ndarray:
    """uint8 `[height, width, 3]` with left and right exchanged, as a contiguous array."""
    return imgproc.horizontal_flip(np.ascontiguousarray(image))  # 10 times as fast as a copy of image[:, ::-1]


def _pillow_resize(
    image: np.ndarray,
    size: tuple[int, int],
    corners: tuple[float, float, float, float] | None = None,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Of the part between `corners` (left, top, right, bottom), in pixels; None is all."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), _FILTERS[interpolation], corners))


def _resized_center(
    image: np.ndarray, resized: tuple[int, int], size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """`center_crop` of `image` at `resized`, without making the rest."""
    down, across = image.shape[0] / resized[0], image.shape[1] / resized[1]
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    corners = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
    return _pillow_resize(image, size, corners, interpolation)


def _height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size={image_size}: needs a positive side, or (height, width)")
    return height, width
