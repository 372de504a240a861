"""Extrapolates a curve of accuracies to more steps, with a 90 % interval."""

import dataclasses
from collections.abc import Sequence

import numpy as np

FEWEST_POINTS = 3
"""Smallest number of points of a curve that can be extrapolated."""

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

    The interval comes from fits to resampled curves: each accuracy is drawn from the binomial distribution of
    `examples` images, and a residual of the original fit is added to each result. Residuals show how well a power law
    describes the curve.

    Args:
      steps, accuracies: at least three points, at different steps above 0.
      examples: number of images on which each accuracy was measured.
      ceiling: upper bound of A (a student is rarely better than its teacher), unless the curve exceeds it already.

    Raises ValueError for fewer than three points.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(accuracies, np.float64)
    if len(x) != len(y) or len(np.unique(x)) < FEWEST_POINTS or x.min() <= 0:
        raise ValueError(f"steps {list(steps)}: a curve of at least three accuracies at different steps is needed")
    top = max(ceiling, float(y.max()))
    (value,), (residuals,) = _fitted(x, y[None], at, np.array([top]))
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(examples, np.clip(y, 0.0, 1.0), (_RESAMPLED, len(y))) / examples
    results = _fitted(x, drawn, at, np.maximum(top, drawn.max(axis=1)))[0] + rng.choice(residuals, _RESAMPLED)
    low, high = np.clip(np.percentile(results, _INTERVAL), 0.0, 1.0)
    return Forecast(float(value), float(min(low, value)), float(max(high, value)))


def _fitted(x: np.ndarray, curves: np.ndarray, at: float, ceiling: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values at `at` [n], residuals [n, points]) of the best A - B * x^-c, B >= 0 and A <= ceiling, for n curves."""
    error = np.full(len(curves), np.inf)
    value, residuals = np.zeros(len(curves)), np.zeros_like(curves)
    means = curves.mean(axis=1)
    for c in _EXPONENTS:
        falling = (x / x.max()) ** -c
        centred = falling - falling.mean()
        b = -(curves @ centred) / (centred @ centred)
        a = means + b * falling.mean()
        # If A would be above the ceiling, it is the ceiling, and B is fitted for that.
        capped = ((ceiling[:, None] - curves) @ falling) / (falling @ falling)
        a, b = np.where(a > ceiling, ceiling, a), np.where(a > ceiling, capped, b)
        a, b = np.where(b < 0, means, a), np.maximum(b, 0.0)
        left = curves - (a[:, None] - b[:, None] * falling)
        found = (left**2).sum(axis=1)
        better = found < error - 1e-12
        error = np.where(better, found, error)
        value = np.where(better, a - b * (at / x.max()) ** -c, value)
        residuals = np.where(better[:, None], left, residuals)
    return np.minimum(value, ceiling), residuals
