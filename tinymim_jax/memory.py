"""Device memory of the training step: how many micro-batches fit, and what to do when it is exhausted."""

import contextlib
import copy
import dataclasses
import logging
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax.experiment import Experiment, batch_shapes, build_optimizer
from tinymim_jax.metrics import no_averages
from tinymim_jax.sharding import batch_sharding, replicated, state_sharding
from tinymim_jax.state import init_state, make_train_step
from tinymim_jax.tasks import TASKS

log = logging.getLogger(__name__)

_GIB = 2**30
USABLE = 0.95
"""Share of a device's memory that a step may need: allocators fragment, and evaluation has programs of its own."""
_UNITS = {"": 2.0**-30, "K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}


class OutOfMemory(RuntimeError):
    """The training step does not fit into the devices' memory; the message lists what to change."""


def abstract_step(
    experiment: Experiment, frozen: Any, paths: frozenset, mesh: Mesh, accumulate: int
) -> tuple[Any, tuple[Any, ...]]:
    """(the jitted training step, its arguments as shapes with their shardings on `mesh`).

    Args:
      frozen: weights that are not trained, or their shapes.
      paths: of the trained parameters.
      accumulate: micro-batches of a step.
    """
    task, ema = experiment.task, experiment.config.train.ema
    optimizer = build_optimizer(experiment, paths)
    state, _ = init_state(task, optimizer, paths, mesh, jax.random.key(0), ema=ema)
    step = make_train_step(task, optimizer, paths, mesh, accumulate=accumulate, ema=ema)
    whole = replicated(mesh)

    def placed(x: Any, sharding: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arguments = (
        state,
        jax.tree.map(placed, jax.eval_shape(lambda: no_averages((*task.names, "gradient_norm")))),
        jax.tree.map(placed, frozen, state_sharding(mesh, frozen)),
        {name: placed(x, batch_sharding(mesh)) for name, x in batch_shapes(experiment).items()},
        placed(jax.eval_shape(lambda: jax.random.key(0))),
    )
    return step, arguments


def bytes_needed(program: Any) -> dict[str, int]:
    """Bytes of a compiled program on each device: `arguments`, which stay between steps, `temporaries` and `code`."""
    found = program.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }


def bytes_refused(message: str, held: int = 0) -> int | None:
    """Bytes needed by a program that did not fit; 0 if the message lacks them, None if memory was not the reason.

    Args:
      message: of the compiler, which knows the whole, or of an allocator, which knows its last request.
      held: what was allocated before that request.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    if found := re.search(r"Used ([\d.]+)([KMGT]?)(?:iB)? of", message):
        return int(float(found[1]) * _GIB * _UNITS[found[2]])
    if found := re.search(r"allocate (?:request for )?([\d.]+) ?([KMGT]?)(?:iB|bytes)", message):
        return held + int(float(found[1]) * _GIB * _UNITS[found[2]])
    return 0


def device_memory(mesh: Mesh) -> int | None:
    """Bytes available to a program on each device of `mesh`, the minimum over devices; None if unknown (CPUs)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    least = min(limits)
    if jax.process_count() > 1:
        least = int(multihost_utils.process_allgather(np.int64(least)).min())
    return least or None


def micro_batch_counts(batch_size: int, devices: int) -> list[int]:
    """The values of train.accumulate that leave each device a whole number of images, ascending."""
    per_device = batch_size // devices
    return [n for n in range(1, per_device + 1) if batch_size % (n * devices) == 0]


def smallest_accumulate(
    experiment: Experiment, frozen: Any, paths: frozenset, mesh: Mesh, *, limit: int | None = None
) -> int:
    """The smallest number of micro-batches with which the step fits into the devices' memory, found by compiling it.

    1 if the devices do not report their memory.

    Args:
      limit: bytes for a device; None asks the devices.

    Raises:
      ValueError: the batch cannot be split over the devices.
      OutOfMemory: not even one image a device fits.
    """
    counts = micro_batch_counts(experiment.batch_size, mesh.size)
    if not counts:
        raise ValueError(
            f"train.batch_size={experiment.batch_size} cannot be split over {mesh.size} devices: choose a multiple of "
            f"{mesh.size}"
        )
    limit = device_memory(mesh) if limit is None else limit
    if limit is None:
        log.info("train.accumulate=0: %s does not report its memory; 1 micro-batch", mesh.devices.flat[0].device_kind)
        return 1
    budget, count = USABLE * limit, counts[0]
    while True:
        needed = _compiled_bytes(experiment, frozen, paths, mesh, count)
        total = sum(needed.values())
        if total <= budget:
            images = experiment.batch_size // count
            log.info(
                "train.accumulate=0: %d micro-batch%s of %d images; a step needs %.2f of %.2f GiB on each device",
                count,
                "es" * (count > 1),
                images,
                total / _GIB,
                limit / _GIB,
            )
            return count
        more = [n for n in counts if n > count]
        if not more:
            raise OutOfMemory(_advice(experiment, frozen, paths, mesh, count, total, limit))
        # Arguments keep their size and temporaries shrink at best in proportion to the micro-batch, so a smaller count
        # cannot fit.
        rest = needed["temporaries"]
        least = count * rest / max(budget - (total - rest), 1)
        count = next((n for n in more if n >= least), more[-1])


@contextlib.contextmanager
def explained(experiment: Experiment, frozen: Any, paths: frozenset, mesh: Mesh, accumulate: int) -> Iterator[None]:
    """Turns errors about exhausted device memory into OutOfMemory, whose message says what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _, arguments = abstract_step(experiment, frozen, paths, mesh, accumulate)
        refused = bytes_refused(str(error), _held(arguments))
        if refused is None:
            raise
        limit = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices)
        advice = _advice(experiment, frozen, paths, mesh, accumulate, refused, limit)
        raise OutOfMemory(f"{advice}\nThe device said: {str(error).splitlines()[0][:300]}") from error


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that may make a step fit: words for the command line, and its drawbacks."""

    words: tuple[str, ...]
    changes: dict[str, Any]
    cost: str
    fsdp: int = 1


def remedies(config: ConfigDict, chips: int, per_host: int, fsdp: int, fitting: int) -> Iterator[Remedy]:
    """Changes that reduce memory, the cheapest first. Only the last one, a smaller batch, changes the training result,
    and more micro-batches where batch norm averages over them.

    Args:
      per_host: chips that may share one copy of the parameters.
      fitting: images on each chip that are known to fit; 0: none.
    """
    if "remat" in config.model:  # a linear probe has no gradient in its encoder, so nothing to compute again
        order, now = ("none", "dots", "full"), config.model.remat
        for remat in order[order.index(now) + 1 :]:
            cost = "elementwise work is done twice" if remat == "dots" else "the student's forward pass is done twice"
            yield Remedy((f"model.remat={remat}",), {"model.remat": remat}, cost)
        if not config.model.scan:
            changes = {"model.scan": True, "model.remat": "full"}
            yield Remedy(_words(changes), changes, "the student's forward pass is done twice, parameters are stacked")
    if fsdp == 1 and chips > 1:
        shared = max(n for n in range(1, per_host + 1) if chips % n == 0)
        yield Remedy((f"--fsdp {shared}",), {}, "parameters are gathered where they are used", shared)
    batch, parts = config.train.batch_size, config.train.accumulate
    per_chip = batch // chips
    for more in range(parts + 1, per_chip + 1):
        if per_chip % more == 0 and fitting and per_chip // more <= fitting:
            cost = "micro-batches run one after another"
            if TASKS[config.task].batch_norm:
                cost += ", and batch norm averages over one of them: another training"
            yield Remedy((f"train.accumulate={more}",), {"train.accumulate": more}, cost)
            break
    if fitting:
        smaller = fitting * chips * parts
        cost = "another batch is another experiment: optim.base_lr is scaled by it"
        yield Remedy((f"train.batch_size={smaller}",), {"train.batch_size": smaller}, cost)


def _compiled_bytes(experiment: Experiment, frozen: Any, paths: frozenset, mesh: Mesh, count: int) -> dict[str, int]:
    step, arguments = abstract_step(experiment, frozen, paths, mesh, count)
    try:
        return bytes_needed(step.lower(*arguments).compile())
    except jax.errors.JaxRuntimeError as error:
        held = _held(arguments)
        refused = bytes_refused(str(error), held)
        if refused is None:
            raise
        # If the compiler does not report the size, the next number of micro-batches is tried.
        return {"arguments": held if refused else sys.maxsize, "temporaries": max(refused - held, 0)}


def _held(arguments: Any) -> int:
    """Bytes of the step's arguments on each device: parameters, optimizer, frozen weights and the batch."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arguments)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # the random key
    )


def _advice(
    experiment: Experiment, frozen: Any, paths: frozenset, mesh: Mesh, accumulate: int, needed: int, limit: int
) -> str:
    """The error message: the requested settings and the changes that help. `needed` and `limit` are 0 if unknown."""
    config, batch = experiment.config, experiment.batch_size
    _, arguments = abstract_step(experiment, frozen, paths, mesh, accumulate)
    held, images = _held(arguments), batch // accumulate // mesh.size
    fitting = images // 2
    if needed > held and limit > held:
        fitting = min(fitting, int(images * (USABLE * limit - held) / (needed - held)))
    words = [
        f"out of memory: train.batch_size={batch} with train.accumulate={accumulate} on {mesh.size} "
        f"device{'s' * (mesh.size > 1)} of {f'{limit / _GIB:.2f} GiB' if limit else 'unknown memory'} puts {images} "
        f"images at a time on each. Parameters, optimizer, frozen weights and the batch take {held / _GIB:.2f} GiB"
        + (f", and in all {needed / _GIB:.2f} GiB are needed" if needed else ""),
        "What helps, the cheapest first:",
    ]
    settings = copy.deepcopy(config).unlock()
    settings.train.accumulate = accumulate
    hosts = max(1, jax.process_count())
    for remedy in remedies(settings, mesh.size, mesh.size // hosts, mesh.shape["fsdp"], max(fitting, 1)):
        words.append(f"  {' '.join(remedy.words)}: {remedy.cost}")
    if not TASKS[config.task].batch_norm:
        words.append("  train.accumulate=0 finds the smallest number of micro-batches that fits")
    return "\n".join(words)


def _words(changes: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in changes.items())
