"""Threads beside the training loop: one writes WORKDIR/status.json, one ends a process that makes no progress."""

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

from tinymim_jax.runtime.exits import ERROR, RESUME_HINT, STALLED, exit_at_once, process_label
from tinymim_jax.runtime.files import is_remote, write_json

STATUS, OWNER = "status.json", "owner.json"
WRITE_SECONDS, WRITE_SECONDS_REMOTE = 5.0, 30.0  # each write to a bucket costs money
COMPILE_SECONDS = 1800.0
_PAUSE_SECONDS = 60.0
_JOIN_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Heartbeat:
    """Use it as a context manager, around the whole run.

    Neither thread ends by an error: what cannot be written is logged once and tried again at the next time.

    Args:
      workdir: where status.json is written; None writes none.
      stall_seconds: after so long without `beat` the stacks of all threads are printed and the process exits with 86;
        0: never. It counts from `watch` on; until `compiled` is called, another half hour is allowed.
      sample: gives more facts for status.json whenever it is written.
    """

    def __init__(
        self,
        workdir: epath.Path | None,
        *,
        stall_seconds: float,
        sample: Callable[[], dict[str, Any]] = dict,
    ):
        self._workdir = workdir
        self._every = WRITE_SECONDS_REMOTE if is_remote(workdir) else WRITE_SECONDS
        self._stall_seconds = stall_seconds
        self._sample = sample
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        self._watching, self._allowance = False, COMPILE_SECONDS
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        self._lock, self._write_lock = threading.Lock(), threading.Lock()
        self._failing = False
        self._claim = read_owner(workdir).get("claim") if workdir is not None and is_remote(workdir) else None
        # A write may block, on a file server that does not answer; the other thread must notice that stall.
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._run, "heartbeat"), (self._write_regularly, "status"))
        ]

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        self._write()

    def note(self, **facts: Any) -> None:
        """Adds facts (JSON values) to status.json, with its next writing."""
        with self._lock:
            self._facts |= facts
        self.beat()

    def beat(self) -> None:
        """Call it when something is finished: a step, a batch of an evaluation, a checkpoint."""
        self._beat_at = time.monotonic()

    def watch(self) -> None:
        """From now on, too long without a beat is a stall. Before it, opening data and restoring may take any time."""
        self._watching = True
        self.beat()

    def compiled(self) -> None:
        """Call it after the first step: no more time is allowed for compiling."""
        self._allowance = 0.0
        self.beat()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(min(1.0, self._every)):
            now = time.monotonic()
            if now - before > _PAUSE_SECONDS:
                # This thread did not run either: the process was suspended (Ctrl-Z), or the machine was.
                self._beat_at += now - before
            still = now - self._beat_at
            if self._watching and self._stall_seconds and still > self._stall_seconds + self._allowance:
                self._end_stalled(still)
            before = now

    def _write_regularly(self) -> None:
        self._write()
        while not self._stop.wait(self._every):
            self._write()

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
        if self._workdir is None:
            return
        path = self._workdir / STATUS
        try:
            self._end_if_claimed_by_another()
            with self._write_lock:
                with self._lock:
                    facts = dict(self._facts)
                # Without waiting for the disk: it is written often, and a lost one does no harm.
                write_json(path, facts | self._sample() | {"time": time.time()}, sync=False)
            self._failing = False
        except Exception as error:  # a bucket's client has exceptions of its own, such as gcsfs's HttpError
            if not self._failing:
                _log.warning("cannot write %s, trying again every %g s: %r", path, self._every, error)
            self._failing = True

    def _end_if_claimed_by_another(self) -> None:
        """A bucket that could not be reached for minutes may have been taken for abandoned by another run."""
        assert self._workdir is not None
        if self._claim is None:
            return
        found = read_owner(self._workdir)
        if found.get("claim", self._claim) == self._claim:
            return
        why = (
            f"{self._workdir} now belongs to process {found.get('pid')} on {found.get('host')}, as this process could "
            "not write its status.json for some time. Two processes must not write to one folder, so this one ends"
        )
        exit_at_once(ERROR, why, before=lambda: _log.error("%s", why))


def read_status(workdir: epath.PathLike) -> dict[str, Any]:
    """The facts in status.json, "time" (of its writing) among them; {} if there are none or they are unreadable."""
    facts = _read_json(epath.Path(workdir) / STATUS)
    return facts if isinstance(facts.get("time"), float) else {}


def read_owner(workdir: epath.PathLike) -> dict[str, Any]:
    """Which process claimed a bucket: {"claim": token, "pid": ..., "host": ...}; {} if that cannot be read."""
    return _read_json(epath.Path(workdir) / OWNER)


def _read_json(path: epath.Path) -> dict[str, Any]:
    with contextlib.suppress(Exception):  # missing, half written, or the bucket cannot be reached
        facts = json.loads(path.read_text())
        if isinstance(facts, dict):
            return facts
    return {}
