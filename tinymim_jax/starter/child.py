"""Computations of `tinymim distill` that need devices. They run in processes of their own, so that the devices are free
for the trainings afterwards.

python -m tinymim_jax.starter.child FUNCTION REQUEST.json RESULT.json
"""

import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_record
from tinymim_jax.config import from_json
from tinymim_jax.evaluation.knn import evaluate_knn
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer, training_batches
from tinymim_jax.memory import USABLE, device_memory, explained, micro_batch_counts, smallest_accumulate
from tinymim_jax.metrics import no_averages
from tinymim_jax.models.vit import ViT
from tinymim_jax.optim import split
from tinymim_jax.plan.build import changed
from tinymim_jax.plan.compiled import CACHE
from tinymim_jax.plan.plan import make_plan
from tinymim_jax.plan.topology import parse_topology
from tinymim_jax.runtime.exits import DONE, ERROR, exit_at_once
from tinymim_jax.runtime.files import write_json
from tinymim_jax.runtime.host_memory import available_memory
from tinymim_jax.runtime.parent import end_with_parent_of_environment
from tinymim_jax.runtime.startup import start_logging, use_compile_cache
from tinymim_jax.sharding import make_mesh, place_batch, replicated
from tinymim_jax.starter.choices import STUDENT
from tinymim_jax.state import init_state, make_train_step, place_frozen, trained_paths
from tinymim_jax.tasks.pretrained import Loaded, keeping_checkpoints

_MEASURED_SECONDS = 6.0
_MEASURED_STEPS = (3, 30)  # at least, at most


def hardware() -> dict[str, Any]:
    """The devices of this machine, as fields of choices.Hardware."""
    devices = jax.devices()
    memory = device_memory(make_mesh()) or 0
    return {
        "platform": devices[0].platform,
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "memory": memory,
    }


def measure(config: dict[str, Any], data_dir: str | None, workers: int) -> dict[str, Any]:
    """Times a few steps of the training of `config`, after compiling, as fields of choices.Measured.

    The batch is split into the smallest number of micro-batches that fits into memory (on CPUs, into free memory).
    """
    locked = from_json(config)
    experiment = build_experiment(locked, data_dir=data_dir)
    mesh, task = make_mesh(), experiment.task
    frozen = place_frozen(task.load_frozen(), mesh)
    paths = trained_paths(task, frozen, batch_shapes(experiment))
    limit = device_memory(mesh) or (available_memory() or 0) // mesh.size or None
    parts = smallest_accumulate(experiment, frozen, paths, mesh, limit=limit)
    optimizer, root = build_optimizer(experiment, paths), jax.random.key(locked.seed)
    _, fresh = init_state(task, optimizer, paths, mesh, root, ema=locked.train.ema)
    step = make_train_step(task, optimizer, paths, mesh, accumulate=parts, ema=locked.train.ema)
    with (
        explained(experiment, frozen, paths, mesh, parts),
        training_batches(experiment, start_step=0, workers=workers) as batches,
    ):
        state = fresh()
        recorded = jax.device_put(no_averages((*task.names, "gradient_norm")), replicated(mesh))
        done, began = -1, 0.0
        while done < _MEASURED_STEPS[1]:
            state, recorded, skipped = step(state, recorded, frozen, place_batch(mesh, next(batches)), root)
            jax.block_until_ready(skipped)
            done += 1
            if done == 0:  # compiled
                began = time.perf_counter()
            elif done >= _MEASURED_STEPS[0] and time.perf_counter() - began > _MEASURED_SECONDS:
                break
        seconds = (time.perf_counter() - began) / done
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    trained = sum(leaf.size for leaf in jax.tree.leaves(split(state.params, paths)[0]))
    return {
        "seconds": seconds,
        "micro_batches": parts,
        "steps": experiment.total_steps,
        "parameters": count,
        "trained": trained,
    }


def knn(
    config: dict[str, Any], checkpoint: str, neighbors: int, data_dir: str | None, workers: int, initial: str = ""
) -> dict[str, Any]:
    """The k-NN figures of a checkpoint, or of random initial weights.

    Args:
      initial: in place of the checkpoint take initial weights: of the student (STUDENT), or of an encoder like the one
        in the checkpoint at this path. `checkpoint` is then a name for messages.
    """
    locked = from_json(config)
    with keeping_checkpoints() as kept:
        if initial:
            record, params = _initial_encoder(locked, initial, data_dir)
            kept[checkpoint] = Loaded(checkpoint, {"encoder": record}, {"encoder": jax.device_get(params)})
        return evaluate_knn(locked, checkpoint, neighbors=(neighbors,), data_dir=data_dir, workers=workers)


def _initial_encoder(config: ConfigDict, of: str, data_dir: str | None) -> tuple[dict[str, Any], Any]:
    """(record, parameters) of an encoder with random weights; `of`: see `initial` of knn."""
    key = jax.random.key(config.seed)
    if of == STUDENT:
        task = build_experiment(config, data_dir=data_dir).task
        return task.model["encoder"], task.init(key)["encoder"]
    record = load_record(of)["encoder"]
    encoder = ViT.from_record(record)
    return record, jax.jit(encoder.init)(key, jnp.zeros((1, *encoder.image_size, 3)))["params"]


def read(config: dict[str, Any], data_dir: str | None, workers: int) -> dict[str, Any]:
    """{"seconds"}: how long the input pipeline takes to make a batch of the training; no device is used."""
    jax.config.update("jax_platforms", "cpu")
    experiment = build_experiment(from_json(config), data_dir=data_dir)
    with training_batches(experiment, start_step=0, workers=workers) as batches:
        next(batches)
        done, began = 0, time.perf_counter()
        while done < _MEASURED_STEPS[0] or time.perf_counter() - began < _MEASURED_SECONDS:
            next(batches)
            done += 1
        return {"seconds": (time.perf_counter() - began) / done}


def plan(
    config: dict[str, Any], topology: str, data_dir: str | None, memory: int | None = None, cache: str = CACHE
) -> dict[str, Any]:
    """Duration and memory of the training on other hardware, from compiling its step for it; see plan.plan.make_plan.

    Returns "hours" and "chip_hours" of all steps, including the time in which devices wait for images from the usual
    host of a Google Cloud machine; "seconds" of a step on the devices alone; "micro_batches", the smallest number that
    fits; "steps", "parameters" and "trained" as in choices.Measured.

    Args:
      topology: its name, such as v5e-8.
      memory: bytes that a program may use on each device; None: the value in CHIPS.

    Raises ValueError for an unknown topology, or if not even one image fits on each device.
    """
    jax.config.update("jax_platforms", "cpu")
    wanted, locked = parse_topology(topology), from_json(config)
    limit = USABLE * memory if memory else wanted.chip.memory
    counts, parts = micro_batch_counts(locked.train.batch_size, wanted.chips), 1
    while True:
        tried = changed(locked, {"train.accumulate": parts})
        found = make_plan(tried, wanted, data_dir=data_dir, search=False, cache=cache)
        if found.fits and found.time and found.needed <= limit:
            return {
                "topology": topology,
                "hours": found.hours,
                "chip_hours": found.hours * wanted.chips,
                "seconds": found.time.seconds,
                "micro_batches": parts,
                "steps": found.steps,
                "parameters": found.parameters["all"],
                "trained": found.parameters["trained"],
            }
        more = [n for n in counts if n > parts]
        if not more:
            raise ValueError(
                f"{topology}: a batch of {locked.train.batch_size} does not fit, not even one image on each device"
            )
        # Parameters and optimizer state keep their size; temporaries shrink in proportion to the micro-batch at best.
        rest = sum(size for name, size in found.parts.items() if name.startswith("temporaries"))
        least = max(2 * parts, parts * rest / max(limit - (found.needed - rest), 1))
        parts = next((n for n in more if n >= least), more[-1])


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "hardware": hardware,
    "measure": measure,
    "read": read,
    "knn": knn,
    "plan": plan,
}


def main(words: list[str]) -> None:
    """Calls a function with the arguments in one JSON file and writes its result to another."""
    end_with_parent_of_environment()
    start_logging()
    name, request, result = words
    arguments = json.loads(pathlib.Path(request).read_text())
    use_compile_cache(arguments.pop("compile_cache", ""))
    try:
        found = FUNCTIONS[name](**arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, ValueError | OSError | ImportError | CheckpointError):
            traceback.print_exc()  # probably a bug: the log needs the traceback
        print(f"tinymim distill: {error}", flush=True)
        sys.exit(ERROR)
    write_json(result, found)


if __name__ == "__main__":
    status = DONE
    try:
        main(sys.argv[1:])
    except SystemExit as stop:
        status = int(stop.code or DONE)
    exit_at_once(status, "")  # threads of the input pipeline could abort the interpreter's shutdown
