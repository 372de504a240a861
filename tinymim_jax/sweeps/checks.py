"""Is an experiment sound? All of it is built and its step is traced: no accelerator is used, nothing is computed."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.config import load_config
from tinymim_jax.experiment import assemble, batch_shapes, build_optimizer, open_sources, preprocessing
from tinymim_jax.resume import differences
from tinymim_jax.state import trained_paths
from tinymim_jax.sweeps.points import Point, Run
from tinymim_jax.tasks.pretrained import Loaded, keeping_checkpoints


def check_points(points: Iterable[Point], *, data_dir: str | None = None, need_data: bool = True) -> None:
    """Raises the first error that running the points would meet before their first step, with the point's name.

    A checkpoint that an earlier stage is yet to make is stood in for by zeros of its shapes. With `need_data` False,
    data that is not here is replaced by the length and classes of the task's usual data set.
    """
    # Whoever starts the runs must not take the devices from them.
    jax.config.update("jax_platforms", "cpu")
    seen: dict[str, Any] = {}
    with keeping_checkpoints() as kept:
        for point, run in _runs(points):
            try:
                config = load_config(run.config, run.overrides)
                _check_unchanged(run, config)
                kept[str(run.workdir)] = _check(config, run, kept, seen, data_dir, need_data)
            except (ValueError, TypeError, OSError, AttributeError, KeyError, CheckpointError) as error:
                raise ValueError(f"{_name(point, run)}: {error}") from error


def check_words(points: Iterable[Point]) -> None:
    """Raises ValueError, with the point's name, where the overrides do not fit the config."""
    for point, run in _runs(points):
        try:
            load_config(run.config, run.overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_name(point, run)}: {error}") from error


def _runs(points: Iterable[Point]) -> list[tuple[Point, Run]]:
    return [(point, run) for point in points for run in point.runs]


def _name(point: Point, run: Run) -> str:
    return " ".join(filter(None, (point.name and f"point {point.name}", run.name and f"stage {run.name}"))) or "here"


def _check_unchanged(run: Run, config: ConfigDict) -> None:
    if rows := differences(run.workdir, config):
        raise ValueError(
            f"{run.workdir} holds another experiment: its file or the words behind the command have changed\n"
            + "\n".join(rows)
            + "\nPut them back, choose another --workdir, or delete that folder"
        )


def _check(config: ConfigDict, run: Run, kept: dict, seen: dict, data_dir: str | None, need_data: bool) -> Loaded:
    """What the run's checkpoint will look like."""
    everything, step = _key(config, kept), _key(config, kept, without=("optim",))
    if everything in seen:
        return seen[everything]
    sources = open_sources(config, data_dir=data_dir, need_data=need_data)
    experiment = assemble(config, *sources)
    task = dataclasses.replace(experiment.task, init=jax.jit(experiment.task.init))  # traced once for all its uses
    params = jax.eval_shape(task.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), params)
    if step not in seen:
        if task.start is not None:
            task.start(zeros)
        seen[step] = trained_paths(task, task.load_frozen(), batch_shapes(experiment))
    build_optimizer(dataclasses.replace(experiment, task=task), seen[step])
    model = task.model | {"preprocessing": preprocessing(config, experiment.train_source.class_names)}
    seen[everything] = Loaded(str(run.workdir), model, zeros)
    return seen[everything]


def _key(config: ConfigDict, kept: dict[str, Loaded], without: tuple[str, ...] = ()) -> str:
    """Equal for configs that are as sound as each other: points often differ in their seed or learning rate alone."""
    values: dict[str, Any] = config.to_dict()
    for name in ("seed", "checkpoint", *without):
        values.pop(name)
    text = json.dumps(values, sort_keys=True, default=str)
    for path, loaded in kept.items():
        text = text.replace(json.dumps(path), json.dumps(loaded.model, sort_keys=True))
    return text
