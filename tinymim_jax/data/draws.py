"""Random numbers that are addressed, not consumed: each has a place, and no generator's state is ever kept."""

import functools
from typing import Literal

import numpy as np

_PURPOSES = {"view": 0, "order": 1, "subset": 2}


def philox(seed: int, purpose: Literal["view", "order", "subset"], index: int = 0) -> np.random.Philox:
    """The bit generator at (seed, purpose, index): for "view" the global example index, for "order" the epoch."""
    # The lowest word of the counter counts blocks of output; the highest keeps the purposes apart.
    key = np.array([seed, index], np.uint64)  # explicit, since a list with a large seed would pass as float64
    return np.random.Philox(key=key, counter=[0, 0, 0, _PURPOSES[purpose]])


def permutation(length: int, generator: np.random.Philox) -> np.ndarray:
    """A random order of `range(length)`, int64.

    Made by sorting raw output, which numpy promises never to change, as it does not for `Generator.permutation`.
    """
    return np.argsort(generator.random_raw(length), kind="stable")


class ShuffledIndices:
    """`range(length)` repeated for ever, every epoch in an order of its own: item n is the index of example n.

    Grain's shuffle, which computes one index at a time, is exact too, but its cipher works on at least 2**16
    values and is walked until it falls into `range(length)`: a millisecond for each index of 100.
    """

    def __init__(self, length: int, seed: int):
        self._length = length
        self._seed = seed

    def __getitem__(self, n: int) -> int:
        epoch, position = divmod(n, self._length)
        return int(_epoch_order(self._length, self._seed, epoch)[position])


# The threads of a process work on two epochs at most; 10 MB and 0.2 s each for ImageNet.
@functools.lru_cache(maxsize=4)
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(length, philox(seed, "order", epoch))
