"""When the next checkpoint is due: all processes of a job must give the same answer at the same step."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


class SaveTimer:
    """Says after each step whether `every_seconds` have passed since the last save or the start.

    With several processes the clock of process 0 decides. It is asked by a broadcast, which would cost too much after
    every step, so only every few steps: after about a twentieth of the interval.

    Args:
      clock: seconds, monotonic.
    """

    def __init__(self, every_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._every_seconds, self._clock = every_seconds, clock
        self._began = self._checked_at = clock()
        self._calls, self._next_check = 0, 1

    def restart(self) -> None:
        """A state was saved or restored: the interval begins now."""
        self._began = self._clock()

    def due_within(self, seconds: float) -> float:
        """Makes the next save due after this many seconds, or the interval if that is shorter; returns the time."""
        soon = min(seconds, self._every_seconds)
        self._began = self._clock() - self._every_seconds + soon
        return soon

    def due(self, *, saving: bool) -> bool:
        """Whether a save is due. Every process calls it after every step.

        Args:
          saving: an earlier save is still being written, so the next one has to wait.
        """
        now = self._clock()
        due = now - self._began >= self._every_seconds and not saving
        if jax.process_count() == 1:
            return due
        self._calls += 1
        if self._calls < self._next_check:
            return False
        calls_per_second = self._calls / max(now - self._checked_at, 1e-6)
        calls = int(np.clip(calls_per_second * self._every_seconds / 20, 1, 256))
        due, calls = multihost_utils.broadcast_one_to_all(np.array([due, calls], np.int32))
        self._calls, self._next_check, self._checked_at = 0, int(calls), now
        return bool(due)
