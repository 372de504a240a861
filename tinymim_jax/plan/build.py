"""Builds an experiment for planning: from shapes alone, without data, checkpoints or devices."""

import dataclasses
import functools
import json
from typing import Any

import jax
from ml_collections import ConfigDict

from tinymim_jax.config import from_json
from tinymim_jax.experiment import (
    Experiment,
    MissingData,
    assemble,
    batch_shapes,
    open_sources,
    task_type,
)
from tinymim_jax.flops import phase_flops, step_flops
from tinymim_jax.memory import abstract_step
from tinymim_jax.state import trained_paths
from tinymim_jax.tasks.pretrained import keeping_checkpoints


@dataclasses.dataclass(frozen=True)
class Planned:
    """A training that is described by shapes only.

    config: as it was given.
    experiment: built with stand-ins for missing data and checkpoints.
    frozen: shapes of the weights that are not trained.
    paths: of the trained parameters.
    notes: one sentence for each stand-in.
    data_dir: the folder of prepared data sets, as given.
    """

    config: ConfigDict
    experiment: Experiment
    frozen: Any
    paths: frozenset
    notes: tuple[str, ...]
    data_dir: str | None = None

    def params(self) -> Any:
        """Shapes of all parameters."""
        return jax.eval_shape(self.experiment.task.init, jax.random.key(0))

    @functools.cached_property
    def flops(self) -> tuple[float, float]:
        """FLOPs of one step on the global batch: (without, with) what `model.remat` recomputes."""
        executed, config = self._flops(), self.experiment.config
        if config.model.get("remat", "none") == "none":
            return executed, executed
        return plan_experiment(changed(config, {"model.remat": "none"}), data_dir=self.data_dir)._flops(), executed

    @functools.cached_property
    def phases(self) -> tuple[tuple[int, str, float], ...]:
        """(number of steps, what differs, FLOPs of a step) of each phase; () if the task has none."""
        phases = self.experiment.task.phases
        if not phases:
            return ()
        flops = phase_flops(self.experiment.task, self.frozen, batch_shapes(self.experiment))
        return tuple((len(phase.span or ()), phase.label, each) for phase, each in zip(phases, flops, strict=True))

    def _flops(self) -> float:
        return step_flops(self.experiment.task, self.frozen, batch_shapes(self.experiment))

    def step(self, mesh: Any) -> tuple[Any, tuple]:
        """(the jitted training step, its arguments as shapes with their shardings on `mesh`).

        With an AbstractMesh the step cannot be compiled; only the arguments are meaningful.
        """
        experiment = self.experiment
        return abstract_step(experiment, self.frozen, self.paths, mesh, experiment.config.train.accumulate)


def plan_experiment(config: ConfigDict, *, data_dir: str | None = None) -> Planned:
    """Builds the experiment of `config` as training would.

    Missing data has the length and classes of the task's usual data set (ImageNet); a missing checkpoint is zeros of
    the shapes that the task expects (`TaskType.stand_ins`).

    Raises:
      ValueError: the config is invalid for training too, or the architecture of a missing teacher is unknown.
    """
    notes: list[str] = []
    given, config = config, from_json(json.loads(json.dumps(config.to_dict())))
    with keeping_checkpoints() as kept:
        sources = open_sources(config, data_dir=data_dir, need_data=False)
        length, classes = len(sources[0]), sources[0].classes
        if isinstance(sources[0], MissingData):
            assumed = f"taken as {length:,} images of {classes} classes"
            notes.append(f"data.source={config.data.source!r} is not here: {assumed}")
        for stand_in in task_type(config).stand_ins(config, classes):
            config = changed(config, {stand_in.key: stand_in.loaded.path})
            kept[stand_in.loaded.path] = stand_in.loaded
            notes.append(stand_in.note)
        experiment = assemble(config, *sources)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experiment.task.load_frozen())
        paths = trained_paths(experiment.task, frozen, batch_shapes(experiment))
    return Planned(given, experiment, frozen, paths, tuple(notes), data_dir)


def with_attention(config: ConfigDict, form: str) -> ConfigDict:
    """A copy of a config with attention, and relation losses where the task has them, in this form (ops.attention)."""
    changes = {"model.attention": form}
    if "distill" in config:
        changes["distill.relation_form"] = form
    return changed(config, changes)


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a config with dotted keys set."""
    copied = from_json(config.to_dict())
    for key, value in changes.items():
        *parents, name = key.split(".")
        section = functools.reduce(getattr, parents, copied)
        section[name] = value
    return copied
