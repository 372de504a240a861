"""TASKS: what can be trained. A task is a record of pure functions; the loop knows nothing more of it."""

from collections.abc import Callable

from tinymim_jax.tasks import classify, distill, mae, probe
from tinymim_jax.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "mae": mae.build,
    "distill": distill.build,
    "classify": classify.build,
    "probe": probe.build,
}
