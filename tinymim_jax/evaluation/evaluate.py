"""One split, every example exactly once."""

import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.data.pipeline import Batches
from tinymim_jax.experiment import build_experiment, evaluation_batches
from tinymim_jax.metrics import Averages, compute, no_averages
from tinymim_jax.sharding import make_mesh, place_batch, replicated
from tinymim_jax.state import make_eval_step, place_frozen
from tinymim_jax.tasks.task import Params


def evaluate(
    eval_step: Callable[..., Averages],
    names: tuple[str, ...],
    params: Params,
    frozen: Params,
    batches: Batches,
    mesh: Mesh,
    *,
    examples: int,
    seed: int,
) -> dict[str, float]:
    """Means over a split.

    Args:
      eval_step: from state.make_eval_step.
      names: of the task's losses.
      batches: padded batches with `valid`; closed at the end.
      examples: length of the split. Another count is an error: a figure over some of the examples is worth nothing.
      seed: for tasks whose loss is random (which patches are hidden).
    """
    root = jax.random.key(seed)
    recorded = jax.device_put(no_averages(names), replicated(mesh))
    with batches:
        for i, batch in enumerate(batches):
            key = jax.random.fold_in(root, i)
            recorded = eval_step(params, frozen, place_batch(mesh, batch), key, recorded)
    counted = int(recorded["loss"].count)
    if counted != examples:
        raise RuntimeError(f"evaluation counted {counted} examples, but the split has {examples}")
    return compute(recorded) | {"examples": counted}


def evaluate_checkpoint(
    config: ConfigDict, checkpoint: str | pathlib.Path, *, data_dir: str | None = None, workers: int = 0
) -> dict[str, float]:
    """Figures of `checkpoint` (a run, or a converted file) under the experiment of `config`.

    Raises ValueError when the checkpoint lacks what the experiment judges, such as a classifier's head.
    """
    config = _without_teacher(ConfigDict(config.to_dict() | {"init": str(checkpoint)})).lock()
    model, _ = load_params(checkpoint)
    experiment = build_experiment(config, data_dir=data_dir)
    task = experiment.task
    for part, record in task.model.items():
        if part != "encoder" and model.get(part) != record:
            raise ValueError(
                f"{checkpoint} has {part} {model.get(part)}, but the experiment needs {record}: give the checkpoint "
                f"of a {config.task!r} run, or correct the config"
            )
    assert task.start is not None
    mesh = make_mesh()
    params = place_frozen(task.start(jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))), mesh)
    return evaluate(
        make_eval_step(task),
        task.names,
        params,
        place_frozen(task.load_frozen(), mesh),
        evaluation_batches(experiment, workers=workers),
        mesh,
        examples=len(experiment.eval_source),
        seed=config.seed,
    )


def _without_teacher(config: ConfigDict) -> ConfigDict:
    """What a classifier learned from a teacher is judged by the labels: the teacher may be gone."""
    if config.task == "classify" and config.classify.get("distillation", "none") != "none":
        config.classify.distillation, config.classify.teacher.path = "none", ""
    return config
