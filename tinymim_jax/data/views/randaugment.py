"""RandAugment (arXiv 1909.13719) as timm 1.0 defines it: applies a few random operations to an image (numpy array).

The operations use Pillow and give the same pixels as timm's, bit for bit. All random numbers come from the generator
that the caller passes.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tinymim_jax.errors import unknown

# The magnitude at which an operation has its full strength.
FULL_MAGNITUDE = 10.0
# In a string of timm's, mstd above this means a magnitude uniform in 0..m.
_UNIFORM_ABOVE = 100.0
_GRAMMAR = "rand-m9-mstd0.5-inc1: whole numbers m, n, mmax, inc (0 or 1); others p, mstd"
_INTERPOLATIONS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draws `layers` times one of `OPERATIONS` uniformly, and applies it with probability `prob`.

    layers: number of operations drawn for each image.
    magnitude: strength, 0 to 10. Operations with a direction draw their sign at random.
    deviation: standard deviation of the normal noise added to the magnitude of each operation; infinity means a
        magnitude uniform in 0..magnitude.
    max_magnitude: magnitudes are clipped to 0..max_magnitude.
    increasing: a larger magnitude always changes the image more. If False, Posterize and Solarize are strongest at 0,
        and the factor of the four enhancements goes from 0.1 (less) to 1.9 (more).
    fill: uint8 RGB of pixels that come from outside the image.
    interpolation: for rotation, shear and translation: bilinear | bicubic | random (one of the two each time). timm
        uses that of the crop; the published fine-tuning code (MAE's and TinyMIM's util/datasets.py) sets bicubic.
    """

    magnitude: float = FULL_MAGNITUDE
    layers: int = 2
    prob: float = 0.5
    deviation: float = 0.0
    max_magnitude: float = FULL_MAGNITUDE
    increasing: bool = False
    fill: tuple[int, int, int] = (128, 128, 128)
    interpolation: str = "bicubic"

    def __post_init__(self):
        if self.interpolation not in _INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, _INTERPOLATIONS)
        if self.layers < 1:
            raise ValueError(f"RandAugment with n={self.layers} layers does nothing: omit it, or choose n of 1 or more")
        if not 0 <= self.prob <= 1:
            raise ValueError(f"RandAugment's p={self.prob} is a probability: choose 0 to 1")
        if self.max_magnitude <= 0:
            raise ValueError(f"RandAugment's mmax={self.max_magnitude} must be positive")

    @classmethod
    def parse(cls, text: str, *, mean: Sequence[float], interpolation: str = "bicubic") -> "RandAugment":
        """Parses a policy in timm's notation, such as "rand-m9-mstd0.5-inc1".

        Args:
            text: "rand" and then, in any order: -m (magnitude, a whole number; default 10), -n (layers; 2), -p (prob;
                0.5), -mstd (deviation; 0, above 100 means uniform), -mmax (max_magnitude; 10), -inc (increasing; 0).
            mean: RGB in 0..1, the fill color of pixels from outside the image, as in timm's `create_transform`.

        Raises ValueError for any other section, including timm's -t (sets of operations); the message lists the valid
        ones.
        """
        head, *sections = text.split("-")
        if head != "rand":
            raise ValueError(f"rand_augment={text!r} does not start with 'rand'. Write it like {_GRAMMAR}")
        values: dict[str, float | int | bool] = {}
        for section in sections:
            key, number = section.rstrip("0123456789."), section.lstrip(string.ascii_letters)
            if key not in _SECTIONS:
                raise unknown(f"section of rand_augment={text!r}", key, _SECTIONS)
            name, convert = _SECTIONS[key]
            if name in values:
                raise ValueError(f"rand_augment={text!r} has -{key} twice: remove one")
            try:
                values[name] = convert(number)
            except (ValueError, KeyError):
                raise ValueError(f"rand_augment={text!r}: -{key} is {number!r}. Write it like {_GRAMMAR}") from None
        if values.get("deviation", 0) > _UNIFORM_ABOVE:
            values["deviation"] = float("inf")
        red, green, blue = (min(255, round(255 * value)) for value in mean)
        return cls(**values, fill=(red, green, blue), interpolation=interpolation)  # pyright: ignore[reportArgumentType]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augments uint8 `[height, width, 3]`, keeping its shape; returns `image` itself if nothing is applied."""
        picture = None
        for choice in rng.integers(len(OPERATIONS), size=self.layers):
            # Draw all random numbers of a layer even if it is skipped, so that later layers do not depend on that.
            skipped = self.prob < 1 and rng.random() > self.prob
            magnitude = self._magnitude(rng)
            sign = -1 if rng.random() > 0.5 else 1
            samplers = _INTERPOLATIONS[self.interpolation]
            sampler = samplers[rng.integers(2)] if len(samplers) > 1 else samplers[0]
            if not skipped:
                operation = OPERATIONS[_NAMES[choice]]
                picture = Image.fromarray(image) if picture is None else picture
                argument = operation.argument(magnitude, sign, self.increasing)
                picture = operation.apply(picture, argument, sampler, self.fill)
        return image if picture is None else np.asarray(picture)

    def _magnitude(self, rng: np.random.Generator) -> float:
        magnitude = float(self.magnitude)
        if self.deviation == float("inf"):
            magnitude = rng.uniform(0, magnitude)
        elif self.deviation > 0:
            magnitude = rng.normal(magnitude, self.deviation)
        return max(0.0, min(magnitude, float(self.max_magnitude)))


@dataclasses.dataclass(frozen=True)
class Operation:
    """An image operation of RandAugment.

    argument: (magnitude, sign, increasing) -> the argument of `apply`; sign is 1 or -1.
    apply: (picture, argument, sampler, fill) -> picture of the same size.
    """

    argument: Callable[[float, int, bool], float]
    apply: Callable[[Image.Image, float, Image.Resampling, tuple[int, int, int]], Image.Image]


# ---------------------------------------------------------------------------------- magnitude to argument


def _none(magnitude: float, sign: int, increasing: bool) -> float:
    return 0.0


def _up_to(most: float) -> Callable[[float, int, bool], float]:
    """From 0 at magnitude 0 to `most` at full magnitude, with the given sign."""
    return lambda magnitude, sign, increasing: sign * (magnitude / FULL_MAGNITUDE * most)


def _enhancement(magnitude: float, sign: int, increasing: bool) -> float:
    """The factor of Pillow's ImageEnhance; 1 leaves the image unchanged."""
    if increasing:
        return max(0.1, 1.0 + sign * (magnitude / FULL_MAGNITUDE * 0.9))
    return magnitude / FULL_MAGNITUDE * 1.8 + 0.1


def _kept_bits(magnitude: float, sign: int, increasing: bool) -> float:
    bits = int(magnitude / FULL_MAGNITUDE * 4)
    return 4 - bits if increasing else bits


def _threshold(magnitude: float, sign: int, increasing: bool) -> float:
    level = min(256, int(magnitude / FULL_MAGNITUDE * 256))
    return 256 - level if increasing else level


def _addend(magnitude: float, sign: int, increasing: bool) -> float:
    return min(128, int(magnitude / FULL_MAGNITUDE * 110))


# --------------------------------------------------------------------------------------------- operations


def _posterize(picture: Image.Image, bits: float, *_) -> Image.Image:
    if bits >= 8:
        return picture
    if bits < 1:
        # Black. Pillow 13 refuses 0 bits, which timm's rule gives for about one of 600 images at the published setting.
        return picture.point([0] * 768)
    return ImageOps.posterize(picture, int(bits))


def _of_pillow(function: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    """Wraps a function of PIL.ImageOps whose only argument is the image."""
    return lambda picture, *_: function(picture)


def _solarize(picture: Image.Image, threshold: float, *_) -> Image.Image:
    return ImageOps.solarize(picture, int(threshold))


def _solarize_add(picture: Image.Image, addend: float, *_) -> Image.Image:
    """Adds `addend` to levels below 128; Pillow has no such operation."""
    return picture.point([min(level + int(addend), 255) if level < 128 else level for level in range(256)] * 3)


def _enhance(enhancement: type) -> Callable[..., Image.Image]:
    return lambda picture, factor, *_: enhancement(picture).enhance(factor)


def _rotate(picture: Image.Image, degrees: float, sampler: Image.Resampling, fill: tuple[int, int, int]) -> Image.Image:
    return picture.rotate(degrees, resample=sampler, fillcolor=fill)


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[..., Image.Image]:
    """An affine operation. `matrix`: (argument, width, height) -> Pillow's six coefficients, output to input pixels."""

    def apply(
        picture: Image.Image, argument: float, sampler: Image.Resampling, fill: tuple[int, int, int]
    ) -> Image.Image:
        numbers = matrix(argument, *picture.size)
        return picture.transform(picture.size, Image.Transform.AFFINE, numbers, resample=sampler, fillcolor=fill)

    return apply


OPERATIONS = {
    "AutoContrast": Operation(_none, _of_pillow(ImageOps.autocontrast)),
    "Equalize": Operation(_none, _of_pillow(ImageOps.equalize)),
    "Invert": Operation(_none, _of_pillow(ImageOps.invert)),
    "Rotate": Operation(_up_to(30.0), _rotate),  # degrees
    "Posterize": Operation(_kept_bits, _posterize),
    "Solarize": Operation(_threshold, _solarize),
    "SolarizeAdd": Operation(_addend, _solarize_add),
    "Color": Operation(_enhancement, _enhance(ImageEnhance.Color)),
    "Contrast": Operation(_enhancement, _enhance(ImageEnhance.Contrast)),
    "Brightness": Operation(_enhancement, _enhance(ImageEnhance.Brightness)),
    "Sharpness": Operation(_enhancement, _enhance(ImageEnhance.Sharpness)),
    "ShearX": Operation(_up_to(0.3), _affine(lambda x, width, height: (1, x, 0, 0, 1, 0))),
    "ShearY": Operation(_up_to(0.3), _affine(lambda x, width, height: (1, 0, 0, x, 1, 0))),
    # Fractions of the side. timm's `translate_const`, in pixels, applies to operations that RandAugment does not use.
    "TranslateX": Operation(_up_to(0.45), _affine(lambda x, width, height: (1, 0, x * width, 0, 1, 0))),
    "TranslateY": Operation(_up_to(0.45), _affine(lambda x, width, height: (1, 0, 0, 0, 1, x * height))),
}
_NAMES = tuple(OPERATIONS)


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


# Key of a section in timm's notation: the field of RandAugment, and the parser of its number.
_SECTIONS: dict[str, tuple[str, Callable[[str], float | int | bool]]] = {
    "m": ("magnitude", int),
    "n": ("layers", int),
    "p": ("prob", float),
    "mstd": ("deviation", float),
    "mmax": ("max_magnitude", int),
    "inc": ("increasing", _flag),
}
