"""The settings of each of several teachers: the config as if that teacher were the only one."""

import contextlib
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError

FIRST = "teacher"
_RESERVED = (FIRST, "student", "loss", "mae")


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


def _alone(config: ConfigDict, name: str) -> ConfigDict:
    alone = config.copy_and_resolve_references().unlock()
    entry = alone.distill.teachers[name]
    own = {"teacher": entry, "taps": entry.taps, "target": entry.target or config.distill.target}
    if entry.taps is not None:
        own["student_tap"] = None
    del entry.taps, entry.target, alone.distill.teachers
    for key, value in own.items():
        del alone.distill[key]  # values of other types cannot replace each other
        alone.distill[key] = value
    return alone
