"""Checks experiments before they start: everything is built and the training step is traced, but nothing computed."""

import json
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import STUDENTS, student_path
from tinymim_jax.config import load_config
from tinymim_jax.experiment import assemble, batch_shapes, build_optimizer, open_sources, preprocessing
from tinymim_jax.resume import check_same
from tinymim_jax.state import trained_paths
from tinymim_jax.sweeps.points import Point, Run
from tinymim_jax.tasks.pretrained import Loaded, keeping_checkpoints


def check_points(
    points: Iterable[Point], *, data_dir: str | None = None, need_data: bool = True, extend: bool = False
) -> dict[str, tuple[str, ...]]:
    """Raises the first error that running the points would meet before their first step, with the point's name.

    A checkpoint that an earlier stage has yet to make is replaced by zeros of its shapes.

    Args:
      need_data: if False, missing data is replaced by the length and classes of the task's usual data set.
      extend: runs may be trained for longer than their workdirs say.

    Returns the names of the figures in each point's result, by the name of the point; () if a task computes its own.
    """
    # This process only checks, and must leave the devices to the runs.
    jax.config.update("jax_platforms", "cpu")
    seen: dict[str, Any] = {}
    figures: dict[str, tuple[str, ...]] = {}
    with keeping_checkpoints() as kept:
        for point, run in _runs(points):
            try:
                config = load_config(run.config, run.overrides)
                check_same(epath.Path(run.workdir), config, extend=extend)
                found = _check(config, run, kept, seen, data_dir, need_data)
                made, figures[point.name] = found
                for student, loaded in made.items():
                    kept[student_path(run.workdir, student) if student else str(run.workdir)] = loaded
            except (ValueError, TypeError, OSError, AttributeError, KeyError, CheckpointError) as error:
                raise ValueError(f"{_name(point, run)}: {error}") from error
    return figures


def check_overrides(points: Iterable[Point]) -> None:
    """Raises ValueError, with the point's name, if the overrides do not fit the config."""
    for point, run in _runs(points):
        try:
            load_config(run.config, run.overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_name(point, run)}: {error}") from error


def _runs(points: Iterable[Point]) -> list[tuple[Point, Run]]:
    return [(point, run) for point in points for run in point.runs]


def _name(point: Point, run: Run) -> str:
    return " ".join(filter(None, (point.name and f"point {point.name}", run.name and f"stage {run.name}"))) or "here"


def _check(
    config: ConfigDict, run: Run, kept: dict, seen: dict, data_dir: str | None, need_data: bool
) -> tuple[dict[str, Loaded], tuple[str, ...]]:
    """What the run's checkpoint will look like ("", and by name for further students), and names of its figures."""
    everything, step = _key(config, kept), _key(config, kept, without=("optim",))
    if everything in seen:
        return seen[everything]
    sources = open_sources(config, data_dir=data_dir, need_data=need_data)
    experiment = assemble(config, *sources)
    task = experiment.task
    params = jax.eval_shape(task.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), params)
    if step not in seen:
        if task.start is not None:
            task.start(zeros)
        seen[step] = trained_paths(task, task.load_frozen(), batch_shapes(experiment))
    build_optimizer(experiment, seen[step])
    inputs = {"preprocessing": preprocessing(config, experiment.train_source.class_names)}
    others = zeros.pop(STUDENTS, {})
    made = {"": Loaded(str(run.workdir), task.model | inputs, zeros)}
    for name, student in task.students.items():
        made[name] = Loaded(student_path(run.workdir, name), student.model | inputs, others[name])
    seen[everything] = made, () if task.metric else task.names
    return seen[everything]


def _key(config: ConfigDict, kept: dict[str, Loaded], without: tuple[str, ...] = ()) -> str:
    """A text that is equal for configs that need one check only: points often differ in seed or learning rate alone."""
    values: dict[str, Any] = config.to_dict()
    for name in ("seed", "checkpoint", *without):
        values.pop(name)
    text = json.dumps(values, sort_keys=True, default=str)
    for path, loaded in kept.items():
        text = text.replace(json.dumps(path), json.dumps(loaded.model, sort_keys=True))
    return text
