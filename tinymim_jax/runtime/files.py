"""Writing files so that a reader never sees half of one."""

import contextlib
import json
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath

T = TypeVar("T")

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder; after the block that file takes the place of `path` in one step.

    A reader sees the old file or the new one, never a part. If the block raises, the temporary file is removed and
    `path` is left as it was.

    Args:
      path: a file on this machine's file system, not a URL.
      sync: write the content to the disk before renaming. Without it, a power failure may leave an empty file.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, *, sync: bool = True) -> None:
    """Writes UTF-8 text to a file with `replacing`, or to a URL, where an object appears in one step anyway.

    What UTF-8 does not have, such as bytes of file names in another encoding, is written as an escape.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if is_remote(path):
        with_retries(lambda: epath.Path(path).write_text(text), f"writing {path}")
        return
    with replacing(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, *, sync: bool = True) -> None:
    """Writes indented JSON with `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n", sync=sync)


def read_json(path: epath.PathLike) -> Any:
    """The content of a JSON file.

    Raises ValueError, with the path and a remedy, for one that is empty or damaged, as after a full disk; OSError if it
    cannot be read.
    """
    file = epath.Path(path)
    text = with_retries(file.read_text, f"reading {path}") if is_remote(path) else file.read_text()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is {'empty' if not text.strip() else 'damaged'}: {error}. Put back a copy; without one, what lies "
            "beside it cannot be used: choose another folder"
        ) from error


def with_retries(action: Callable[[], T], what: str, *, attempts: int = 5) -> T:
    """The result of `action`, an access to a bucket, which is repeated after 1, 2, 4, 8 seconds while it fails.

    Client libraries raise exceptions of their own (gcsfs's HttpError is no OSError), so every exception counts, except
    that a file does not exist.

    Raises OSError, with `what` in its message, when the last attempt fails.
    """
    for attempt in range(attempts):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if attempt == attempts - 1:
                raise OSError(f"{what} failed {attempts} times: {type(error).__name__}: {error}") from error
            _log.warning("%s failed, trying again: %s: %s", what, type(error).__name__, error)
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def sync_to_disk(path: str | os.PathLike) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_remote(path: str | os.PathLike | None) -> bool:
    """Whether the path is a URL (gs://bucket/run) rather than a file or folder."""
    return "://" in os.fspath(path or "")
