"""Continues a learning curve of accuracies to more steps, with an interval."""

import dataclasses
from collections.abc import Sequence

import numpy as np

_EXPONENTS = np.linspace(0.1, 1.5, 15)
_RESAMPLED = 400
_INTERVAL = (5, 95)  # percentiles


@dataclasses.dataclass(frozen=True)
class Forecast:
    """An accuracy, and the bounds of its 90 % interval."""

    value: float
    low: float
    high: float


def forecast(
    steps: Sequence[float], accuracies: Sequence[float], *, at: float, examples: int, ceiling: float, seed: int = 0
) -> Forecast:
    """The accuracy after `at` steps, from a power law A - B * steps^-c that is fitted by least squares.

    The interval comes from fits to resampled curves: each accuracy is drawn anew as that of `examples` images, and the
    residuals of the fit, which also tell how far the curve is from a power law, are added to the result.

    Args:
      steps, accuracies: at least three points, at different steps above 0.
      examples: images on which each accuracy was measured.
      ceiling: A is at most this (a student hardly surpasses its teacher), unless the curve is above it already.

    Raises ValueError for fewer than three points.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(accuracies, np.float64)
    if len(x) != len(y) or len(np.unique(x)) < 3 or x.min() <= 0:
        raise ValueError(f"steps {list(steps)}: a curve of at least three accuracies at different steps is needed")
    top = max(ceiling, float(y.max()))
    value, residuals = _fitted(x, y, at, top)
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(examples, np.clip(y, 0.0, 1.0), (_RESAMPLED, len(y))) / examples
    results = [_fitted(x, row, at, max(top, float(row.max())))[0] for row in drawn]
    results = np.asarray(results) + rng.choice(residuals, _RESAMPLED)
    low, high = np.clip(np.percentile(results, _INTERVAL), 0.0, 1.0)
    return Forecast(value, float(min(low, value)), float(max(high, value)))


def _fitted(x: np.ndarray, y: np.ndarray, at: float, ceiling: float) -> tuple[float, np.ndarray]:
    """(value at `at`, residuals) of the best A - B * x^-c with B >= 0 and A <= ceiling."""
    best, found = np.inf, (float(y.mean()), y - y.mean())
    for c in _EXPONENTS:
        falling = (x / x.max()) ** -c
        design = np.stack([np.ones_like(x), -falling], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
        if a > ceiling:  # the best B for the largest allowed A
            a, b = ceiling, float(((ceiling - y) @ falling) / (falling @ falling))
        if b < 0:
            a, b = float(y.mean()), 0.0
        residuals = y - (a - b * falling)
        if (error := float(residuals @ residuals)) < best - 1e-12:
            best, found = error, (float(a - b * (at / x.max()) ** -c), residuals)
    return min(found[0], ceiling), found[1]
