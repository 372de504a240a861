"""File access: local paths directly, URLs (gs://, s3://, memory://) through fsspec."""

import contextlib
import glob
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec

# Threads for listing folders and reading file headers, which are bound by storage latency.
_THREADS = 16
# Shards kept open per process. A set with more shards opens a file for each read.
_MAX_OPEN = 4096
# Metadata that changes when a file is replaced; the keys differ between fsspec file systems.
_VERSION_KEYS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")
# Folders and files that macOS, Synology, Linux, Windows and Python create; never part of a data set.
_SYSTEM_NAMES = frozenset(
    (
        *("__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__pycache__"),
        *("Thumbs.db", "desktop.ini", "Icon\r"),
    )
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class File(NamedTuple):
    """A file when it was listed. `version` changes when it is replaced (for local files, the modification time)."""

    path: str
    size: int
    version: str


def raise_open_file_limit() -> None:
    """Raises the soft limit on open files to the hard limit, for this process and its children.

    Each shard is kept open, and ImageNet has 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # the system may refuse "unlimited"; keep the old limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_remote(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """The absolute form of a local path (`file://` and `~` are resolved); a URL unchanged."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def bare(path: str) -> str:
    """A URL without its scheme (schemes have aliases), for comparing paths; a local path unchanged."""
    return path.split("://")[-1].lstrip("/") if is_remote(path) else path


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    filesystem, inner = _filesystem(path)
    return filesystem.isdir(inner)


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """The sorted names of the folders, and of the files, in a folder; hidden and system files are skipped.

    Raises OSError, which names the folder, if it cannot be listed.
    """
    folders, files = [], []
    if is_remote(path):
        filesystem, inner = _filesystem(path)
        for entry in filesystem.ls(inner, detail=True):
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            # Object stores list the placeholder object of the folder itself.
            if name and entry["name"].rstrip("/") != inner.rstrip("/"):
                (folders if entry["type"] == "directory" else files).append(name)
    else:
        with os.scandir(path) as entries:
            for entry in entries:
                is_folder = entry.is_dir()
                if is_folder and entry.is_symlink():
                    _check_link_cycle(entry.path)
                (folders if is_folder else files).append(entry.name)
    return tuple(sorted(name for name in names if not is_hidden(name)) for names in (folders, files))  # type: ignore[return-value]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is skipped: its name starts with a dot or is one that operating systems create."""
    return name.startswith(".") or name in _SYSTEM_NAMES


def walk(path: str) -> Iterator[tuple[str, list[str]]]:
    """Yields `path` and every folder under it, as (path relative to `path`, sorted file names).

    Hidden files and folders are skipped; links are followed. Raises OSError if a folder cannot be listed.
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


def _check_link_cycle(link: str) -> None:
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    if os.path.commonpath([target, here]) == target:
        raise OSError(f"{link} is a link to a folder that contains it ({target}); remove the link")


def _walk_remote(path: str) -> Iterator[tuple[str, list[str]]]:
    filesystem, inner = _filesystem(path)
    found: dict[str, list[str]] = {"": []}
    root = inner.rstrip("/") + "/"
    for name in filesystem.find(inner):  # sorted; one request per thousand files instead of one per folder
        parts = name.removeprefix(root).split("/")
        if not any(map(is_hidden, parts)):
            found.setdefault("/".join(parts[:-1]), []).append(parts[-1])
    for folder in sorted(found, key=lambda name: (name.count("/"), name)):
        yield folder, found[folder]


def join(folder: str, name: str) -> str:
    """`folder/name`, either of which may be empty."""
    return f"{folder.rstrip('/')}/{name}" if folder and name else folder or name


def matches(pattern: str) -> list[str]:
    """The sorted existing paths that match a glob pattern or a plain path."""
    if not is_remote(pattern):
        if os.path.exists(pattern):  # also a path with brackets in its name
            return [pattern]
        return sorted(glob.glob(pattern, recursive=True))
    filesystem, inner = _filesystem(pattern)
    if filesystem.exists(inner):
        return [pattern]
    return sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(inner))


def as_pattern(path: str) -> str:
    """A glob pattern that matches the same as `path` and can be extended; an existing path is escaped."""
    return glob.escape(path) if matches(path) == [path] else path


def status(path: str) -> File:
    """The size and version of a file. Raises OSError if it does not exist or cannot be read."""
    if not is_remote(path):
        found = os.stat(path)
        return File(path, found.st_size, str(found.st_mtime_ns))
    filesystem, inner = _filesystem(path)
    info = filesystem.info(inner)
    return File(path, info["size"], str([str(info[key]) for key in _VERSION_KEYS if key in info]))


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[function(item) for item in items]` in threads; raises the first error in the order of `items`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        pending = [pool.submit(function, item) for item in items]
        try:
            return [each.result() for each in pending]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def open_file(path: str, *, ahead: bool = True) -> BinaryIO:
    """Opens a seekable file for reading. `ahead`: read ahead in remote files, for sequential reading."""
    if not is_remote(path):
        return open(path, "rb")
    filesystem, inner = _filesystem(path)
    return filesystem.open(inner, "rb", block_size=8 * 2**20, cache_type="readahead" if ahead else "none")


def read(path: str) -> bytes:
    """The contents of a file."""
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    filesystem, inner = _filesystem(path)
    return filesystem.cat_file(inner)


class Shards:
    """Reads byte ranges of files; thread-safe and picklable."""

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self._opened: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes `[offset, offset + size)` of file `shard`. Raises OSError, or EOFError if the file is shorter."""
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
            raise EOFError(f"{path} ends before byte {offset + size}: the file was truncated after it was indexed")
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
    while 0 < len(data) < size:  # pread may return less than requested, e.g. on network file systems
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, cached by fsspec with its connections, and the path inside it."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ImportError(
            f"{path}: {error}; for gs:// run pip install 'tinymim-jax[gcs]', for s3:// pip install s3fs"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; supported are gs://, s3:// and the other protocols of fsspec") from error
