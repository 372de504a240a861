"""The settings of each of several teachers and students: the config as if that one were the only one."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError

FIRST, FIRST_STUDENT = "teacher", "student"
_RESERVED = (FIRST, FIRST_STUDENT, "loss", "mae")


def student_settings(config: ConfigDict) -> dict[str, ConfigDict]:
    """For each student the config in which it is the only one: FIRST_STUDENT, then the entries of `distill.students`.

    Without such entries this is `config` itself.
    """
    if not list(config.distill.students):
        return {FIRST_STUDENT: config}
    found = {FIRST_STUDENT: _without_students(config)}
    for name in config.distill.students:
        taken = (*_RESERVED, *config.distill.teachers.keys())
        if name in taken or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(
                f"distill.students.{name}: a student cannot be called {name!r}: choose letters, digits and _, and "
                f"another name than {', '.join(taken)}"
            )
        found[name] = _only(config, name)
    return found


def teacher_settings(config: ConfigDict) -> dict[str, ConfigDict]:
    """For each teacher the config in which it is `distill.teacher`: FIRST, then the entries of `distill.teachers`.

    What an entry sets for its teacher alone, target and taps, is in `distill`.
    """
    found = {FIRST: config}
    for name in config.distill.teachers:
        if name in _RESERVED or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(
                f"distill.teachers.{name}: a teacher cannot be called {name!r}: choose letters, digits and _, and "
                f"another name than {', '.join(_RESERVED)}"
            )
        found[name] = _alone(config, name)
    for name, settings in found.items():
        if not settings.distill.teacher.weight >= 0:
            key = key_of(name)
            raise ValueError(f"{key}.weight={settings.distill.teacher.weight} must not be negative; 0: only recorded")
    return found


def key_of(name: str) -> str:
    """The section of the config that describes the teacher of this name."""
    return "distill.teacher" if name == FIRST else f"distill.teachers.{name}"


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Inside, errors on the settings of one teacher name its own keys in place of those of `distill.teacher`."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        if name == FIRST:
            raise
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        said = re.sub(r"\bdistill\.teacher\b", key_of(name), str(error))
        said = re.sub(r"\bdistill\.(target|taps)\b", rf"{key_of(name)}.\1", said)
        raise kind(f"teacher {name!r}: {said}") from error


@contextlib.contextmanager
def errors_of_student(name: str) -> Iterator[None]:
    """Inside, errors on the settings of one student name its own keys."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        if name == FIRST_STUDENT:
            raise
        kind, own = CheckpointError if isinstance(error, CheckpointError) else ValueError, f"distill.students.{name}"
        said = re.sub(r"\bdistill\.(target|taps|student_tap)\b", rf"{own}.\1", str(error))
        said = re.sub(rf"(?<![\w.])model\.({'|'.join(_OF_A_STUDENT)})\b", rf"{own}.model.\1", said)
        said = re.sub(r"(?<![\w.])init([=:])", rf"{own}.init\1", said)
        raise kind(f"student {name!r}: {said}") from error


# Keys of `model` that a student may have of its own.
_SIZES = ("embed_dim", "depth", "heads")
_OF_A_STUDENT = ("variant", *_SIZES, "patch_size", "stem", "mlp_ratio", "dist_token", "pos_embed", "drop_path")


def _only(config: ConfigDict, name: str) -> ConfigDict:
    only, entry = _without_students(config), config.distill.students[name]
    if not 0 < entry.lr_scale < float("inf"):
        raise ValueError(f"distill.students.{name}.lr_scale={entry.lr_scale} must be positive")
    own = {key: entry.model[key] for key in _OF_A_STUDENT}
    inherited = () if own["variant"] is None else _SIZES  # those of another variant are not meant
    _put(only.model, {key: value for key, value in own.items() if value is not None or key in inherited})
    taps = {key: entry[key] for key in ("student_tap", "taps")}
    if any(value is not None for value in taps.values()):
        _put(only.distill, taps)
    if entry.taps is not None:
        _put(only.distill.teacher, {"tap": None})
    only.distill.target = entry.target or config.distill.target
    only.init = entry.init
    only.optim.base_lr *= entry.lr_scale
    only.optim.final_lr *= entry.lr_scale
    return only


def _without_students(config: ConfigDict) -> ConfigDict:
    copied = config.copy_and_resolve_references().unlock()
    copied.distill.students = ConfigDict()
    return copied


def _put(section: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        del section[key]  # values of other types cannot replace each other
        section[key] = value


def _alone(config: ConfigDict, name: str) -> ConfigDict:
    alone = config.copy_and_resolve_references().unlock()
    entry = alone.distill.teachers[name]
    own = {"teacher": entry, "taps": entry.taps, "target": entry.target or config.distill.target}
    if entry.taps is not None:
        own["student_tap"] = None
    del entry.taps, entry.target, alone.distill.teachers
    _put(alone.distill, own)
    return alone
