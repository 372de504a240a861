"""What the user asks of `tinymim distill` or `advise`; whether an output folder was begun with the same request."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tinymim_jax.runtime.locks import LOCK
from tinymim_jax.starter.choices import CPU_HOURS, find_student
from tinymim_jax.starter.data import source_name
from tinymim_jax.starter.helpers import WORK
from tinymim_jax.sweeps.points import LOG

CHOICES = "choices.json"
"""File in the output folder with the request's arguments and what was decided for them (decisions.Decided)."""

# What a command that was refused, or stopped before choices.json was written, leaves in the output folder.
_OURS = {LOCK, LOG, WORK, "teacher", "teacher.json"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for. The fields of EXPERIMENT determine what is trained; the others may change between calls.

    data: a folder of images, or a value of data.source.
    teacher: a run, a converted checkpoint, a PyTorch file or a folder of the Hugging Face hub.
    student: a key of choices.STUDENTS.
    output: folder of all results.
    hours: time for everything; None: `default_hours`.
    preset: a key of choices.PRESETS; None: the one nearest to the number of images.
    labels, finetune: False ignores labels, or omits fine-tuning.
    export: a key of helpers.EXPORTS, "none", or "auto" (onnx if it is installed, else hub).
    prepare: auto, always or never.
    overrides: values by config key, or by STAGE.KEY for one training.
    data_dir: where TFDS data sets are.
    workers: processes that decode images; None: as many as the cores allow.
    compile_cache: folder of compiled programs; "" for none.
    default_hours: the default of `hours` on a CPU, and elsewhere; None: as long as the preset takes.
    training_hours: `hours` are those of training alone.
    probes: number of k-NN measurements during the distillation; None: as many as take below 2 % of the time.
    """

    data: str
    teacher: str
    student: str
    output: str
    hours: float | None = None
    preset: str | None = None
    labels: bool = True
    finetune: bool = True
    export: str = "auto"
    prepare: str = "auto"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_dir: str | None = None
    workers: int | None = None
    compile_cache: str = ""
    default_hours: tuple[float | None, float | None] = (CPU_HOURS, None)
    training_hours: bool = False
    probes: int | None = None


EXPERIMENT = ("data", "teacher", "student", "hours", "preset", "labels", "finetune", "prepare", "overrides")


def check_output(output: pathlib.Path, request: Request) -> None:
    """Raises OSError or ValueError if `output` cannot be a folder of results, or lies in the folder of images.

    In there, its converted images and the pictures of its reports would be taken for images and for a class.
    """
    if beyond := [path for path in (output, *output.parents) if path.exists() and not path.is_dir()]:
        raise NotADirectoryError(f"--output {output}: {beyond[0]} is a file; name a folder, which need not exist yet")
    _, _, place = source_name(request.data).partition(":")
    if place and "://" not in place and output.resolve().is_relative_to(pathlib.Path(place).resolve()):
        raise ValueError(
            f"--output {output} is inside the images, {place}, where what it will hold would be read as images and as "
            f"a class: choose a folder elsewhere, such as {pathlib.Path(place).parent / 'distilled'}"
        )


def check_same(output: pathlib.Path, request: Request) -> None:
    """Raises ValueError if `output` was begun with other arguments, naming them, or holds files of something else."""
    kept = read_choices(output)
    if not kept:
        strange = sorted({path.name for path in output.iterdir()} - _OURS) if output.exists() else []
        if strange:
            raise ValueError(
                f"--output {output} contains {strange[0]!r}, which this command did not make: choose another folder"
            )
        return
    there = kept["arguments"]
    rows = [
        f"  {key}: {there.get(key)!r} there, {value!r} here"
        for key, value in arguments_of(request).items()
        if there.get(key) != value
    ]
    if rows:
        raise ValueError(
            f"--output {output} was begun with other arguments:\n" + "\n".join(rows) + "\nChoose another --output, or "
            "delete it. A single training can be continued for longer by `tinymim train --extend`"
        )


def read_choices(output: pathlib.Path) -> dict[str, Any]:
    """The content of choices.json: "arguments" and "decided"; {} if there is none."""
    try:
        return json.loads((output / CHOICES).read_text())
    except (OSError, ValueError):
        return {}


def arguments_of(request: Request) -> dict[str, Any]:
    """The fields of EXPERIMENT as they are kept in choices.json, with absolute paths."""
    arguments = {name: getattr(request, name) for name in EXPERIMENT}
    arguments["data"] = source_name(request.data)
    arguments["teacher"] = str(pathlib.Path(request.teacher).expanduser().absolute())
    arguments["student"] = find_student(request.student)
    arguments["overrides"] = dict(request.overrides)
    return json.loads(json.dumps(arguments))
