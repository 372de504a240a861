"""A run's folder: which process uses it, how far the run has come, and that two processes never write to it."""

import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from tinymim_jax.runtime import files, heartbeat
from tinymim_jax.runtime.exits import is_first
from tinymim_jax.runtime.files import is_remote
from tinymim_jax.runtime.heartbeat import OWNER, read_status
from tinymim_jax.runtime.locks import Busy, holder, locked
from tinymim_jax.runtime.progress import format_seconds

CONFIG, RESULT = "config.json", "result.json"
FAILED, PRUNED = "failed.txt", "pruned.txt"
"""Why a run of a sweep has no result; written by the sweep."""

ANALYSIS, REPLAY = "analysis", "replay"
"""Folders: what was found by looking at the networks (analysis.json, pictures.json, scores.json); replayed steps."""

LIVE = ("starting", "compiling", "training", "evaluating")
"""Stages in status.json of a process that is at work."""

_SETTLE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class RunState:
    """How far a run has come.

    name: finished | running | interrupted | failed | stalled | pruned | not started.
    detail: which process runs it, or why it ended; "" if nothing is known.
    result: figures of the last evaluation; None unless finished.
    """

    name: str
    detail: str = ""
    result: Mapping[str, float] | None = None


def read_state(workdir: epath.PathLike) -> RunState:
    """The state of the run in `workdir`, from its files."""
    folder = epath.Path(workdir)
    result = read_result(folder)
    if result is not None:
        return RunState("finished", result=result)
    if (process := owner(folder)) is not None:
        return RunState("running", process)
    status = read_status(folder)
    stage = status.get("stage")
    if stage == "stalled":
        return RunState("stalled", status.get("error", ""))
    for name, state in ((FAILED, "failed"), (PRUNED, "pruned")):
        if (folder / name).exists():
            return RunState(state, (folder / name).read_text().strip())
    if (folder / RESULT).exists():
        return RunState(
            "interrupted", f"{folder / RESULT} is empty or damaged: run the same command again to evaluate once more"
        )
    if not status and not (folder / CONFIG).exists():
        return RunState("not started")
    if stage in LIVE:
        ago = format_seconds(max(0.0, time.time() - status["time"]))
        return RunState("interrupted", f"it ended {ago} ago without a message while {stage}, probably killed")
    return RunState("failed" if stage == "failed" else "interrupted", status.get("error", ""))


def read_result(workdir: epath.PathLike) -> dict[str, float] | None:
    """The figures in result.json; None if there is none, or one that is empty or damaged (by a full disk)."""
    try:
        result = json.loads((epath.Path(workdir) / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


@contextlib.contextmanager
def claimed(workdir: epath.Path, config: dict[str, Any]) -> Iterator[None]:
    """Makes the folder with its config.json and keeps other runs out of it; process 0 does so for all.

    A folder is locked (see locks.py). A bucket cannot be locked: its owner writes status.json every half minute, and a
    newcomer waits whether that happens, then writes owner.json and looks whether another newcomer has overwritten it.

    Args:
      config: plain JSON.

    Raises:
      Busy: another run is using the folder.
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
                _claim(workdir)
            else:
                stack.enter_context(locked(workdir))
            if not (workdir / CONFIG).exists():
                write_json(workdir / CONFIG, config)
            for name in (FAILED, PRUNED):
                (workdir / name).unlink(missing_ok=True)
        except Busy:
            raise
        except Exception as error:
            if not (isinstance(error, OSError) or is_remote(workdir)):
                raise
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"cannot write to --workdir {workdir}: {reason}; choose a folder you may write to") from error
        yield


def owner(workdir: epath.PathLike) -> str | None:
    """Which process runs in the folder, such as "process 12 on node3"; None if none does.

    Where locks cannot be seen (a bucket, a file system without locks), a recent status.json counts instead.
    """
    if not is_remote(workdir) and (found := holder(workdir)):
        return found
    status = read_status(workdir)
    if not status or status.get("stage") not in LIVE or time.time() - status["time"] > _silence(workdir):
        return None
    if not is_remote(workdir) and status.get("host") == socket.gethostname():
        return None  # a process on this machine would hold the lock
    return f"process {status.get('pid')} on {status.get('host')}"


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that readers never see half of it; process 0 does so, the others do nothing."""
    if is_first():
        files.write_json(path, value)


def _silence(workdir: epath.PathLike) -> float:
    """Seconds without a new status.json after which the process that wrote it counts as gone."""
    return 3 * (heartbeat.WRITE_SECONDS_REMOTE if is_remote(workdir) else heartbeat.WRITE_SECONDS)


def _wait_for_silence(workdir: epath.Path) -> None:
    status = read_status(workdir)
    if not status or status.get("stage") not in LIVE:
        return
    deadline = time.monotonic() + max(0.0, _silence(workdir) - max(0.0, time.time() - status["time"]))
    while time.monotonic() < deadline:
        time.sleep(1.0)
        if read_status(workdir).get("time", status["time"]) != status["time"]:
            raise _busy(workdir, status, heartbeat.STATUS)


def _claim(workdir: epath.Path) -> None:
    """Of several newcomers that write owner.json at about the same time, the last one keeps the bucket."""
    token = uuid.uuid4().hex
    files.write_json(workdir / OWNER, {"claim": token, "pid": os.getpid(), "host": socket.gethostname()})
    time.sleep(_SETTLE_SECONDS)
    found = heartbeat.read_owner(workdir)
    if found.get("claim", token) != token:
        raise _busy(workdir, found, OWNER)


def _busy(workdir: epath.Path, found: Mapping[str, Any], file: str) -> Busy:
    return Busy(
        f"{workdir} is in use by process {found.get('pid')} on {found.get('host')}, which writes its {file}. Wait for "
        "that process, stop it, or choose another --workdir"
    )
