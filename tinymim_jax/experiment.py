"""Builds the objects of a run from its config: sources, task, schedule, optimizer, batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from tinymim_jax import optim
from tinymim_jax.checkpoints.params import STUDENTS
from tinymim_jax.class_names import ClassMismatch, describe_difference, same_names
from tinymim_jax.data.pipeline import Batches, eval_batches, train_batches
from tinymim_jax.data.rows import row_arrays
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import labelled
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.errors import unknown
from tinymim_jax.runtime.progress import steps
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.task import Task, TaskType, with_spans
from tinymim_jax.tasks.views import Views

_EVALUATED_PER_DEVICE = 256  # images at a time


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with its data sets opened, its task built, and durations counted in steps.

    views: of the task; they make the rows of training and evaluation batches.
    batch_size: examples in one update, over all processes.
    total_steps, eval_every, probe_every: in updates; eval_every is 0 when evaluation comes at the end only, probe_every
      when there are no probes.
    schedule: update number -> learning rate.
    """

    config: ConfigDict
    train_source: Source
    eval_source: Source
    task: Task
    views: Views
    batch_size: int
    total_steps: int
    eval_every: int
    probe_every: int
    schedule: optax.Schedule


def build_experiment(config: ConfigDict, *, data_dir: str | None = None) -> Experiment:
    """Opens the data and builds the task; no device is used."""
    return assemble(config, *open_sources(config, data_dir=data_dir))


def task_type(config: ConfigDict) -> TaskType:
    """The row of TASKS that `config.task` names; ValueError if there is none."""
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    return TASKS[config.task]


def open_sources(config: ConfigDict, *, data_dir: str | None = None, need_data: bool = True) -> tuple[Source, Source]:
    """(training data, evaluation data). Where the data is missing and `need_data` is False, both are `MissingData`."""
    try:
        return _open_sources(config, data_dir)
    except FileNotFoundError:
        if need_data or config.data.source == "digits":
            raise
        examples, classes = task_type(config).usual_data
        return MissingData(examples, classes), MissingData(examples, classes)


class MissingData(Source):
    """Stands for a missing data set: it has a length and a number of classes, but no records."""

    name, split = "missing data", "train"

    def __init__(self, examples: int, classes: int):
        self._examples = examples
        self.class_names = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int):
        raise IndexError(index)


def _open_sources(config: ConfigDict, data_dir: str | None) -> tuple[Source, Source]:
    data, used = config.data, task_type(config).sources
    train_source = open_source(
        data.source,
        split=data.train_split,
        data_dir=data_dir,
        examples=data.examples or None,
        seed=config.seed,
    )
    eval_source = open_source(data.source, split=data.eval_split, data_dir=data_dir)
    return used(config, train_source), used(config, eval_source)


def assemble(config: ConfigDict, train_source: Source, eval_source: Source) -> Experiment:
    """The experiment of `config` on these sources. Raises ValueError if they do not fit each other."""
    kind = task_type(config)
    if kind.needs_labels:
        train_source = labelled(train_source, f"task {config.task!r} learns from them")
        eval_source = labelled(eval_source, f"task {config.task!r} is evaluated by them")
    _check_classes(config, train_source, eval_source)
    batch_size = config.train.batch_size
    if config.train.accumulate < 0:
        raise ValueError(
            f"train.accumulate={config.train.accumulate}: choose a number of micro-batches, or 0 to find the smallest "
            "number that fits into the devices' memory"
        )
    if config.train.accumulate and batch_size % config.train.accumulate:
        raise ValueError(
            f"train.batch_size={batch_size} cannot be split into train.accumulate={config.train.accumulate} equal "
            "micro-batches: choose a divisor"
        )
    if config.data.crops < 1 or batch_size % config.data.crops:
        raise ValueError(
            f"data.crops={config.data.crops} does not divide train.batch_size={batch_size}: a batch holds that many "
            "views of each image; choose a divisor, or 1"
        )

    def in_steps(duration: str, name: str) -> int:
        return steps(duration, examples=len(train_source), batch_size=batch_size, name=name)

    total_steps = in_steps(config.train.duration, "train.duration")
    if total_steps < 1:
        raise ValueError(
            f"train.duration={config.train.duration!r} is less than one step: {len(train_source)} training images in "
            f"batches of {batch_size}; choose a smaller train.batch_size or a longer train.duration"
        )
    peak = config.optim.base_lr * batch_size / 256
    warmup_steps = in_steps(config.optim.warmup, "optim.warmup")
    return Experiment(
        config=config,
        train_source=train_source,
        eval_source=eval_source,
        task=with_spans(
            kind.build(config, train_source.class_names), lambda begins: in_steps(begins, "a tap"), total_steps
        ),
        views=kind.class_views(config, train_source.classes) if kind.class_views else kind.views(config),
        batch_size=batch_size,
        total_steps=total_steps,
        eval_every=in_steps(config.train.eval_every, "train.eval_every"),
        probe_every=in_steps(config.train.probe_every, "train.probe_every"),
        schedule=_schedule(config.optim, peak, warmup_steps, total_steps),
    )


def _schedule(settings: ConfigDict, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    if settings.schedule not in optim.SCHEDULES:
        raise unknown("optim.schedule", settings.schedule, optim.SCHEDULES)
    if settings.schedule == "cosine":
        if settings.power != 1:
            raise ValueError(f"optim.power={settings.power} is for optim.schedule='poly' alone: leave it at 1")
        return optim.warmup_cosine(peak, warmup_steps, total_steps, settings.final_lr)
    if settings.final_lr:
        raise ValueError(f"optim.final_lr={settings.final_lr}: optim.schedule='poly' ends at 0, so leave it at 0")
    return optim.warmup_poly(peak, warmup_steps, total_steps, settings.power)


def _check_classes(config: ConfigDict, train_source: Source, eval_source: Source) -> None:
    """Raises ClassMismatch if a label does not mean the same in both splits.

    In folders a class that one split lacks changes the labels of all classes after it. The last ones may be missing
    from the evaluation split.
    """
    trained, evaluated = train_source.class_names, eval_source.class_names
    if trained and not same_names(trained[: len(evaluated)], evaluated):
        splits = (f"data.train_split={config.data.train_split!r}", f"data.eval_split={config.data.eval_split!r}")
        difference = describe_difference(trained, evaluated, then=f"in {splits[0]}", now=f"in {splits[1]}")
        raise ClassMismatch(
            f"{splits[0]} has {len(trained)} classes and {splits[1]} {len(evaluated)}, and their names differ: "
            f"{difference}. Give both the same classes; a class without images may be an empty folder"
        )


def build_optimizer(experiment: Experiment, paths: frozenset[optim.Path]) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the parameters at `paths`, as `config.optim` says; of several students one for each."""
    task = experiment.task
    trained, _ = optim.split(jax.eval_shape(task.init, jax.random.key(0)), paths)
    if not task.students:
        return _optimizer(experiment, trained, task.model)
    others = trained.pop(STUDENTS)
    return optim.with_others(
        _optimizer(experiment, trained, task.model),
        {
            name: _optimizer(experiment, others[name], student.model, student.lr_scale)
            for name, student in task.students.items()
        },
        STUDENTS,
    )


def _optimizer(
    experiment: Experiment, trained: Any, model: dict[str, Any], lr_scale: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    settings, schedule = experiment.config.optim, experiment.schedule
    return optim.make_optimizer(
        settings.name,
        schedule if lr_scale == 1 else lambda step: lr_scale * schedule(step),
        trained,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        trust=settings.trust,
        weight_decay=settings.weight_decay,
        no_decay=settings.no_decay,
        layer_decay=settings.layer_decay,
        depth=model["encoder"]["depth"],
        clip_norm=settings.clip_norm,
    )


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one training batch over all processes, for tracing."""
    return {
        name: jax.ShapeDtypeStruct((experiment.batch_size, *shape), dtype)
        for name, (shape, dtype) in row_arrays(experiment.views.train).items()
    }


def training_batches(experiment: Experiment, *, start_step: int, workers: int) -> Batches:
    """This process's rows of the endless sequence of global batches, from batch `start_step` on."""
    data = experiment.config.data
    return train_batches(
        experiment.train_source,
        augment=experiment.views.train,
        batch_size=experiment.batch_size,
        seed=experiment.config.seed,
        start_step=start_step,
        crops=data.crops,
        upright=data.upright,
        workers=workers,
        **_this_process(),
    )


def evaluation_batch_size(config: ConfigDict, devices: int) -> int:
    """Images of one evaluation batch over all devices: a training micro-batch, but at most 256 for each device.

    The limit is for an evaluation on fewer devices than the config's batch size was chosen for.
    """
    micro_batch = config.train.batch_size // max(config.train.accumulate, 1)
    return min(-(-micro_batch // devices), _EVALUATED_PER_DEVICE) * devices


def evaluation_batches(experiment: Experiment, *, workers: int) -> Batches:
    """This process's rows of the evaluation split, in batches of `evaluation_batch_size`; the last one is padded."""
    config = experiment.config
    return eval_batches(
        experiment.eval_source,
        view=experiment.views.eval,
        batch_size=evaluation_batch_size(config, jax.device_count()),
        upright=config.data.upright,
        tolerated=0,
        workers=workers,
        **_this_process(),
    )


def preprocessing(config: ConfigDict, class_names: Sequence[str]) -> dict[str, Any]:
    """How evaluation makes an input of the model from an image, and the names of its classes, as plain JSON.

    It is saved with the weights, in model.json, so that they can be used without the config (evaluation/predictor.py).
    """
    resize = {"resize": config.data.eval_resize} if "eval_resize" in config.data else {}
    return {
        "image_size": list(config.model.image_size),
        **resize,
        "interpolation": "bicubic",
        "upright": config.data.upright,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "class_names": list(class_names),
    }


def input_record(experiment: Experiment) -> dict[str, Any]:
    """`preprocessing` of an experiment; where pixels are labelled, also its windows and the colours of the classes."""
    record = preprocessing(experiment.config, experiment.train_source.class_names)
    if (segmenter := experiment.task.segmenter) is not None:
        record["windows"] = dataclasses.asdict(segmenter.windows)
        colours = getattr(experiment.train_source, "class_colours", ())
        record["class_colours"] = [list(colour) for colour in colours]
    return record


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
