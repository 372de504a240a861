"""The Task record: everything the loop needs to know of what is trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Batch = dict[str, Any]
Params = Any  # nested dicts of arrays
PerExample = dict[str, jax.Array]

RUNNING = "running"


def nothing_frozen() -> Params:
    """Frozen weights of a task that has none."""
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """Pure functions and one record.

    model: the architecture as plain JSON, written beside every checkpoint.
    init: key -> fresh float32 parameters; may be jitted.
    losses: (params, frozen, batch, key, train) -> float32 [batch] by name. The mean of "loss" is what training
      minimises, the rest is recorded; with train=False nothing is augmented or dropped, and evaluation averages the
      same numbers over the valid examples. With train=True a task with running statistics returns them too, as
      RUNNING: a part of `params` (without a gradient) and its new values, which become those of the next step.
    load_frozen: () -> weights that are an argument of the step, never trained and never checkpointed.
    start: parameters on the host -> parameters with pre-trained values put in; None trains from scratch.
    names: the names that `losses` returns.
    """

    model: dict[str, Any]
    init: Callable[[jax.Array], Params]
    losses: Callable[[Params, Params, Batch, jax.Array, bool], dict[str, Any]]
    names: tuple[str, ...]
    load_frozen: Callable[[], Params] = nothing_frozen
    start: Callable[[Params], Params] | None = None
