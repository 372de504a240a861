"""Durations in epochs or steps, times as text, and the speed and remaining time of a run."""

import contextlib
import re
import time
from collections.abc import Iterator

_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(epochs?|steps?)\s*")


def steps(duration: str, *, examples: int, batch_size: int, name: str = "duration") -> int:
    """Converts a duration such as "300 epochs" or "700 steps" to steps; epochs are rounded down to whole steps.

    `name` is the config key, for the error message.
    """
    amount, unit = read_duration(duration, name=name)
    return int(amount * examples / batch_size) if unit == "epochs" else int(amount)


def read_duration(duration: str, *, name: str = "duration") -> tuple[float, str]:
    """(300.0, "epochs") of "300 epochs"; `name` is the config key, for the error message."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{name}={duration!r} is not a duration: write it like '300 epochs' or '700 steps'")
    return float(match[1]), match[2].rstrip("s") + "s"


def format_seconds(seconds: float) -> str:
    """85 -> '1m25s', 7300 -> '2h01m', 200000 -> '2d07h'."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class Progress:
    """Measures speed and remaining time between calls of `report`."""

    def __init__(self, total_steps: int, batch_size: int, start_step: int):
        self._total, self._batch_size = total_steps, batch_size
        self.restart(start_step)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside the block as waiting for data."""
        began = time.perf_counter()
        yield
        waited = time.perf_counter() - began
        self._waited += waited
        self._longest_wait = max(self._longest_wait, waited)

    def restart(self, step: int) -> None:
        """Starts measuring anew, after compiling or an evaluation."""
        self._step, self._time, self._waited, self._longest_wait = step, time.perf_counter(), 0.0, 0.0

    def report(self, step: int) -> tuple[dict[str, float], str]:
        """Time spent waiting for data since the last call, speed and remaining seconds: as figures and as text.

        Directly after `restart` no step has been measured: there is no speed then, nor a remaining time.
        """
        elapsed, steps = max(time.perf_counter() - self._time, 1e-9), step - self._step
        numbers = {"data_wait": self._waited / elapsed, "longest_data_wait_seconds": self._longest_wait}
        self.restart(step)
        if steps < 1:
            return numbers, "speed not measured yet"
        per_step = elapsed / steps
        numbers |= {"images_per_second": self._batch_size / per_step, "eta_seconds": per_step * (self._total - step)}
        text = (
            f"{numbers['images_per_second']:,.0f} images/s | data wait {numbers['data_wait']:.0%} | "
            f"ETA {format_seconds(numbers['eta_seconds'])}"
        )
        return numbers, text


DATA_WAIT_LIMIT = 0.1  # above this share of time spent waiting for data, advice is logged


def input_advice(data_wait: float, *, workers: int, cores: int) -> str:
    """Advice for a run that waits for data during the share `data_wait` of its time; `workers` processes decode."""
    remedies = [
        "tinymim prepare SOURCE --output DIR --short_side 256 (smaller files, decoded in less than half the time)",
        "data.crops=2 (two views of each decoded image)",
    ]
    if workers < cores:
        remedies.insert(0, f"--workers {cores} (processes that decode; {workers} now, on {cores} cores)")
    return f"input is the bottleneck: {data_wait:.0%} of the time was spent waiting for images. Try " + "; or ".join(
        remedies
    )
