"""Ends a child process when the process that started it is gone, even after kill -9."""

import contextlib
import os
import select
import threading
import time

PARENT_VARIABLE = "TINYMIM_PARENT"
"""Environment variable with the process id of the parent of a `tinymim` command."""

PARENT_GONE = 87
"""Exit status of a child whose parent is gone."""

_POLL_SECONDS = 0.3


def end_with_parent(parent: int) -> None:
    """Starts a thread that exits this process, without cleaning up, within a second after process `parent` has gone.

    The parent passes its own id, so a parent that is killed before this call is noticed too. It may also be a
    grandparent, with a wrapper script in between.
    """
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def end_with_parent_of_environment() -> None:
    """Calls `end_with_parent` if TINYMIM_PARENT is set, and removes the variable: its own children must not see it."""
    if parent := os.environ.pop(PARENT_VARIABLE, None):
        end_with_parent(int(parent))


def _watch(parent: int) -> None:
    _wait_for_end(parent)
    os._exit(PARENT_GONE)


def _wait_for_end(process: int) -> None:
    """Returns when the process has ended, even if nobody has read its exit status yet."""
    with contextlib.suppress(AttributeError, OSError):  # pidfd_open exists on Linux 5.3 and later
        ended = select.poll()
        ended.register(os.pidfd_open(process), select.POLLIN)
        ended.poll()
        return
    # A child is given another parent as soon as its own ends. Of others it is known only whether their id is in use.
    is_parent = os.getppid() == process
    while os.getppid() == process if is_parent else _exists(process):
        time.sleep(_POLL_SECONDS)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True
