"""What a function gives for each example of a split, gathered on every host: figures are then a matter of numpy."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinymim_jax.data.pipeline import Batches
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.sharding import place_batch, replicated

log = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0
# The jitted (arguments, batch) -> (a tree of arrays [batch, ...], which rows are valid), whole on every device.
RowStep = Callable[[Any, dict[str, jax.Array]], tuple[Any, jax.Array]]


def row_step(function: Callable[[Any, dict[str, jax.Array]], Any], mesh: Mesh) -> RowStep:
    """The step of `collect` for `function(arguments, batch)`, a tree of arrays `[batch, ...]`; one serves many splits.

    Its results should be small next to the images: every host gets the rows of all.
    """

    def step(arguments: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        return function(arguments, batch), batch["valid"]

    return jax.jit(step, out_shardings=replicated(mesh))


def collect(step: RowStep, arguments: Any, batches: Batches, mesh: Mesh, *, examples: int | None = None) -> Any:
    """The tree of `step` with numpy arrays `[examples, ...]`, in the order of the split, on every host.

    Args:
      step: from `row_step`.
      arguments: placed on `mesh`.
      batches: padded batches with `valid`; closed at the end.
      examples: length of the split, where it is known. Another count is an error: a figure over some of the examples
        is worth nothing. With it, progress is logged every half minute.
    """
    found: list[Any] = []
    before, counted = None, 0
    began = reported = time.perf_counter()
    with batches:
        for batch in batches:
            # The batch before is fetched once this one is under way: the device does not wait for the host.
            after = step(arguments, place_batch(mesh, batch))
            if before is not None:
                found.append(_valid_rows(before))
                counted += len(jax.tree.leaves(found[-1])[0])
                if examples and time.perf_counter() - reported > _REPORT_SECONDS:
                    reported = time.perf_counter()
                    speed = counted / (reported - began)
                    left = format_seconds((examples - counted) / speed)
                    log.info("%d/%d images | %.0f images/s | ETA %s", counted, examples, speed, left)
            before = after
    if before is not None:
        found.append(_valid_rows(before))
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    counted = len(jax.tree.leaves(rows)[0])
    if examples is not None and counted != examples:
        raise RuntimeError(f"{counted} examples were counted, but the split has {examples}")
    return rows


def _valid_rows(step: tuple[Any, jax.Array]) -> Any:
    rows, valid = step
    kept = np.asarray(valid)
    return jax.tree.map(lambda array: np.asarray(array)[kept], rows)
