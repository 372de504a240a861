"""Task: a model with its losses, as training and evaluation use it. TaskType: builds a Task from a config."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.data.sources.examples import Source
from tinymim_jax.metrics import Metric, means
from tinymim_jax.tasks.segmenter import Segmenter
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.views import Views, image_views

Batch = dict[str, Any]
Params = Any  # nested dicts of arrays
PerExample = dict[str, jax.Array]

RUNNING = "running"

Losses = Callable[[Params, Params, Batch, jax.Array, bool], dict[str, Any]]


def nothing_frozen() -> Params:
    """The `load_frozen` of a task without frozen weights."""
    return {}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training in which a task has other losses.

    begins: when, as a duration of the config: "100 epochs".
    losses: as Task.losses, with the same names and running statistics.
    label: what differs, for the log.
    span: the numbers of steps that are done before its steps; None until `with_spans` has counted them.
    """

    begins: str
    losses: Losses
    label: str
    span: range | None = None


@dataclasses.dataclass(frozen=True)
class Student:
    """A model that is trained beside that of the task.

    config: the experiment in which it is the only one, with its own learning rate.
    model, origin: as of a Task.
    lr_scale: its learning rate, relative to that of the task's model.
    """

    config: ConfigDict
    model: dict[str, Any]
    origin: dict[str, Any]
    lr_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and how it is trained and evaluated, as pure functions.

    model: the architecture as plain JSON, written to model.json beside every checkpoint.
    init: key -> fresh float32 parameters. It is jitted here, so that all who need it or its shapes trace it once.
    losses: (params, frozen, batch, key, train) -> float32 [batch] by name. Training minimizes the mean of "loss"; the
      other values are recorded only. With train=False there is no augmentation and no drop path. With train=True a
      task with running statistics also returns them under RUNNING: the part of `params` that holds them (parameters
      without a gradient) with the values for the next step.
    names: the names of the values that `losses` returns.
    load_frozen: () -> weights that are an argument of the step, never trained and never checkpointed.
    start: parameters on the host -> the same with pre-trained values filled in; None trains from scratch.
    origin: where frozen weights come from and how they are used, for model.json; analysis reads it
    metric: what evaluation computes; None averages the values of `losses` over the examples.
    segmenter: for a task that labels pixels. Evaluation then shows it whole images, of any size, and computes mean IoU
      (evaluation/segmentation.py) in place of `metric`.
    phases: of a training whose losses change with the step, in order; () if they do not. `losses` are then those of
      the last phase, by which every evaluation is done.
    remark: this process's rows of the first batch -> lines for the log, which training writes when it starts or goes
      on. None: there is nothing to say.
    students: further models by name, each trained as it would be alone; the parameters of each are
      params[STUDENTS][name] (checkpoints/params.py), and gradients are clipped for each apart.
    seen: (batch, key) -> what each network is shown in the training step with this key, to be looked at: float32
      [batch, height, width, 3] of 0..1 by the network's name, hidden patches in grey. None: the batch's images.
    """

    model: dict[str, Any]
    init: Callable[[jax.Array], Params]
    losses: Losses
    names: tuple[str, ...]
    load_frozen: Callable[[], Params] = nothing_frozen
    start: Callable[[Params], Params] | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    metric: Metric | None = None
    segmenter: Segmenter | None = None
    phases: tuple[Phase, ...] = ()
    remark: Callable[[Batch], str] | None = None
    students: Mapping[str, Student] = dataclasses.field(default_factory=dict)
    seen: Callable[[Batch, jax.Array], dict[str, jax.Array]] | None = None

    def __post_init__(self):
        object.__setattr__(self, "init", jax.jit(self.init))


def losses_of_phases(task: Task) -> tuple[Losses, ...]:
    """The losses of each phase, or those of the task if it has no phases."""
    return tuple(phase.losses for phase in task.phases) or (task.losses,)


def phase_at(task: Task, step: jax.Array | int) -> jax.Array:
    """int32, the number of the phase of the training step before which `step` steps are done."""
    spans = [phase.span for phase in task.phases]
    if None in spans:
        raise ValueError("the phases of this task are not counted in steps yet: see with_spans")
    starts = jnp.array([span.start for span in spans[1:] if span], jnp.int32)
    return jnp.sum(step >= starts, dtype=jnp.int32)


def with_spans(task: Task, in_steps: Callable[[str], int], total: int) -> Task:
    """`task` with the spans of its phases, in a training of `total` steps.

    Args:
      in_steps: converts a duration of the config.

    Raises ValueError for a phase without a step.
    """
    if not task.phases:
        return task
    starts = [in_steps(phase.begins) for phase in task.phases]
    spans = [range(start, end) for start, end in zip(starts, [*starts[1:], total], strict=False)]
    for phase, span in zip(task.phases, spans, strict=True):
        if not span:
            raise ValueError(
                f"the phase that begins after {phase.begins!r} ({phase.label}) has no step: it would be steps "
                f"{span.start + 1} to {span.stop} of {total}; move its begin, or set a longer train.duration"
            )
    return dataclasses.replace(
        task,
        phases=tuple(dataclasses.replace(phase, span=span) for phase, span in zip(task.phases, spans, strict=True)),
    )


def unchanged(config: ConfigDict) -> ConfigDict:
    """The `for_evaluation` of a task whose config serves evaluation as it is."""
    return config


def as_opened(config: ConfigDict, source: Source) -> Source:
    """The `sources` of a task that uses the records as they are."""
    return source


@dataclasses.dataclass(frozen=True)
class TaskType:
    """An entry of TASKS: the interface of a task.

    build: (config, class names of the training data; empty for unlabelled data) -> Task. Raises ValueError for a
      config that cannot be trained.
    needs_labels: training and evaluation read `batch["label"]`, so the data must have labels.
    views: config -> how examples become rows of a batch, and so which arrays a batch has.
    class_views: (config, number of classes) -> the same, in place of `views`, for arrays that depend on that number.
    for_evaluation: config -> the config under which a checkpoint is evaluated, without what only training needs; it
      may change its argument.
    sources: (config, source as opened) -> the source that the task uses, for training and evaluation data alike; such
      as one whose masks are read as labels of pixels, and whose classes are those of the masks.
    stand_ins: (config, number of classes) -> zeros for checkpoints that are missing, so that training can be planned.
    batch_norm: training normalizes by statistics of a micro-batch, so train.accumulate is part of what is trained.
    images_per_core: images per second that a core prepares for training, as planning assumes: here of ImageNet's files,
      slightly below benchmarks/README.md.
    usual_data: (number of images, number of classes) of the data set that planning assumes where the data is missing.
    """

    build: Callable[[ConfigDict, Sequence[str]], Task]
    needs_labels: bool = False
    views: Callable[[ConfigDict], Views] = image_views
    class_views: Callable[[ConfigDict, int], Views] | None = None
    for_evaluation: Callable[[ConfigDict], ConfigDict] = unchanged
    sources: Callable[[ConfigDict, Source], Source] = as_opened
    stand_ins: Callable[[ConfigDict, int], list[StandIn]] = lambda config, classes: init_stand_in(config)
    batch_norm: bool = False
    images_per_core: int = 750
    usual_data: tuple[int, int] = (1_281_167, 1000)  # ImageNet-1K


def pictures(task: Task, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """`task.seen`, or the batch's images under "network"."""
    if task.seen is None:
        return {"network": batch["image"].astype(jnp.float32) / 255}
    return task.seen(batch, key)


def evaluation_metric(task: Task) -> Metric:
    """The task's own metric, or the averages of its losses."""

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> PerExample:
        return task.losses(params, frozen, batch, key, False)

    return task.metric or Metric(values=losses, result=means)
