"""Computes a step of a run again, starting from the newest checkpoint before it."""

import dataclasses
import json
import logging
import re
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from tinymim_jax.analysis.steps import Step, describe_step, look_at_step, write_step
from tinymim_jax.checkpoints.format import Damaged, digest
from tinymim_jax.checkpoints.restoring import read_step
from tinymim_jax.config import from_json
from tinymim_jax.experiment import Experiment, batch_shapes, build_experiment, build_optimizer, training_batches
from tinymim_jax.metrics import no_averages
from tinymim_jax.resume import Inputs, check_inputs, recorded_micro_batches
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.runtime.workdir import REPLAY
from tinymim_jax.sharding import make_mesh, place_batch, replicated
from tinymim_jax.state import TrainState, init_state, make_train_step, place_frozen, trained_paths
from tinymim_jax.tasks.task import Params

log = logging.getLogger(__name__)


def replay(workdir: str, number: int, *, data_dir: str | None = None, workers: int = 0) -> Step:
    """The batch, losses and gradients of step `number` of a run, counted from 1.

    A step is a function of its number and the weights before it. These are computed again from the newest intact
    checkpoint before the step, or from the initial weights. Nothing in the workdir is changed.

    Raises ValueError for a step that the run does not have, and if teacher or data are not those of the run.
    """
    folder = epath.Path(workdir).expanduser()
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the --workdir of a run")
    config = from_json(json.loads(path.read_text()))
    experiment = build_experiment(config, data_dir=data_dir)
    if not 1 <= number <= experiment.total_steps:
        raise ValueError(f"--step {number}: the run has steps 1 to {experiment.total_steps}")
    accumulate = config.train.accumulate or recorded_micro_batches(folder) or 1
    mesh = _mesh(experiment.batch_size // accumulate)
    task = experiment.task
    frozen = place_frozen(task.load_frozen(), mesh)
    names = tuple(experiment.train_source.class_names)
    check_inputs(folder, Inputs(digest(frozen), names, len(experiment.train_source), len(experiment.eval_source)))
    paths = trained_paths(task, frozen, batch_shapes(experiment))
    optimizer = build_optimizer(experiment, paths)
    settings = {"ema": config.train.ema}
    abstract, fresh = init_state(task, optimizer, paths, mesh, jax.random.key(config.seed), **settings)
    state = _nearest(folder / "checkpoints", number - 1, abstract)
    state = fresh() if state is None else state
    begun = int(state.step)
    if begun < number - 1:
        step = make_train_step(task, optimizer, paths, mesh, accumulate=accumulate, **settings)
        state = _advanced(experiment, mesh, state, frozen, step, number - 1, workers)
    found = look_at_step(
        experiment, mesh, state.params, frozen, paths, number=number, accumulate=accumulate, workers=workers
    )
    return dataclasses.replace(found, repeated=number - 1 - begun)


def explain_step(
    workdir: epath.Path,
    experiment: Experiment,
    mesh: Mesh,
    state: TrainState,
    frozen: Params,
    paths: frozenset,
    *,
    number: int,
    accumulate: int,
) -> str:
    """A sentence about a step that was not finite, for the error of the run; writes a page with its images.

    In a job of several processes, and if the weights have changed since that step, it only names the command that
    shows the step.

    Args:
      state: the current state. Skipped updates do not change it, but the step after the last one that was checked may
        have been finite.
    """
    command = f"tinymim replay {workdir} --step {number}"
    if jax.process_count() > 1 or not int(state.skipped_in_a_row):
        return f"To see its images and gradients: {command}"
    try:
        step = look_at_step(experiment, mesh, state.params, frozen, paths, number=number, accumulate=accumulate)
        path = write_step(step, workdir / REPLAY, workdir.name)
    except Exception as error:  # the run's own error is what matters
        log.warning("step %d could not be looked at: %s: %s", number, type(error).__name__, error)
        return f"To see its images and gradients: {command}"
    said = describe_step(step)
    return f"{said[:1].upper()}{said[1:]}. Its images, losses and gradients: {path}"


def _mesh(rows: int) -> Mesh:
    """A mesh of the largest number of local devices that divides `rows`. The run may have had other devices."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    return make_mesh(devices=devices[:count])


def _nearest(checkpoints: epath.Path, most: int, abstract: Any) -> Any | None:
    """The state of the newest intact checkpoint of at most `most` steps; None if there is none."""
    if not checkpoints.is_dir():
        return None
    checkpoints = checkpoints.resolve()  # Orbax takes absolute paths only
    steps = [int(path.name) for path in checkpoints.iterdir() if re.fullmatch(r"\d+", path.name)]
    for step in sorted((step for step in steps if step <= most), reverse=True):
        try:
            return read_step(checkpoints / str(step), abstract)[0]
        except Damaged as error:
            log.warning("checkpoint %d is damaged, trying the one before it: %s", step, str(error).split("\n")[0])
    return None


def _advanced(
    experiment: Experiment, mesh: Mesh, state: Any, frozen: Params, train_step: Any, until: int, workers: int
) -> Any:
    """The state after `until` steps, computed from `state`."""
    begun, began = int(state.step), time.perf_counter()
    log.info("steps %d to %d are computed again, to arrive at step %d", begun + 1, until, until + 1)
    root = jax.random.key(experiment.config.seed)
    recorded = jax.device_put(no_averages((*experiment.task.names, "gradient_norm")), replicated(mesh))
    with training_batches(experiment, start_step=begun, workers=workers) as batches:
        for step in range(begun, until):
            state, recorded, skipped = train_step(state, recorded, frozen, place_batch(mesh, next(batches)), root)
            jax.block_until_ready(skipped)
            if (step + 1 - begun) % 50 == 0:
                per_step = (time.perf_counter() - began) / (step + 1 - begun)
                log.info("step %d/%d | ETA %s", step + 1, until, format_seconds(per_step * (until - step - 1)))
    return state
