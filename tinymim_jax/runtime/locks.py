"""A lock on a folder, which the kernel releases when the process that holds it ends."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import IO

LOCK = ".lock"

_log = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class Busy(RuntimeError):
    """Another process uses the folder. The message says which one, and what to do."""


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock on the folder inside the block, so that other processes which lock it are refused or wait.

    An advisory lock (flock): it needs no cleaning up after a kill, and works over NFS. Where the file system has no
    locks, a warning is logged.

    Args:
      wait: wait until the folder is free instead of raising Busy.

    Raises:
      Busy: another process holds the lock.
      OSError: the folder cannot be written to.
    """
    path = pathlib.Path(folder) / LOCK
    with path.open("a+", encoding="utf-8") as file:
        if not _lock(file):
            if not wait:
                raise Busy(
                    f"{folder} is in use by {_read(path)}. Two processes must not write to one folder: wait for that "
                    "one, stop it, or choose another --workdir"
                )
            _log.info("waiting for %s to be free: it is in use by %s", folder, _read(path))
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        now = datetime.datetime.now().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        # Closing the file ends the lock. It is not removed: two processes could then lock two files of one name.
        yield


def holder(folder: str | os.PathLike) -> str | None:
    """The process that holds the lock, such as "process 12 on node3 since ..."; None if none is known."""
    path = pathlib.Path(folder) / LOCK
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    except OSError:
        return None
    return None


def _lock(file: IO) -> bool:
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)  # `holder`, in another process, holds it for a moment
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _log.warning(
                "%s cannot be locked here (%s): make sure that only one run uses this folder", file.name, error
            )
            return True
    return False


def _read(path: pathlib.Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"
