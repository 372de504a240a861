"""Photometric distortion of mmsegmentation: random brightness, contrast, saturation and hue of uint8 pixels.

Follows OpenCV's 8-bit arithmetic, with hue in steps of two degrees, so that the results are OpenCV's to about a level.
"""

import dataclasses
import functools

import numpy as np

_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)  # of contrast and of saturation
_HUE = 18  # steps of two degrees
_HALF_CIRCLE = 180  # steps of a full turn


@dataclasses.dataclass(frozen=True)
class Distortion:
    """The draws of one image; None: not applied.

    brightness: added to all channels. contrast, saturation: factors. hue: whole steps of two degrees, added.
    contrast_first: contrast is applied before saturation and hue, not after.
    """

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: int | None = None
    contrast_first: bool = False


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Each of the four with probability 1/2, with the published ranges: +-32, 0.5 to 1.5 twice, +-36 degrees."""
    brightness = float(rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)) if rng.random() < 0.5 else None
    contrast, saturation = (float(rng.uniform(*_FACTOR)) if rng.random() < 0.5 else None for _ in range(2))
    hue = int(rng.integers(-_HUE, _HUE)) if rng.random() < 0.5 else None
    return Distortion(brightness, contrast, saturation, hue, bool(rng.random() < 0.5))


def distort(pixels: np.ndarray, draws: Distortion) -> np.ndarray:
    """RGB uint8 `[height, width, 3]`, distorted."""
    table = _scaled(1.0, draws.brightness or 0.0)
    if draws.contrast is not None and draws.contrast_first:
        table = _scaled(draws.contrast, 0.0)[table]
    if draws.brightness is not None or (draws.contrast is not None and draws.contrast_first):
        pixels = table[pixels]
    if draws.saturation is not None or draws.hue is not None:
        pixels = _turned(pixels, draws.hue or 0, draws.saturation)
    if draws.contrast is not None and not draws.contrast_first:
        pixels = _scaled(draws.contrast, 0.0)[pixels]
    return pixels


def _scaled(factor: float, added: float) -> np.ndarray:
    """The result of value * factor + added for every uint8 value, clipped and rounded down: uint8 [256]."""
    return (np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(added)).clip(0, 255).astype(np.uint8)


_ROWS = 32  # at a time, so that intermediate arrays stay in the processor's cache


def _turned(pixels: np.ndarray, hue: int, saturation: float | None) -> np.ndarray:
    """To hue, saturation and value, changed, and back, all by tables."""
    of_hue, of_saturation = _hue_table(), _saturation_table()
    if saturation is not None:
        of_saturation = _scaled(saturation, 0.0)[of_saturation]
    strength = of_saturation * np.float32(1 / 255)
    weights = np.roll(_weights(), -hue, axis=0)
    result = np.empty_like(pixels)
    for top in range(0, len(pixels), _ROWS):
        part = pixels[top : top + _ROWS]
        red, green, blue = (part[..., channel].astype(np.int16) for channel in range(3))
        value = np.maximum(np.maximum(red, green), blue)
        least = np.minimum(np.minimum(red, green), blue)
        is_red, is_green = value == red, value == green
        sector = np.where(is_red, 0, np.where(is_green, 1, 2))
        difference = np.where(is_red, green - blue, np.where(is_green, blue - red, red - green))
        turned = np.take(of_hue, ((sector * 511 + difference + 255) << 8) + (value - least))
        s = np.take(strength, (value.astype(np.int32) << 8) + least)
        changed = value[..., None] * (1 - s[..., None] * np.take(weights, turned, axis=0))
        result[top : top + _ROWS] = changed.clip(0, 255)  # rounded down, as in OpenCV's vector code
    return result


# OpenCV divides by fixed-point reciprocals (color_hsv.simd.hpp).
_SHIFT, _HALF = 12, 1 << 11


@functools.cache
def _hue_table() -> np.ndarray:
    """int16: hue of 0 to 179 by (largest channel, difference of the other two + 255, largest - smallest channel)."""
    spread = np.arange(256)
    reciprocal = np.rint((180 << _SHIFT) / (6 * np.maximum(spread, 1))).astype(np.int64) * (spread > 0)
    difference = np.arange(-255, 256)[:, None]
    hues = [((difference + 2 * sector * spread) * reciprocal + _HALF) >> _SHIFT for sector in range(3)]
    hue = np.stack(hues)
    return ((hue + _HALF_CIRCLE * (hue < 0)) % _HALF_CIRCLE).astype(np.int16).ravel()


@functools.cache
def _saturation_table() -> np.ndarray:
    """uint8: saturation by (largest channel, smallest channel)."""
    value, least = np.arange(256)[:, None], np.arange(256)
    reciprocal = np.rint((255 << _SHIFT) / np.maximum(value, 1)).astype(np.int64) * (value > 0)
    return (((value - least) * reciprocal + _HALF) >> _SHIFT).clip(0, 255).astype(np.uint8).ravel()


@functools.cache
def _weights() -> np.ndarray:
    """float32 [180, 3]: how much of the saturation is taken from red, green and blue at each hue."""
    sixths = np.arange(_HALF_CIRCLE, dtype=np.float32)[:, None] * np.float32(6 / _HALF_CIRCLE)
    place = (np.array([5, 3, 1], np.float32) + sixths) % 6
    return np.minimum(place, 4 - place).clip(0, 1).astype(np.float32)
