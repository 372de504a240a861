"""Writing files so that a reader never sees half of one."""

import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath


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
    """Writes UTF-8 text to a file with `replacing`, or to a URL, where an object appears in one step anyway."""
    if is_remote(path):
        epath.Path(path).write_text(text)
        return
    with replacing(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, *, sync: bool = True) -> None:
    """Writes indented JSON with `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n", sync=sync)


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
