"""Reading files wherever they are: local paths directly, URLs (gs://, s3://, memory://) through fsspec."""

import contextlib
import glob
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec

# Listing, and reading headers, is waiting: for a disk, a file server, a bucket.
_THREADS = 16
# Of shards kept open for reading, in each process; of more than these, each is opened for each read.
_MAX_OPEN = 4096
# A cheap way to tell a file from its successor, under the names that file systems give it.
_VERSION_KEYS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")
# Folders and files that macOS, Synology, Linux, Windows and Python leave beside others.
_OF_SYSTEMS = frozenset(
    (
        *("__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__pycache__"),
        *("Thumbs.db", "desktop.ini", "Icon\r"),
    )
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class File(NamedTuple):
    """A file as it was when listed; `version` (a local one's modification time) changes when it is replaced."""

    path: str
    size: int
    version: str


def raise_open_file_limit() -> None:
    """Lifts the soft limit on open files to the hard one, for this process and its children.

    Every shard takes one, and ImageNet has 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a system may refuse "unlimited": the old limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_remote(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """A local path made absolute, so that it means the same in every process; a URL as it is."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def bare(path: str) -> str:
    """For comparing: a URL without its scheme, which may be written in several ways; a local path as it is."""
    return path.split("://")[-1].lstrip("/") if is_remote(path) else path


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    filesystem, inner = _filesystem(path)
    return filesystem.isdir(inner)


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, each sorted; without hidden ones and those of systems.

    Raises OSError, which names the folder, where it cannot be listed.
    """
    folders, files = [], []
    if is_remote(path):
        filesystem, inner = _filesystem(path)
        for entry in filesystem.ls(inner, detail=True):
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            # Object stores list a folder's own placeholder in it.
            if name and entry["name"].rstrip("/") != inner.rstrip("/"):
                (folders if entry["type"] == "directory" else files).append(name)
    else:
        with os.scandir(path) as entries:
            for entry in entries:
                is_folder = entry.is_dir()
                if is_folder and entry.is_symlink():
                    _check_leads_down(entry.path)
                (folders if is_folder else files).append(entry.name)
    return tuple(sorted(name for name in names if not is_hidden(name)) for names in (folders, files))  # type: ignore[return-value]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of a data set: its name begins with a dot, or a system has made it."""
    return name.startswith(".") or name in _OF_SYSTEMS


def walk(path: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder under `path`, itself first, as a path relative to it, with the sorted names of its files.

    Hidden files and folders are left out; links are followed. Raises OSError where a folder cannot be listed.
    """
    if is_remote(path):
        yield from _walk_remote(path)
        return
    level = [""]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            below = []
            for folder, (folders, files) in zip(level, pool.map(list_folder, [join(path, name) for name in level])):
                yield folder, files
                below += [join(folder, name) for name in folders]
            level = below


def _check_leads_down(link: str) -> None:
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    if os.path.commonpath([target, here]) == target:
        raise OSError(f"{link} is a link to a folder that it lies in ({target}); remove it")


def _walk_remote(path: str) -> Iterator[tuple[str, list[str]]]:
    filesystem, inner = _filesystem(path)
    found: dict[str, list[str]] = {"": []}
    root = inner.rstrip("/") + "/"
    for name in filesystem.find(inner):  # sorted; one request for a thousand of them, not one for each folder
        parts = name.removeprefix(root).split("/")
        if not any(map(is_hidden, parts)):
            found.setdefault("/".join(parts[:-1]), []).append(parts[-1])
    for folder in sorted(found, key=lambda name: (name.count("/"), name)):
        yield folder, found[folder]


def join(folder: str, name: str) -> str:
    """`folder/name`, either of which may be empty."""
    return f"{folder.rstrip('/')}/{name}" if folder and name else folder or name


def matches(pattern: str) -> list[str]:
    """The paths, sorted, that a glob pattern or a plain path stands for."""
    if not is_remote(pattern):
        if os.path.exists(pattern):  # also one whose name holds a bracket
            return [pattern]
        return sorted(glob.glob(pattern, recursive=True))
    filesystem, inner = _filesystem(pattern)
    if filesystem.exists(inner):
        return [pattern]
    return sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(inner))


def as_pattern(path: str) -> str:
    """A pattern that stands for what `path` does, and goes on: brackets in a path that exists are no pattern."""
    return glob.escape(path) if matches(path) == [path] else path


def status(path: str) -> File:
    """Size and version of a file. Raises OSError where there is none, or it cannot be read."""
    if not is_remote(path):
        found = os.stat(path)
        return File(path, found.st_size, str(found.st_mtime_ns))
    filesystem, inner = _filesystem(path)
    info = filesystem.info(inner)
    return File(path, info["size"], str([str(info[key]) for key in _VERSION_KEYS if key in info]))


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[function(item) for item in items]` by several threads; the first error, in their order, is raised."""
    with ThreadPoolExecutor(_THREADS) as pool:
        pending = [pool.submit(function, item) for item in items]
        try:
            return [each.result() for each in pending]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def open_file(path: str, *, ahead: bool = True) -> BinaryIO:
    """A seekable file. `ahead`: of a remote one more is read than is asked for, as it is read from start to end."""
    if not is_remote(path):
        return open(path, "rb")
    filesystem, inner = _filesystem(path)
    return filesystem.open(inner, "rb", block_size=8 * 2**20, cache_type="readahead" if ahead else "none")


def read(path: str) -> bytes:
    """The whole of a file."""
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    filesystem, inner = _filesystem(path)
    return filesystem.cat_file(inner)


class Shards:
    """Files of which ranges are read, by several threads at once; it can be pickled."""

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self._opened: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes `[offset, offset + size)` of file `shard`. Raises OSError, EOFError where it is shorter."""
        path = self.paths[shard]
        if is_remote(path):
            filesystem, inner = _filesystem(path)
            data = filesystem.cat_file(inner, start=offset, end=offset + size)
        elif len(self.paths) > _MAX_OPEN:
            with open(path, "rb", buffering=0) as file:
                data = _read_at(file.fileno(), offset, size)
        else:
            data = _read_at(self._descriptor(shard), offset, size)
        if len(data) != size:
            raise EOFError(f"{path} ends before byte {offset + size}: it was cut short after it was opened")
        return data

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._opened:
                self._opened[shard] = os.open(self.paths[shard], os.O_RDONLY)
            return self._opened[shard]

    def __reduce__(self):
        return Shards, (self.paths,)

    def __del__(self):
        for descriptor in self._opened.values():
            os.close(descriptor)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # a read may stop short, of a file on the network above all
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _filesystem(path: str) -> tuple[Any, str]:
    """fsspec keeps one instance for each kind of storage, and its connections."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ImportError(
            f"{path}: {error}; for gs:// run pip install 'tinymim-jax[gcs]', for s3:// pip install s3fs"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; known are gs://, s3:// and the others of fsspec") from error
