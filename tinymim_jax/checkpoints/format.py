"""The format of a stored tree of arrays: leaves by name, digests of their bits, a manifest; how it is read."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from tinymim_jax.checkpoints.bits import fold, fold_on_host, for_host


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used. The message says what to do."""


class Damaged(Exception):
    """Stored data cannot be decoded, or differ from what was saved."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a tree. `bits` is a uint32 digest of its contents; None if it was not computed."""

    shape: tuple[int, ...]
    dtype: str
    bits: int | None = None


def digest(tree: Any) -> str:
    """16 hexadecimal digits that change with any name, shape, dtype or bit of a tree of arrays.

    The same for jax and numpy arrays, for any sharding, and for any order in which a dict was filled. Arrays
    spread over several processes need the call on all of them.
    """
    leaves = describe(tree)
    lines = [f"{name} {x.dtype}{list(x.shape)} {x.bits:08x}" for name, x in sorted(leaves.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def describe(tree: Any) -> dict[str, Leaf]:
    """The leaves of a tree of arrays by name, with their bits.

    The digests of jax arrays are computed where the arrays are, those of numpy arrays and of small arrays in the
    memory of CPUs by numpy.
    """
    # One small program for each distinct shape: a single one for the whole tree takes 7x as long to compile.
    folds = {name: fold_on_host(np.asarray(x)) if for_host(x) else fold(x) for name, x in leaves_by_name(tree).items()}
    folds = jax.device_get(folds)
    return {n: dataclasses.replace(leaf, bits=int(folds[n])) for n, leaf in outline(tree).items()}


def outline(tree: Any) -> dict[str, Leaf]:
    """The leaves of a tree of arrays or of jax.ShapeDtypeStruct by name, without their bits."""
    return {n: Leaf(tuple(np.shape(x)), np.dtype(x.dtype).name) for n, x in leaves_by_name(tree).items()}


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by name, such as `params/encoder/cls_token` or `opt_state/0/mu/head/bias`."""
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Named leaves as nested dicts, which is how trees of every kind are stored."""
    return unflatten_dict(leaves, sep="/")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a stored tree differs from a wanted one; false when it does not."""

    missing: list[str]
    unused: list[str]
    changed: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unused or self.changed)

    def __str__(self) -> str:
        lines = []
        for title, names in (
            ("missing (wanted, not stored)", self.missing),
            ("unused (stored, not wanted)", self.unused),
            ("different", self.changed),
        ):
            if names:
                lines += [f"  {title}: {len(names)}", *(f"    {name}" for name in names[:_LISTED])]
                lines += [f"    ... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
        return "\n".join(lines)


_LISTED = 12


def compare(stored: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> Difference:
    """Differences in names, shapes and dtypes; bits are not compared."""
    changed = []
    for name in sorted(stored.keys() & wanted.keys()):
        a, b = stored[name], wanted[name]
        if a.shape != b.shape:
            changed.append(f"{name}: stored {list(a.shape)}, wanted {list(b.shape)}")
        elif a.dtype != b.dtype:
            changed.append(f"{name}: stored {a.dtype}, wanted {b.dtype}")
    return Difference(sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys()), changed)


def manifest(tree: Any, **more: Any) -> dict[str, Any]:
    """The JSON that is stored beside a tree: its leaves, the values `more`, and a checksum of these."""
    leaves = {name: [list(leaf.shape), leaf.dtype, leaf.bits] for name, leaf in describe(tree).items()}
    record = {"leaves": leaves, **more}
    return {**record, "sha256": _checksum(record)}


def read_manifest(directory: epath.Path) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """(leaves by name, the other values) of the manifest in `directory`.

    Raises:
      Damaged: there is none, or it is not what was written.
      CheckpointError: the storage failed.
    """
    with _reading(directory):
        record = dict(ocp.JsonCheckpointHandler().restore(directory))
        if record.pop("sha256") != _checksum(record):
            raise Damaged("its manifest is not what was written")
        leaves = record.pop("leaves")
        return {n: Leaf(tuple(shape), dtype, bits) for n, (shape, dtype, bits) in leaves.items()}, record


def read_arrays(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct | None] | None = None
) -> dict[str, Any]:
    """Arrays of a stored tree by name; nothing else of it is read. Each process reads for itself.

    Args:
      wanted: for each name the shape and sharding of the jax.Array to make, or None for a numpy array. Without
        it everything is read, as it was saved.

    Raises:
      Damaged: something is missing or cannot be decoded.
      CheckpointError: the storage or the memory failed, which says nothing about the stored tree.
    """
    args = ocp.args.PyTreeRestore()
    if wanted is not None:
        item = {name: 0 if x is None else x for name, x in wanted.items()}
        how = {name: _how_to_read(x) for name, x in wanted.items()}
        args = ocp.args.PyTreeRestore(nested(item), restore_args=nested(how), partial_restore=True)
    with _reading(directory):
        return flatten_dict(ocp.PyTreeCheckpointHandler().restore(directory, args=args), sep="/")


def verify(arrays: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> None:
    """Raises Damaged unless the arrays are those that the manifest describes, bit by bit."""
    if changed := sorted(name for name, leaf in describe(arrays).items() if leaf != leaves[name]):
        raise Damaged(f"{len(changed)} of its arrays are not what was saved, the first is {changed[0]}")


@contextlib.contextmanager
def writing(directory: epath.Path) -> Iterator[None]:
    """Turns an error while writing into a CheckpointError with a remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # TensorStore has the number only in the text of its error.
        code = getattr(error, "errno", None) or int((re.findall(r"os_error_code='(\d+)'", str(error)) or [0])[0])
        if not code and isinstance(error, jax.errors.JaxRuntimeError):
            raise  # an error of a device or another process, not of the storage
        remedy = "Check the storage and try again."
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "The disk is full, or a quota: free some space or choose another directory."
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            remedy = "It must be a directory that you may write to: make it so or choose another."
        what = os.strerror(code) if code else error
        raise CheckpointError(
            f"Cannot write to {directory}: {what}\n{remedy} What was saved before is intact."
        ) from error


@contextlib.contextmanager
def _reading(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        if cause := _environmental(error):
            raise CheckpointError(f"Cannot read {directory}: {cause}\nRemove the cause and try again.") from error
        raise Damaged(f"{type(error).__name__}: {error}") from error


_ENVIRONMENTAL = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
# Packages whose errors for a failed network or service are not OSErrors.
_NETWORK = ("gcsfs", "fsspec", "aiohttp", "requests", "urllib3", "httpx", "google", "botocore", "s3fs")


def is_transient(error: BaseException | None) -> bool:
    """Whether a network, a service or a time limit failed somewhere in a chain of errors: trying again may help."""
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError) or package in _NETWORK:
            return True
        if any(code in str(error) for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")):
            return True
        error = error.__cause__
    return False


def _environmental(error: BaseException | None) -> str | None:
    """The message of a permission, network or memory problem in a chain of errors."""
    transient = is_transient(error)
    while error is not None:
        if (
            transient
            or isinstance(error, PermissionError | MemoryError)
            or any(code in str(error) for code in _ENVIRONMENTAL)
        ):
            return str(error) or type(error).__name__
        error = error.__cause__
    return None


def _how_to_read(x: jax.ShapeDtypeStruct | None) -> ocp.RestoreArgs:
    if x is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape)


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _without_stack(record: logging.LogRecord) -> bool:
    if "orbax" in record.pathname:
        record.exc_info = None
    return True


# Orbax logs each failure several times with its stack before it raises it: a thousand lines for a full disk.
logging.getLogger("absl").addFilter(_without_stack)
