"""A lock on a folder that ends with the process that holds it, however that ends."""

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
    """Another process works in the folder. The message says which, and what to do."""


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Keeps every other process that asks for the same folder out of it; with `wait`, until it is free.

    An advisory lock of the kernel (flock): it needs no cleaning up after a kill, and holds over NFS too. Where the file
    system has none, a warning says so.

    Raises:
      Busy: another process holds it.
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
        yield  # closing the file ends the lock; the file stays, or two processes could lock two of one name


def holder(folder: str | os.PathLike) -> str | None:
    """Which process holds the folder, in words; None where none does, or that cannot be known from here."""
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
            time.sleep(0.05)  # `holder`, in another process, takes it for a moment
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _log.warning("%s cannot be locked here (%s): see to it that one run alone uses it", file.name, error)
            return True
    return False


def _read(path: pathlib.Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"
