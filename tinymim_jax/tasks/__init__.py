"""TASKS: what can be trained. A task is a record of pure functions; the loop knows nothing more of it."""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from tinymim_jax.tasks.classify.task import build as build_classify
from tinymim_jax.tasks.distill.task import build as build_distill
from tinymim_jax.tasks.mae.task import build as build_mae
from tinymim_jax.tasks.probe.task import build as build_probe
from tinymim_jax.tasks.task import Task

TASKS: dict[str, Callable[[ConfigDict, Sequence[str]], Task]] = {
    "mae": build_mae,
    "distill": build_distill,
    "classify": build_classify,
    "probe": build_probe,
}
