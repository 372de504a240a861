"""TASKS: what can be trained. A task is a record of pure functions; the loop knows nothing more of it."""

from collections.abc import Callable

from tinymim_jax.tasks.classify import task as classify
from tinymim_jax.tasks.distill import task as distill
from tinymim_jax.tasks.mae import task as mae
from tinymim_jax.tasks.probe import task as probe
from tinymim_jax.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "mae": mae.build,
    "distill": distill.build,
    "classify": classify.build,
    "probe": probe.build,
}
