"""How a process ends: its exit status, Ctrl-C as a request, and errors that the other processes of a job hear of."""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from typing import Any, NoReturn

DONE, ERROR, PREEMPTED, STALLED, INTERRUPTED = 0, 1, 75, 86, 130
STALL_MINUTES = 30.0  # without progress, before a process ends as stalled; unless told otherwise

RESUME_HINT = "What was saved is intact: run the same command again to go on"

_log = logging.getLogger(__name__)

_ENDED = "tinymim/ended/"
_POLL_SECONDS = 2.0
_leaving = threading.Event()


class Interrupted(Exception):
    """The run was asked to stop, has saved its state, and goes on when the same command is run again.

    by_hand: by Ctrl-C, not by whoever owns the machine.
    """

    def __init__(self, message: str, *, by_hand: bool = False):
        super().__init__(message)
        self.by_hand = by_hand


class StopRequest:
    """Turns the first Ctrl-C into a request that the loop honours after the step; the second one acts at once."""

    def __init__(self):
        self.requested = False
        self.by_hand = False

    def __enter__(self):
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, signum, frame) -> None:
        del frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = self.by_hand = True
        _log.warning("stopping after this step; press Ctrl-C again to stop at once, without saving")
        if _has_peers():
            # All processes must stop after the same step: jax's preemption notice agrees on one.
            signal.raise_signal(signal.SIGTERM)
            self.requested = False


def exit_process(status: int, why: str = "") -> NoReturn:
    """Ends this process. With an error and peers it ends at once, and they are told: they would wait for it for ever.

    why: what the peers print.
    """
    if status in (DONE, PREEMPTED) or not _has_peers():
        sys.exit(status)
    exit_at_once(status, why)


def exit_at_once(status: int, why: str) -> NoReturn:
    """Ends this process without cleaning up, from any thread; its peers are told."""
    _leaving.set()
    if _has_peers():
        with contextlib.suppress(Exception):  # the service may have gone with process 0
            if not _log_ended_peer():
                _client().key_value_set(f"{_ENDED}{_state().process_id}", f"{status} {why.strip()[:1000]}")
    _exit(status)


def stdout_closed() -> bool:
    """Whether the reader of this process's output has left, as `head` does; what is printed from now on is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def watch_peers() -> None:
    """Has this process end when another one of its job has ended with an error, or stalled; does nothing alone."""
    if not _has_peers():
        return
    previous = sys.excepthook

    def hook(kind, error, traceback) -> None:
        previous(kind, error, traceback)
        exit_at_once(ERROR, f"{kind.__name__}: {error}")

    sys.excepthook = hook
    threading.Thread(target=_watch_peers, name="peers", daemon=True).start()


def joined_processes() -> int | None:
    """How many processes have joined the job; None without jax's coordination service."""
    state = _state()
    return None if state is None else state.num_processes


def is_first() -> bool:
    """Whether this process writes and speaks for the job. Asking takes no device, unlike asking jax for its number."""
    return not _has_peers() or _state().process_id == 0


def process_label() -> str:
    """Which process of the job this is, such as " (process 1 of 4)"; "" for one alone."""
    return f" (process {_state().process_id} of {_state().num_processes})" if _has_peers() else ""


def _exit(status: int) -> NoReturn:
    if _has_peers() and is_first():
        # The service through which the others hear of it ends with this process.
        time.sleep(1.5 * _POLL_SECONDS)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _watch_peers() -> None:
    while not _leaving.wait(_POLL_SECONDS):
        try:
            status = _log_ended_peer()
        except Exception:  # what is wrong with the service, jax itself finds out and says
            continue
        if status is not None and not _leaving.is_set():
            _exit(status)


def _log_ended_peer() -> int | None:
    """Logs which process of the job ended first, if one did, and returns its exit status."""
    ended = _client().key_value_dir_get(_ENDED)
    if not ended:
        return None
    key, value = min(ended)
    status, _, why = value.partition(" ")
    number = key.rsplit("/", 1)[-1]
    _log.error(
        "process %s of the job has ended, so this one ends too%s: %s\n%s", number, process_label(), why, RESUME_HINT
    )
    return int(status)


def _has_peers() -> bool:
    return (joined_processes() or 1) > 1


def _client() -> Any:
    return _state().client


def _state() -> Any:
    """jax's view of the job, or None: its key-value store, and its size before devices are taken.

    Neither has a public name yet.
    """
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state if distributed.global_state.client is not None else None
