"""Trainings as processes of their own: started, watched, asked to stop, and never left behind."""

import collections
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from tinymim_jax.runtime.exits import INTERRUPTED, PREEMPTED
from tinymim_jax.runtime.parent import PARENT_VARIABLE
from tinymim_jax.sweeps.points import FAILED, LOG, Point, Run, State, run_state

_TAIL_LINES = 30


@dataclasses.dataclass
class Children:
    """Runs points as `tinymim train` processes; a context manager that passes Ctrl-C and SIGTERM on as stop requests.

    A child saves and stops after its step, exits with 75, and goes on when its point is run again. Should this process
    be killed, its children end at once: two processes must never write to one workdir.

    options: words for every child, such as ("--data_dir", "/data").
    """

    options: Sequence[str] = ()
    stopping: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self):
        self._running: list[subprocess.Popen] = []
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for process in self._running:
            process.kill()

    def run_point(self, point: Point, *, prefix: str = "", watch: Callable[[], bool] | None = None) -> State:
        """Runs what is missing of a point, one training after another; its state then.

        watch: asked about once a second; True stops the point as Ctrl-C would.
        """
        state = State("not started")
        for run in point.runs:
            state = run_state(run)
            if state.name == "finished":
                continue
            if state.name == "running":  # by another command, which it is left to
                break
            label = " ".join(filter(None, (prefix, run.name)))
            state = self._run(run, f"{label} | " if label else "", watch)
            if state.name != "finished":
                break
        return state

    def stop(self, *_) -> None:
        """Asks every child to save and stop; nothing more is started."""
        if not self.stopping:
            print("stopping: every run saves after its step; press Ctrl-C again to stop at once, unsaved", flush=True)
        self.stopping = True
        for process in list(self._running):
            _ask(process)

    def _run(self, run: Run, prefix: str, watch: Callable[[], bool] | None) -> State:
        if self.stopping:
            return run_state(run)
        run.workdir.mkdir(parents=True, exist_ok=True)
        (run.workdir / FAILED).unlink(missing_ok=True)
        words = ["train", "--config", run.config, "--workdir", str(run.workdir), *self.options, *run.overrides]
        with (run.workdir / LOG).open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(['tinymim', *words])}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "tinymim_jax", *words],
                env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes through here alone, or a child would get two
            )
            self._running.append(process)
            if self.stopping:
                _ask(process)
            tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
            reader = threading.Thread(target=_copy, args=(process.stdout, log, prefix, tail), daemon=True)
            reader.start()
            self._wait(process, watch)
            reader.join(timeout=10)  # a worker of a killed child may hold the pipe a little longer
        self._running.remove(process)
        return self._outcome(run, process.returncode, list(tail))

    def _wait(self, process: subprocess.Popen, watch: Callable[[], bool] | None) -> None:
        asked = False
        while process.poll() is None:
            if watch and not asked and watch():
                asked = True
                _ask(process)
            try:
                process.wait(timeout=1 if watch else None)
            except subprocess.TimeoutExpired:
                continue

    def _outcome(self, run: Run, code: int, tail: list[str]) -> State:
        if code == 0:
            return run_state(run)
        if self.stopping or code in (PREEMPTED, INTERRUPTED):
            return State("interrupted", run_state(run).detail)
        if (state := run_state(run)).name == "running":  # another command was quicker
            return state
        note_failure(run.workdir, _reason(tail, code))
        return run_state(run)


def note_failure(workdir: pathlib.Path, reason: str, file: str = FAILED) -> None:
    """Notes in a workdir why its run has no result."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / file).write_text(reason.strip() + "\n", encoding="utf-8")


def _ask(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)


def _copy(lines, log, prefix: str, tail: collections.deque) -> None:
    for line in lines:
        tail.append(line.rstrip())
        if not log.closed:
            log.write(line)
            log.flush()
        print(f"{prefix}{line}", end="", flush=True)


def _reason(tail: list[str], code: int) -> str:
    """The error that ended a run: our one message, or the end of a traceback."""
    starts = [i for i, line in enumerate(tail) if line.startswith("tinymim train: ")]
    if starts:
        return "\n".join(tail[starts[-1] :]).removeprefix("tinymim train: ")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    said = [line for line in tail if line.strip()]
    return f"{how}: {said[-1]}" if said else how
