"""The Task record: everything that training and evaluation know about what is trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from tinymim_jax.metrics import Metric, means

Batch = dict[str, Any]
Params = Any  # nested dicts of arrays
PerExample = dict[str, jax.Array]

RUNNING = "running"


def nothing_frozen() -> Params:
    """The `load_frozen` of a task without frozen weights."""
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and how it is trained and evaluated, as pure functions.

    model: the architecture as plain JSON, written to model.json beside every checkpoint.
    init: key -> fresh float32 parameters; may be jitted.
    losses: (params, frozen, batch, key, train) -> float32 [batch] by name. Training minimizes the mean of "loss"; the
      other values are recorded only. With train=False there is no augmentation and no drop path. With train=True a
      task with running statistics also returns them under RUNNING: the part of `params` that holds them (parameters
      without a gradient) with the values for the next step.
    names: the names of the values that `losses` returns.
    load_frozen: () -> weights that are an argument of the step, never trained and never checkpointed.
    start: parameters on the host -> the same with pre-trained values filled in; None trains from scratch.
    metric: what evaluation computes; None averages the values of `losses` over the examples.
    """

    model: dict[str, Any]
    init: Callable[[jax.Array], Params]
    losses: Callable[[Params, Params, Batch, jax.Array, bool], dict[str, Any]]
    names: tuple[str, ...]
    load_frozen: Callable[[], Params] = nothing_frozen
    start: Callable[[Params], Params] | None = None
    metric: Metric | None = None


def evaluation_metric(task: Task) -> Metric:
    """The task's own metric, or the averages of its losses."""

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> PerExample:
        return task.losses(params, frozen, batch, key, False)

    return task.metric or Metric(values=losses, result=means)
