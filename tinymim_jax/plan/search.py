"""Which batch fits, and what to change where the wanted one does not: as few compilations as will do."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

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


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that may make a step fit: words for the command line, and what it costs."""

    words: tuple[str, ...]
    changes: dict[str, Any]
    cost: str
    fsdp: int = 1


def remedies(config: ConfigDict, chips: int, per_host: int, fsdp: int, fitting: int) -> Iterator[Remedy]:
    """What may be changed, the cheapest first. Nothing before the last one changes what is learned.

    Args:
      per_host: chips that may share one copy of the parameters.
      fitting: images on each chip that are known to fit; 0: none.
    """
    if "remat" in config.model:  # a linear probe has no gradient in its encoder, so nothing to compute again
        order, now = ("none", "dots", "full"), config.model.remat
        for remat in order[order.index(now) + 1 :]:
            cost = "elementwise work is done twice" if remat == "dots" else "the student's forward pass is done twice"
            yield Remedy((f"model.remat={remat}",), {"model.remat": remat}, cost)
        if not config.model.scan:
            changes = {"model.scan": True, "model.remat": "full"}
            yield Remedy(_words(changes), changes, "the student's forward pass is done twice, parameters are stacked")
    if fsdp == 1 and chips > 1:
        shared = max(n for n in range(1, per_host + 1) if chips % n == 0)
        yield Remedy((f"--fsdp {shared}",), {}, "parameters are gathered where they are used", shared)
    batch, parts = config.train.batch_size, config.train.accumulate
    per_chip = batch // chips
    for more in range(parts + 1, per_chip + 1):
        if per_chip % more == 0 and fitting and per_chip // more <= fitting:
            yield Remedy((f"train.accumulate={more}",), {"train.accumulate": more}, "the parts follow one another")
            break
    if fitting:
        smaller = fitting * chips * parts
        cost = "another batch is another experiment: optim.base_lr is scaled by it"
        yield Remedy((f"train.batch_size={smaller}",), {"train.batch_size": smaller}, cost)


def _words(changes: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in changes.items())
