"""Finds the largest batch that fits into memory with few compilations."""

import dataclasses
import math
from collections.abc import Callable

_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Fit:
    """Images per chip and micro-batch, and the bytes that each chip needs for them."""

    images: int
    needed: int


def largest_batch(needed: Callable[[int], float], start: int, limit: float, *, tries: int = _TRIES) -> Fit | None:
    """The largest number of images for which `needed(images)` is within `limit`, to about 5 %; None if not even one is.

    Memory is nearly linear in the number of images: each guess is taken from the line through the two points nearest to
    the limit and then evaluated. The result is always a number that was evaluated.

    Args:
      needed: images -> bytes, infinite if unknown; each call is a compilation.
      start: the first guess.
      tries: maximum number of further guesses.
    """
    seen: dict[int, float] = {}
    guess = max(1, start)
    for _ in range(1 + tries):
        seen[guess] = needed(guess)
        guess = _next_guess(seen, limit)
        if guess in seen:
            break
    fitting = [images for images, size in seen.items() if size <= limit]
    return Fit(max(fitting), int(seen[max(fitting)])) if fitting else None


def _next_guess(seen: dict[int, float], limit: float) -> int:
    fitting = max((images for images, size in seen.items() if size <= limit), default=0)
    above = min((images for images, size in seen.items() if size > limit), default=0)
    points = sorted((images, size) for images, size in seen.items() if size < float("inf"))
    if len(points) > 1:
        # The two points nearest to the limit give the best line.
        (low, small), (high, large) = sorted(sorted(points, key=lambda point: abs(point[1] - limit))[:2])
        slope = (large - small) / (high - low)
        guess = int(low + (0.985 * limit - small) / slope) if slope > 0 else 2 * high
    elif points:
        # With a single point assume memory proportional to the images: too few if it fits, too many if it does not.
        guess = int(points[0][0] * limit / points[0][1] * (1.0 if fitting else 0.9))
    else:
        guess = above // 2
    guess = _rounded(guess)
    if guess < 1.05 * fitting:
        return fitting
    if above and guess >= above:
        # Memory is not linear here: near the limit compilers recompute what they would otherwise keep.
        guess = _rounded(math.isqrt(fitting * above) if fitting else above // 2)
    return fitting if guess < 1.05 * fitting else guess


def _rounded(images: int) -> int:
    """Rounds down to a multiple of 8, or to a power of two below 8, which chips handle well."""
    images = max(1, images)
    return images // 8 * 8 if images >= 8 else 1 << (images.bit_length() - 1)
