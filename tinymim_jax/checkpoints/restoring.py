"""Reads a training state from a saved step and verifies it bit by bit."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import CheckpointError, Damaged


def read_step(
    directory: epath.Path, abstract_state: Any, *, attempt: Callable[[Callable[[], Any]], Any] = lambda read: read()
) -> tuple[Any, dict[str, Any]]:
    """(state, `extra` of its save) of the step in `directory`. Nothing on disk is changed. Every process calls it.

    Args:
      abstract_state: as for `Checkpoints.restore`.
      attempt: calls the function that it is given, which reads, and returns its result; it may repeat it.

    Raises on all processes, if it is so on any of them:
      Damaged: it is not what was saved.
      CheckpointError: it differs from `abstract_state` in names, shapes or dtypes, which are listed.
    """
    leaves, more = _together(lambda: attempt(lambda: stored.read_manifest(directory / "manifest")))
    if difference := stored.compare(leaves, stored.outline(abstract_state)):
        raise CheckpointError(
            f"{directory} holds a different model or optimizer than this configuration:\n{difference}\n"
            f"Train with the configuration that wrote it, or choose another --workdir."
        )
    wanted = stored.leaves_by_name(abstract_state)
    arrays = _together(lambda: attempt(lambda: stored.read_arrays(directory / "state", wanted)))
    stored.verify(arrays, leaves)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]), more["extra"]


def _together(read: Callable[[], Any]) -> Any:
    """The result of `read`; Damaged on all processes if it is raised on any of them."""
    result, error = None, None
    try:
        result = read()
    except Damaged as damaged:
        error = damaged
    if jax.process_count() > 1:
        intact = multihost_utils.process_allgather(np.array(error is None))
        if error is None and not intact.all():
            error = Damaged(f"process {int(np.argmin(intact))} found damage")
    if error is not None:
        raise error
    return result
