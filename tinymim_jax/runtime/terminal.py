"""A line at the bottom of a terminal that shows how far a training has come; nothing where there is no terminal."""

import contextlib
import os
import shutil
import sys
import time

from tinymim_jax.runtime.progress import format_seconds

_SECONDS = 0.2  # between two drawings
_CELLS = 24
_ERASE = "\r\x1b[K"

_shown = False


class Bar:
    """A bar with step, speed and remaining time. Log lines appear above it (`startup.start_logging` erases it first).

    total: steps of the run.
    batch_size: images of a step.
    """

    def __init__(self, total: int, batch_size: int):
        self._total, self._batch_size = total, batch_size
        self._drawn_at = 0.0
        self._first: tuple[int, float] | None = None

    def update(self, step: int) -> None:
        """Draws the bar after `step`, at most five times a second."""
        now = time.monotonic()
        if now - self._drawn_at < _SECONDS or not is_terminal():
            return
        self._first = self._first or (step, now)
        self._drawn_at = now
        _draw(self.text(step, now))

    def text(self, step: int, now: float) -> str:
        """Such as "step 250/1000 [######------------------] 25% | 310 images/s | ETA 2m05s"."""
        share = min(1.0, step / max(self._total, 1))
        full = int(_CELLS * share)
        words = [f"step {step}/{self._total} [{'#' * full}{'-' * (_CELLS - full)}] {share:.0%}"]
        begun, at = self._first or (step, now)
        if step > begun and now > at:
            per_step = (now - at) / (step - begun)
            words += [
                f"{self._batch_size / per_step:,.0f} images/s",
                f"ETA {format_seconds(per_step * (self._total - step))}",
            ]
        return " | ".join(words)

    def restart(self) -> None:
        """Measures the speed anew, after an evaluation; erases the bar."""
        self._first = None
        erase()


def is_terminal() -> bool:
    """Whether standard output is a terminal that can erase a line."""
    with contextlib.suppress(AttributeError, ValueError):  # closed, or replaced by a test
        return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return False


def erase() -> None:
    """Removes the bar, if one is shown, so that other output begins at the left."""
    global _shown
    if _shown:
        _shown = False
        _write(_ERASE)


def _draw(text: str) -> None:
    global _shown
    _shown = True
    _write(_ERASE + text[: shutil.get_terminal_size().columns - 1])


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()
