"""A thread beside the loop: it keeps WORKDIR/status.json up to date, and ends a process in which nothing moves."""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from tinymim_jax.runtime.exits import RESUME_HINT, STALLED, exit_at_once, process_label
from tinymim_jax.runtime.files import is_remote, write_json

STATUS = "status.json"
WRITE_SECONDS, WRITE_SECONDS_REMOTE = 5.0, 30.0  # each write to a bucket is paid for
COMPILE_SECONDS = 1800.0
_PAUSE_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Heartbeat:
    """Use it as a context manager, around the whole run.

    Args:
      workdir: where status.json is written; None writes none.
      stall_seconds: after so long without `beat` the stacks of all threads are printed and the process exits with 86;
        0: never. It counts from `watch` on, and until `compiled` there is half an hour more.
      sample: more facts, asked for by the thread whenever it writes.
    """

    def __init__(
        self,
        workdir: epath.Path | None,
        *,
        stall_seconds: float,
        sample: Callable[[], dict[str, Any]] = dict,
    ):
        self._path = workdir / STATUS if workdir is not None else None
        self._every = WRITE_SECONDS_REMOTE if is_remote(workdir) else WRITE_SECONDS
        self._stall_seconds = stall_seconds
        self._sample = sample
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        self._watching, self._allowance = False, COMPILE_SECONDS
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._could_write = True
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def note(self, **facts: Any) -> None:
        """Facts for status.json, JSON values; they are written by and by."""
        with self._lock:
            self._facts |= facts
        self.beat()

    def beat(self) -> None:
        """Something was finished: a step, a batch of an evaluation, a checkpoint."""
        self._beat_at = time.monotonic()

    def watch(self) -> None:
        """From now on, too long without a beat is a stall. Until here there was no telling how long things take."""
        self._watching = True
        self.beat()

    def compiled(self) -> None:
        """The first step is done: the others are like it."""
        self._allowance = 0.0
        self.beat()

    def _run(self) -> None:
        written, before = -self._every, time.monotonic()
        while not self._stop.wait(min(1.0, self._every)):
            now = time.monotonic()
            if now - before > _PAUSE_SECONDS:
                # This thread stood still as well: by Ctrl-Z, or the machine did.
                self._beat_at += now - before
            still = now - self._beat_at
            if self._watching and self._stall_seconds and still > self._stall_seconds + self._allowance:
                self._end_stalled(still)
            if now - written >= self._every:
                self._write()
                written = time.monotonic()
            before = time.monotonic()  # what the writing took is no pause

    def _end_stalled(self, still: float) -> None:
        why = (
            f"stalled{process_label()}: nothing was finished for {still / 60:.1f} minutes (--stall_minutes). The "
            "stacks of all threads are above"
        )

        def say_so() -> None:
            with contextlib.suppress(Exception):  # standard error may be no file
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            _log.error("%s. %s", why, RESUME_HINT)
            self.note(stage="stalled", error=why)
            self._write()

        exit_at_once(STALLED, why, before=say_so)

    def _write(self) -> None:
        if self._path is None:
            return
        with self._lock:
            facts = self._facts | self._sample() | {"time": time.time()}
        try:
            write_json(self._path, facts)
            self._could_write = True
        except OSError as error:
            if self._could_write:
                _log.warning("cannot write %s: %s", self._path, error)
            self._could_write = False


def read_status(workdir: epath.PathLike) -> dict[str, Any]:
    """What status.json says, the time of its writing at least; {} where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((epath.Path(workdir) / STATUS).read_text())
        if isinstance(facts, dict) and isinstance(facts.get("time"), float):
            return facts
    return {}
