"""Photometric distortion of mmsegmentation: random brightness, contrast, saturation and hue of uint8 pixels.

Follows OpenCV's 8-bit arithmetic, with hue in steps of two degrees, so that the results are OpenCV's to about a level.
"""

import dataclasses

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
        hue, saturation, value = _to_hsv(pixels)
        if draws.saturation is not None:
            saturation = _scaled(draws.saturation, 0.0)[saturation]
        if draws.hue is not None:
            hue = (hue + draws.hue) % _HALF_CIRCLE
        pixels = _to_rgb(hue, saturation, value)
    if draws.contrast is not None and not draws.contrast_first:
        pixels = _scaled(draws.contrast, 0.0)[pixels]
    return pixels


def _scaled(factor: float, added: float) -> np.ndarray:
    """The result of value * factor + added for every uint8 value, clipped and rounded down: uint8 [256]."""
    return (np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(added)).clip(0, 255).astype(np.uint8)


# OpenCV divides by tables of fixed-point reciprocals (color_hsv.simd.hpp).
_SHIFT = 12
_OF_VALUE = np.rint((255 << _SHIFT) / np.maximum(np.arange(256), 1)).astype(np.int32) * (np.arange(256) > 0)
_OF_RANGE = np.rint((180 << _SHIFT) / (6 * np.maximum(np.arange(256), 1))).astype(np.int32) * (np.arange(256) > 0)


def _to_hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue int32 of 0 to 179, saturation and value uint8, each `[height, width]`."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_SHIFT - 1)
    saturation = (spread * _OF_VALUE[value] + half) >> _SHIFT
    hue = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    hue = (hue * _OF_RANGE[spread] + half) >> _SHIFT
    hue += _HALF_CIRCLE * (hue < 0)
    return hue, saturation.clip(0, 255).astype(np.uint8), value.astype(np.uint8)


# Which of [value, value (1 - s), value (1 - s f), value (1 - s (1 - f))] red, green and blue are, in each sixth.
_SECTORS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])


def _to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    sixth = hue.astype(np.float32) * np.float32(6 / _HALF_CIRCLE)
    sector = np.floor(sixth)
    part = sixth - sector
    s, v = saturation * np.float32(1 / 255), value.astype(np.float32)
    weights = np.stack([v, v * (1 - s), v * (1 - s * part), v * (1 - s * (1 - part))], axis=-1)
    chosen = np.take_along_axis(weights, _SECTORS[sector.astype(np.int8) % 6], axis=-1)
    return chosen.clip(0, 255).astype(np.uint8)  # rounded down, as in OpenCV's vector code
