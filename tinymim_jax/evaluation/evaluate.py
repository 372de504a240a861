"""Evaluation of a task on a split: every example counts exactly once."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.params import load_params, load_record
from tinymim_jax.class_names import REMEDY, match_classes
from tinymim_jax.data.pipeline import Batches
from tinymim_jax.evaluation.checks import check_preprocessing
from tinymim_jax.evaluation.collect import count_substituted
from tinymim_jax.evaluation.segmentation import PixelLabeller, score_split
from tinymim_jax.experiment import Experiment, assemble, evaluation_batches, open_sources, task_type
from tinymim_jax.metrics import Metric, Tally
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.state import make_eval_step, place_frozen
from tinymim_jax.tasks.task import Params, evaluation_metric

log = logging.getLogger(__name__)


def evaluate(
    eval_step: Callable[..., Any],
    metric: Metric,
    params: Params,
    frozen: Params,
    batches: Batches,
    mesh: Mesh,
    *,
    examples: int,
    seed: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The figures of `metric` over a split, "examples", and how many of these were "substituted".

    Args:
      eval_step: state.make_eval_step(metric, mesh).
      batches: padded batches with `valid`; closed at the end.
      examples: length of the split. Counting another number of examples is an error.
      seed: for tasks whose loss is random (which patches are hidden).
      on_batch: called after each batch.

    Raises RuntimeError if more than 0.1 % of the images cannot be decoded; in place of fewer others are counted.
    """
    root = jax.random.key(seed)
    tally = Tally(metric)
    with batches:
        for i, batch in enumerate(batches):
            tally.add(*eval_step(params, frozen, place_batch(mesh, batch), jax.random.fold_in(root, i)))
            on_batch()
    figures, counted = tally.result()
    if counted != examples:
        raise RuntimeError(f"evaluation counted {counted} examples, but the split has {examples}")
    return figures | {"examples": counted, "substituted": count_substituted(batches, examples)}


# (params, frozen, workers=, on_batch=) -> figures
Evaluation = Callable[..., dict[str, float]]


def make_evaluation(experiment: Experiment, mesh: Mesh) -> Evaluation:
    """`(params, frozen, *, workers=0, on_batch=...) -> figures` of the experiment's evaluation split.

    A function, so that an evaluation that is repeated during training compiles its programs once. Tasks that label
    pixels are shown whole images (evaluation/segmentation.py), which are decoded by threads, not by `workers`.
    """
    task, config = experiment.task, experiment.config
    if task.segmenter is not None:
        labeller = PixelLabeller(task.segmenter, mesh)

        def score(params: Params, frozen: Params, *, workers: int = 0, on_batch=lambda: None) -> dict[str, float]:
            del workers
            source, upright = experiment.eval_source, config.data.upright
            return score_split(labeller, params, frozen, source, mesh, upright=upright, on_image=on_batch)

        return score
    metric = evaluation_metric(task)
    step = make_eval_step(metric, mesh)

    def measure(params: Params, frozen: Params, *, workers: int = 0, on_batch=lambda: None) -> dict[str, float]:
        batches, examples = evaluation_batches(experiment, workers=workers), len(experiment.eval_source)
        options = {"examples": examples, "seed": config.seed, "on_batch": on_batch}
        return evaluate(step, metric, params, frozen, batches, mesh, **options)

    return measure


def evaluate_checkpoint(
    config: ConfigDict, checkpoint: str | pathlib.Path, *, data_dir: str | None = None, workers: int = 0
) -> dict[str, float]:
    """Figures of `checkpoint` (a run, or a converted file) under the experiment of `config`.

    Of the data only the evaluation split is needed; the classes of the training split are compared where it is there.

    Raises ValueError when the checkpoint lacks what the experiment evaluates, such as a classifier's head, or was
    trained on pixels normalized otherwise; ClassMismatch (a ValueError) when its classes are not those of the data.
    """
    config = ConfigDict(config.to_dict() | {"init": str(checkpoint)})
    config = task_type(config).for_evaluation(config)
    config.data.examples = 0
    model, _ = load_params(checkpoint)
    check_preprocessing(config, model, str(checkpoint))
    experiment = _experiment(config, data_dir)
    task = experiment.task
    known = model.get("preprocessing", {}).get("class_names")
    if known and any(part in model and part in task.model for part in ("classifier", "segmenter")):
        # Without names this happens in `task.start`, which takes the head; there a mismatch is no error.
        names, data = experiment.train_source.class_names, config.data.source
        remedy = f"{REMEDY}. For data with only some of the classes: --suite {data}@{config.data.eval_split}"
        match_classes(known, names, classifier=str(checkpoint), data=repr(data), remedy=remedy)
    if bool(model["encoder"].get("dist_token")) != bool(task.model["encoder"].get("dist_token")):
        raise ValueError(
            f"{checkpoint} has {'a' if model['encoder'].get('dist_token') else 'no'} DIST token, but the config has "
            f"model.dist_token={config.model.dist_token}: change it"
        )
    _check_parts(str(checkpoint), model, task.model, config.task)
    for student in task.students.values():
        _check_parts(student.config.init, load_record(student.config.init), student.model, config.task)
    assert task.start is not None
    mesh = make_mesh()
    params = place_frozen(task.start(jax.device_get(task.init(jax.random.key(config.seed)))), mesh)
    return make_evaluation(experiment, mesh)(params, place_frozen(task.load_frozen(), mesh), workers=workers)


def _experiment(config: ConfigDict, data_dir: str | None) -> Experiment:
    """The experiment for an evaluation. Where there is no training split, the evaluation split takes its place."""
    missing = config.data.train_split
    try:
        sources = open_sources(config, data_dir=data_dir)
    except (ValueError, FileNotFoundError) as error:
        config.data.train_split = config.data.eval_split
        sources = open_sources(config, data_dir=data_dir)  # says so if the evaluation split is missing, too
        log.info("evaluating without data.train_split=%r: %s", missing, error)
    return assemble(config.lock(), *sources)


def _check_parts(checkpoint: str, model: dict[str, Any], wanted: dict[str, Any], task: str) -> None:
    for part, record in wanted.items():
        if part != "encoder" and model.get(part) != record:
            raise ValueError(
                f"{checkpoint} has {part} {model.get(part)}, but the experiment needs {record}: give the checkpoint "
                f"of a {task!r} run, or correct the config"
            )
