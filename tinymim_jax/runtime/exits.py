"""How a process ends: exit statuses, signals, and telling the other processes of a job about an error."""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

DONE, ERROR, PREEMPTED, STALLED, INTERRUPTED, TERMINATED = 0, 1, 75, 86, 130, 143
"""Exit statuses: finished; error; stopped with everything saved; no progress for --stall_minutes; stopped by a second
Ctrl-C without saving; ended by SIGTERM or SIGHUP, by a command that has nothing to save."""

STALL_MINUTES = 30.0
"""Default of --stall_minutes: after so long without progress a process ends with STALLED."""

RESUME_HINT = "What was saved is intact: run the same command again to resume"

_log = logging.getLogger(__name__)

_ENDED = "tinymim/ended/"  # prefix in the key-value store of the job, followed by the number of the process
_POLL_SECONDS = 2.0
_EXIT_SECONDS = 15.0
_leaving = threading.Event()


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it.

    by_hand: it was stopped by Ctrl-C, not by a preemption. The time until it is resumed then does not count as lost.
    """

    def __init__(self, message: str, *, by_hand: bool = False):
        super().__init__(message)
        self.by_hand = by_hand


class StopRequest:
    """Turns the first Ctrl-C into a request to stop after the current step; a second one raises KeyboardInterrupt."""

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
            # All processes must stop after the same step, and jax's preemption service makes them agree on one.
            signal.raise_signal(signal.SIGTERM)
            self.requested = False


def end_on_sigterm() -> None:
    """Makes SIGTERM and SIGHUP end this process at once, with status 143. Call it after `initialize_distributed`.

    For commands that save nothing on a signal, such as evaluations. JAX's coordination service catches SIGTERM so that
    a training can save its state, and without this call such a command would run on to its end. A signal that was
    ignored from the start (SIGHUP under nohup) stays ignored. Without the service nothing changes: both signals end a
    process anyway.
    """
    if _state() is None or threading.current_thread() is not threading.main_thread():
        return
    # A handler in Python runs only once the main thread is back from JAX. The bytes of the wakeup file come at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while (number := os.read(reader, 1)[0]) not in caught:
            pass
        exit_at_once(TERMINATED, signal.Signals(number).name)

    def restore_in_child() -> None:
        signal.set_wakeup_fd(-1)
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)

    # A forked child shares the wakeup file: a signal to the child would end this process.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, caught),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, caught),
        after_in_child=restore_in_child,
    )
    threading.Thread(target=watch, name="signals", daemon=True).start()


def treat_sighup_as_sigterm() -> None:
    """Makes a training save and stop when its terminal is closed, as on SIGTERM; unless SIGHUP is ignored (nohup).

    Without JAX's coordination service, which catches SIGTERM, nothing changes. Call it after `initialize_distributed`.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and _state() is not None and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def exit_process(status: int, why: str = "") -> NoReturn:
    """Ends this process; after an error in a job of several processes, at once and with a message to the others.

    Without the message they would wait for this process.

    Args:
      why: printed by the other processes.
    """
    if status in (DONE, PREEMPTED) or not _has_peers():
        sys.exit(status)
    exit_at_once(status, why)


def exit_at_once(status: int, why: str, *, before: Callable[[], None] | None = None) -> NoReturn:
    """Ends this process without cleaning up, from any thread, and tells the other processes of the job.

    It ends within 15 seconds even if its output or its file system blocks.

    Args:
      why: printed by the other processes.
      before: called first, such as to write a last message. Its errors are ignored.
    """
    deadline = threading.Timer(_EXIT_SECONDS, os._exit, (status,))
    deadline.daemon = True
    deadline.start()
    _leaving.set()
    if before is not None:
        with contextlib.suppress(Exception):
            before()
    if _has_peers():
        with contextlib.suppress(Exception):  # the service may have gone with process 0
            if not _log_ended_peer():
                _client().key_value_set(f"{_ENDED}{_state().process_id}", f"{status} {why.strip()[:1000]}")
    _exit(status)


def stdout_closed() -> bool:
    """Whether the reader of standard output has exited (`| head`); later output is then discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def watch_peers() -> None:
    """Makes this process end when another process of its job ends with an error or stalls; alone it does nothing."""
    if not _has_peers():
        return
    previous = sys.excepthook

    def hook(kind, error, traceback) -> None:
        previous(kind, error, traceback)
        exit_at_once(ERROR, f"{kind.__name__}: {error}")

    sys.excepthook = hook
    threading.Thread(target=_watch_peers, name="peers", daemon=True).start()


def joined_processes() -> int | None:
    """Number of processes that have joined the job; None without jax's coordination service."""
    state = _state()
    return None if state is None else state.num_processes


def is_first() -> bool:
    """Whether this is process 0, which writes files and logs for the job. Unlike jax.process_index, takes no device."""
    return not _has_peers() or _state().process_id == 0


def process_label() -> str:
    """Which process of the job this is, such as " (process 1 of 4)"; "" without others."""
    return f" (process {_state().process_id} of {_state().num_processes})" if _has_peers() else ""


def _exit(status: int) -> NoReturn:
    if _has_peers() and is_first():
        # The others read the message from a service that ends with this process.
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
        except Exception:  # jax itself notices and reports a failure of the service
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
    """jax's record of the job (its key-value store, number of processes), or None outside its coordination service.

    It has no public name yet.
    """
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state if distributed.global_state.client is not None else None
