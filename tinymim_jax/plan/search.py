"""Which batch fits, and what to change where the wanted one does not: as few compilations as will do."""

import dataclasses
import math
from collections.abc import Callable

_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Fit:
    """Images of each chip at a time, and the bytes that they need there."""

    images: int
    needed: int


def largest_batch(needed: Callable[[int], float], start: int, limit: float, *, tries: int = _TRIES) -> Fit | None:
    """The largest number of images for which `needed(images)` is within `limit`, to about 5 %; None where not one is.

    Memory is nearly a line in the number of images: each guess lies on the line through the two nearest points and is
    then looked up. The answer was looked up, always.

    Args:
      needed: bytes; it may be infinite where they are not known.
      start: the first guess.
      tries: at most so many further ones.
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
        # The two that lie nearest to the limit say most about it.
        (low, small), (high, large) = sorted(sorted(points, key=lambda point: abs(point[1] - limit))[:2])
        slope = (large - small) / (high - low)
        guess = int(low + (0.985 * limit - small) / slope) if slope > 0 else 2 * high
    elif points:
        # A line through one point and some bytes for nothing: too few where it fits, too many where it does not.
        guess = int(points[0][0] * limit / points[0][1] * (1.0 if fitting else 0.9))
    else:
        guess = above // 2
    guess = _rounded(guess)
    if guess < 1.05 * fitting:
        return fitting
    if above and guess >= above:
        # No line: near the limit compilers compute again what they would otherwise keep.
        guess = _rounded(math.isqrt(fitting * above) if fitting else above // 2)
    return fitting if guess < 1.05 * fitting else guess


def _rounded(images: int) -> int:
    """Down to what chips like: multiples of 8, or a power of two below."""
    images = max(1, images)
    return images // 8 * 8 if images >= 8 else 1 << (images.bit_length() - 1)
