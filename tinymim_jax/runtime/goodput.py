"""Where the wall time of a run went: into steps, or what it was lost to. Over all attempts in one workdir."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinymim_jax.runtime.progress import format_seconds

# What takes time beside the steps. start: opening data, restoring; input, checkpoint: while the device had nothing to
# do; redone: steps after the checkpoint that a killed attempt left; downtime: between attempts.
LOSSES: tuple[str, ...] = ("start", "compile", "input", "checkpoint", "evaluation", "redone", "downtime")
_STEPS = "steps"


class Goodput:
    """Seconds by kind. The loop says what it is doing; whatever it does not name is time in steps.

    The host runs ahead of the device: waiting for the next batch costs nothing while a step is still under way. So a
    thread notes when each step ends, and of a wait only what came after that is counted.

    Args:
      before: seconds by kind of the earlier attempts, from their `seconds`.
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
        self._noted = threading.Condition()
        self._thread = threading.Thread(target=self._note_ends, name="steps", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def losing(self, kind: str) -> Iterator[None]:
        """All the time inside the block is lost to `kind`."""
        began = self._clock()
        self._now = (kind, began)
        try:
            yield
        finally:
            self._now = None
            self._lost[kind] += self._clock() - began

    @contextlib.contextmanager
    def idling(self, kind: str) -> Iterator[None]:
        """The time inside the block is lost to `kind` as far as the device has nothing to do."""
        began = self._clock()
        yield
        ended = self._clock()
        with self._noted:
            if self._finished < self._dispatched and self._last.is_ready():
                self._noted.wait(timeout=0.1)  # the thread is about to note it
            if self._finished == self._dispatched:
                self._lost[kind] += max(0.0, ended - max(began, self._finished_at))

    def dispatched(self, result: Any) -> None:
        """A step is under way; `result` is an array of it that the next step leaves alone."""
        self._dispatched += 1
        self._last = result
        self._results.put(result)

    def lose(self, kind: str, seconds: float) -> None:
        """So many of the last seconds were lost to `kind`."""
        self._lost[kind] += seconds

    def charge(self, kind: str, seconds: float) -> None:
        """Moves time of earlier attempts from steps to `kind`, or adds it where `kind` is downtime."""
        seconds = max(0.0, seconds)  # the clock of the machine may have been set back in between
        if kind != "downtime":
            seconds = min(seconds, self._before[_STEPS])
            self._before[_STEPS] -= seconds
        self._before[kind] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by kind until now; may be asked by any thread."""
        now, lost = self._clock(), dict(self._lost)
        if (doing := self._now) is not None:
            lost[doing[0]] += now - doing[1]
        steps = max(0.0, now - self._began - sum(lost.values()))
        return {name: self._before[name] + ({_STEPS: steps} | lost)[name] for name in (_STEPS, *LOSSES)}

    def close(self) -> None:
        """Ends the thread."""
        self._results.put(None)
        self._thread.join(timeout=1)

    def _note_ends(self) -> None:
        while (result := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # the loop meets the same error
                result.block_until_ready()
            with self._noted:
                self._finished += 1
                self._finished_at = self._clock()
                self._noted.notify_all()


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """{"goodput": share of the time that went into steps, "lost/input": ..., ...}; all of them sum to 1."""
    total = max(sum(seconds.values()), 1e-9)
    return {"goodput": seconds.get(_STEPS, 0.0) / total} | {
        f"lost/{name}": seconds.get(name, 0.0) / total for name in LOSSES
    }


def describe(seconds: Mapping[str, float]) -> str:
    """Such as "93.1% of 2h03m went into steps; lost to evaluation 3.9% (4m48s), compile 3.0% (3m42s)"."""
    total = max(sum(seconds.values()), 1e-9)
    lost = sorted(((seconds[name], name) for name in LOSSES if seconds[name] / total >= 0.0005), reverse=True)
    text = f"{seconds[_STEPS] / total:.1%} of {format_seconds(total)} went into steps"
    said = ", ".join(f"{name} {value / total:.1%} ({format_seconds(value)})" for value, name in lost)
    return f"{text}; lost to {said}" if said else text
