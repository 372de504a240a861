"""Runs trainings as child processes: starts them, passes stop signals on, and records why one failed."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO

from tinymim_jax.runtime.exits import INTERRUPTED, PREEMPTED
from tinymim_jax.runtime.files import write_text
from tinymim_jax.runtime.parent import PARENT_VARIABLE
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import FAILED, RunState, read_state
from tinymim_jax.sweeps.points import LOG, Point, Run

EXTEND = "--extend"
"""The option of `tinymim train` that lets a run, finished or not, continue to a longer duration."""

_TAIL_LINES = 30
_OWN_MESSAGE = re.compile(r"tinymim \w+: ")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass
class Children:
    """Runs points as `tinymim train` processes. A context manager: Ctrl-C, SIGTERM and SIGHUP then stop the children.

    A child saves and stops after its step, exits with 75, and resumes when its point is run again. If this process is
    killed, its children end at once: two processes must never write to one workdir.

    options: command-line arguments for every child, such as ("--data_dir", "/data").
    stopping: whether the children have been asked to stop; nothing is started any more.
    """

    options: Sequence[str] = ()
    stopping: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self):
        self._running: list[subprocess.Popen] = []
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            caught = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
            self._previous = {s: signal.signal(s, self.stop) for s in caught}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for process in self._running:
            process.kill()

    def run_point(self, point: Point, *, prefix: str = "", watch: Callable[[], bool] | None = None) -> RunState:
        """Runs what is missing of a point, one training after another, and returns its state.

        Args:
          prefix: put before each line of output.
          watch: called about once a second; when it returns True, the point is stopped as by Ctrl-C.
        """
        state = RunState("not started")
        for run in point.runs:
            state = read_state(run.workdir)
            if state.name == "finished" and EXTEND not in self.options:
                continue
            if state.name == "running":  # another command trains it
                break
            label = " ".join(filter(None, (prefix, run.name)))
            try:
                state = self._run(run, f"{label} | " if label else "", watch)
            except OSError as error:  # such as a full disk
                state = RunState("failed", str(error))
            if state.name != "finished":
                break
        return state

    def stop(self, *_) -> None:
        """Asks every child to save and stop; nothing more is started."""
        if not self.stopping:
            print_line("stopping: every run saves after its step; press Ctrl-C again to stop at once, without saving")
        self.stopping = True
        for process in list(self._running):
            _interrupt(process)

    def run_words(self, words: Sequence[str], log: pathlib.Path, *, prefix: str = "") -> tuple[int, list[str]]:
        """Runs one command, `python -m WORDS`, with its output here and appended to the file `log`.

        Returns its exit status and its last lines. After a stop signal nothing is started, and the status is
        INTERRUPTED.
        """
        if self.stopping:
            return INTERRUPTED, []
        log.parent.mkdir(parents=True, exist_ok=True)
        return self._process(words, log, prefix, None)

    def _run(self, run: Run, prefix: str, watch: Callable[[], bool] | None) -> RunState:
        if self.stopping:
            return read_state(run.workdir)
        run.workdir.mkdir(parents=True, exist_ok=True)
        (run.workdir / FAILED).unlink(missing_ok=True)
        words = ["train", "--config", run.config, "--workdir", str(run.workdir), *self.options, *run.overrides]
        code, tail = self._process(["tinymim_jax", *words], run.workdir / LOG, prefix, watch)
        return self._outcome(run, code, tail)

    def _process(
        self, words: Sequence[str], file: pathlib.Path, prefix: str, watch: Callable[[], bool] | None
    ) -> tuple[int, list[str]]:
        """Runs `python -m WORDS` to its end; returns its exit status and its last lines."""
        # Unbuffered: on a full disk a line is lost, but nothing is left over that makes closing the file fail.
        with file.open("ab", buffering=0) as log:
            shown = ["tinymim", *words[1:]] if words[0] == "tinymim_jax" else ["python", "-m", *words]
            _append(log, f"$ {shlex.join(shown)}\n")
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *words],
                env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # or a terminal's Ctrl-C would reach the child twice: directly and from here
            )
            self._running.append(process)
            if self.stopping:
                _interrupt(process)
            tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
            reader = threading.Thread(target=_copy, args=(process.stdout, log, prefix, tail), daemon=True)
            reader.start()
            self._wait(process, watch)
            reader.join(timeout=10)  # a worker of a killed child may hold the pipe a little longer
        self._running.remove(process)
        return process.returncode, list(tail)

    def _wait(self, process: subprocess.Popen, watch: Callable[[], bool] | None) -> None:
        asked = False
        while process.poll() is None:
            if watch and not asked and watch():
                asked = True
                _interrupt(process)
            try:
                process.wait(timeout=1 if watch else None)
            except subprocess.TimeoutExpired:
                continue

    def _outcome(self, run: Run, code: int, tail: list[str]) -> RunState:
        state = read_state(run.workdir)
        if code == 0 or state.name == "running":  # another command started the same run a moment earlier
            return state
        if self.stopping or code in (PREEMPTED, INTERRUPTED):
            return RunState("interrupted", state.detail)
        note_failure(run.workdir, failure_reason(tail, code))
        return read_state(run.workdir)


def note_failure(workdir: pathlib.Path, reason: str, file: str = FAILED) -> None:
    """Writes to `file` in a workdir why its run has no result."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / file, reason.strip() + "\n")


def failure_reason(tail: Sequence[str], code: int) -> str:
    """The error that ended a command: its own message, or the end of a traceback.

    Args:
      tail, code: the last lines and the exit status of the command.
    """
    starts = [i for i, line in enumerate(tail) if _OWN_MESSAGE.match(line)]
    if starts:
        return _OWN_MESSAGE.sub("", "\n".join(tail[starts[-1] :]), count=1)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    said = [line for line in tail if line.strip()]
    return f"{how}: {said[-1]}" if said else how


def _interrupt(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)


def _copy(lines: IO[str], log: IO[bytes], prefix: str, tail: collections.deque) -> None:
    """Reads all of a child's output, as a child whose pipe is full stops; neither log nor terminal must prevent it."""
    for line in lines:
        tail.append(line.rstrip())
        _append(log, line)
        print_line(f"{prefix}{line.rstrip()}")


def _append(log: IO[bytes], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the disk is full; the file is closed
        log.write(text.encode(errors="replace"))
