"""Reads a saved step back and compares it with its manifest, without the state that was saved."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import Damaged

_PORTION_BYTES = 2**29


def read_back(directory: epath.Path, *, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    """Reads all arrays of the step in `directory` into host memory, half a gigabyte at a time, and compares their bits.

    Args:
      attempt: calls the function that it is given, which reads, and returns its result; it may repeat it.

    Raises:
      Damaged: the step is not found, or an array is not what was saved.
    """
    if int(directory.name) not in ocp.utils.checkpoint_steps(directory.parent):
        raise Damaged("it is not found there")
    leaves, _ = attempt(lambda: stored.read_manifest(directory / "manifest"))
    for names in _portions(leaves):
        wanted = dict.fromkeys(names)
        arrays = attempt(lambda wanted=wanted: stored.read_arrays(directory / "state", wanted))
        stored.verify(arrays, leaves)


def _portions(leaves: Mapping[str, stored.Leaf]) -> Iterator[list[str]]:
    """The names in groups of about `_PORTION_BYTES`."""
    names, size = [], 0
    for name, leaf in leaves.items():
        names.append(name)
        size += int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if size >= _PORTION_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names
