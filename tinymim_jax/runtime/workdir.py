"""A run's folder: whose it is, and that one run alone writes to it."""

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from tinymim_jax.runtime import files, heartbeat
from tinymim_jax.runtime.exits import is_first
from tinymim_jax.runtime.files import is_remote
from tinymim_jax.runtime.heartbeat import read_status
from tinymim_jax.runtime.locks import Busy, holder, locked

ENDED = ("finished", "interrupted", "failed", "stalled")  # stages in which nothing runs any more


@contextlib.contextmanager
def claimed(workdir: epath.Path, config: dict[str, Any]) -> Iterator[None]:
    """Makes the folder with its config.json and keeps other runs out of it; process 0 does so for all.

    `config` is plain JSON.

    A folder is locked (see locks.py). A bucket cannot be: there, whoever is alive says so in status.json every half
    minute, and a newcomer waits to see whether that goes on.

    Raises:
      Busy: another run is going on in it.
      OSError: it cannot be written to.
    """
    if not is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if is_remote(workdir):
                _wait_for_silence(workdir)
            else:
                stack.enter_context(locked(workdir))
            if not (workdir / "config.json").exists():
                write_json(workdir / "config.json", config)
        except OSError as error:
            raise OSError(
                f"cannot write to --workdir {workdir}: {error.strerror or error}; choose a folder you may write to"
            ) from error
        yield


def owner(workdir: epath.PathLike) -> str | None:
    """Which process runs in the folder, in words; None where none does.

    Where the lock cannot be seen (a bucket, a file system without locks) a recent status.json stands for it.
    """
    if not is_remote(workdir) and (found := holder(workdir)):
        return found
    status = read_status(workdir)
    if not status or status.get("stage") in ENDED or time.time() - status["time"] > _silence(workdir):
        return None
    if not is_remote(workdir) and status.get("host") == socket.gethostname():
        return None  # it would hold the lock
    return f"process {status.get('pid')} on {status.get('host')}"


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that readers never see half of it; process 0 does so, the others do nothing."""
    if is_first():
        files.write_json(path, value)


def _silence(workdir: epath.PathLike) -> float:
    """Seconds without a sign of life after which there is none."""
    return 3 * (heartbeat.WRITE_SECONDS_REMOTE if is_remote(workdir) else heartbeat.WRITE_SECONDS)


def _wait_for_silence(workdir: epath.Path) -> None:
    status = read_status(workdir)
    if not status or status.get("stage") in ENDED:
        return
    deadline = time.monotonic() + max(0.0, _silence(workdir) - max(0.0, time.time() - status["time"]))
    while time.monotonic() < deadline:
        time.sleep(1.0)
        if read_status(workdir).get("time") != status["time"]:
            raise Busy(
                f"{workdir} is in use by process {status.get('pid')} on {status.get('host')}, which writes its "
                f"{heartbeat.STATUS}. Wait for that one, stop it, or choose another --workdir"
            )
