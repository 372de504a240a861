"""Per-example results of a jitted function over a whole split, gathered as numpy arrays on every host."""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tinymim_jax.data.pipeline import Batches, allowed_substitutions
from tinymim_jax.data.whole import Scenes
from tinymim_jax.ops.placement import splitting_batches
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.sharding import place_batch, replicated

log = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0
# Jitted (arguments, batch) -> (a tree of arrays [batch, ...], valid [batch]), replicated on every device.
RowStep = Callable[[Any, dict[str, jax.Array]], tuple[Any, jax.Array]]


def row_step(function: Callable[[Any, dict[str, jax.Array]], Any], mesh: Mesh) -> RowStep:
    """Compiles `function(arguments, batch) -> tree of arrays [batch, ...]` for `collect`; can be used for many splits.

    The results are replicated on every device and so should be small compared to the images.
    """

    def step(arguments: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        with splitting_batches(mesh):
            return function(arguments, batch), batch["valid"]

    return jax.jit(step, out_shardings=replicated(mesh))


class Collected(NamedTuple):
    """Results for all examples of a split.

    rows: a tree of numpy arrays `[examples, ...]`, in the order of the split.
    substituted: how many of the images could not be decoded, so that another one was used in their place.
    """

    rows: Any
    substituted: int


def collect(step: RowStep, arguments: Any, batches: Batches, mesh: Mesh, *, examples: int) -> Collected:
    """The results of `step` for every example, on every host. Progress is logged every 30 seconds.

    Args:
      step: from `row_step`.
      arguments: placed on `mesh`.
      batches: padded batches with `valid`; closed at the end.
      examples: length of the split.

    Raises RuntimeError if another number of examples was counted, or more than 0.1 % of them were substituted.
    """
    found: list[Any] = []
    before, counted = None, 0
    began = reported = time.perf_counter()
    with batches:
        for batch in batches:
            # The results of the previous batch are fetched while the device works on this one.
            after = step(arguments, place_batch(mesh, batch))
            if before is not None:
                found.append(_valid_rows(before))
                counted += len(jax.tree.leaves(found[-1])[0])
                if time.perf_counter() - reported > _REPORT_SECONDS:
                    reported = time.perf_counter()
                    speed = counted / (reported - began)
                    left = format_seconds((examples - counted) / speed)
                    log.info("%d/%d images | %.0f images/s | ETA %s", counted, examples, speed, left)
            before = after
    if before is not None:
        found.append(_valid_rows(before))
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    counted = len(jax.tree.leaves(rows)[0])
    if counted != examples:
        raise RuntimeError(f"{counted} examples were counted, but the split has {examples}")
    return Collected(rows, count_substituted(batches, examples))


def count_substituted(batches: Batches | Scenes, examples: int) -> int:
    """How many images of a split, over all hosts, were replaced by others because they could not be decoded.

    Every host calls this once it has used up its `batches`. Raises RuntimeError for more than 0.1 % of `examples`:
    the figures would not be those of the split.
    """
    count = batches.substitutions
    if jax.process_count() > 1:
        count = int(np.sum(multihost_utils.process_allgather(np.int32(count))))
    if count > allowed_substitutions(examples):
        raise RuntimeError(
            f"{count} of {examples} images cannot be decoded, more than 0.1 %: repair or remove them (the log names "
            "each), or prepare the set again"
        )
    return count


def _valid_rows(step: tuple[Any, jax.Array]) -> Any:
    rows, valid = step
    kept = np.asarray(valid)
    return jax.tree.map(lambda array: np.asarray(array)[kept], rows)
