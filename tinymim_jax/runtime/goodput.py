"""How much of the wall time of a run was spent in steps, and on what else, over all attempts in one workdir."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinymim_jax.runtime.progress import format_seconds

# start: opening data, restoring; input, checkpoint: only while the device had nothing to do; redone: steps that a
# killed attempt had done after its last checkpoint; downtime: between attempts.
LOSSES: tuple[str, ...] = ("start", "compile", "input", "checkpoint", "evaluation", "redone", "downtime")
_STEPS = "steps"


class Goodput:
    """Seconds by kind. The loop marks everything it does besides steps; the remaining time counts as steps.

    The host runs ahead of the device, so waiting for the next batch costs nothing while a step is running. A thread
    records when each step ends, and only the part of a wait after that is counted.

    Args:
      before: what `seconds` returned at the end of the previous attempt.
      clock: seconds, monotonic.
    """

    def __init__(self, before: Mapping[str, float] | None = None, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._before = {name: float((before or {}).get(name, 0.0)) for name in (*LOSSES, _STEPS)}
        self._lost: dict[str, float] = dict.fromkeys(LOSSES, 0.0)
        self._began = clock()
        self._now: tuple[str, float] | None = None
        self._dispatched = self._finished = 0
        self._finished_at = self._began
        self._last: Any = None
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._recorded = threading.Condition()
        self._thread = threading.Thread(target=self._record_ends, name="steps", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def lost_to(self, kind: str) -> Iterator[None]:
        """Counts the time inside the block as lost to `kind`, one of LOSSES."""
        began = self._clock()
        self._now = (kind, began)
        try:
            yield
        finally:
            self._now = None
            self._lost[kind] += self._clock() - began

    @contextlib.contextmanager
    def lost_if_idle(self, kind: str) -> Iterator[None]:
        """Counts the time inside the block as lost to `kind`, except while a step is running on the device."""
        began = self._clock()
        yield
        ended = self._clock()
        with self._recorded:
            if self._finished < self._dispatched and self._last.is_ready():
                self._recorded.wait(timeout=0.1)  # the thread is about to record it
            if self._finished == self._dispatched:
                self._lost[kind] += max(0.0, ended - max(began, self._finished_at))

    def dispatched(self, result: Any) -> None:
        """Call it when a step was dispatched, with an array of its results that the next step does not donate."""
        self._dispatched += 1
        self._last = result
        self._results.put(result)

    def add_lost(self, kind: str, seconds: float) -> None:
        """Counts the last `seconds` as lost to `kind`."""
        self._lost[kind] += seconds

    def charge(self, kind: str, seconds: float) -> None:
        """Moves seconds of earlier attempts from steps to `kind`; downtime is added."""
        seconds = max(0.0, seconds)  # the machine's clock may have been set back
        if kind != "downtime":
            seconds = min(seconds, self._before[_STEPS])
            self._before[_STEPS] -= seconds
        self._before[kind] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by kind until now; any thread may call it."""
        now, lost = self._clock(), dict(self._lost)
        if (doing := self._now) is not None:
            lost[doing[0]] += now - doing[1]
        steps = max(0.0, now - self._began - sum(lost.values()))
        return {name: self._before[name] + ({_STEPS: steps} | lost)[name] for name in (_STEPS, *LOSSES)}

    def close(self) -> None:
        """Ends the thread that watches the steps."""
        self._results.put(None)
        self._thread.join(timeout=1)

    def _record_ends(self) -> None:
        while (result := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # the loop raises the same error
                result.block_until_ready()
            with self._recorded:
                self._finished += 1
                self._finished_at = self._clock()
                self._recorded.notify_all()


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Shares of the time, which sum to 1: {"goodput": in steps, "lost/input": ..., ...}."""
    total = max(sum(seconds.values()), 1e-9)
    return {"goodput": seconds.get(_STEPS, 0.0) / total} | {
        f"lost/{name}": seconds.get(name, 0.0) / total for name in LOSSES
    }


def describe(seconds: Mapping[str, float]) -> str:
    """A text such as "93.1% of 2h03m went into steps; lost to evaluation 3.9% (4m48s), compile 3.0% (3m42s)"."""
    total = max(sum(seconds.values()), 1e-9)
    lost = sorted(((seconds[name], name) for name in LOSSES if seconds[name] / total >= 0.0005), reverse=True)
    text = f"{seconds[_STEPS] / total:.1%} of {format_seconds(total)} went into steps"
    said = ", ".join(f"{name} {value / total:.1%} ({format_seconds(value)})" for value, name in lost)
    return f"{text}; lost to {said}" if said else text
