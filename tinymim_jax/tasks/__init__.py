"""TASKS: what can be trained. A new task is a folder with a task.py that defines TASK, and a row here."""

from tinymim_jax.tasks.classify.task import TASK as CLASSIFY
from tinymim_jax.tasks.distill.task import TASK as DISTILL
from tinymim_jax.tasks.mae.task import TASK as MAE
from tinymim_jax.tasks.probe.task import TASK as PROBE
from tinymim_jax.tasks.segment.task import TASK as SEGMENT
from tinymim_jax.tasks.task import TaskType

TASKS: dict[str, TaskType] = {
    "mae": MAE,
    "distill": DISTILL,
    "classify": CLASSIFY,
    "probe": PROBE,
    "segment": SEGMENT,
}
