"""Blocks that are compared for a part of the training only: taps as a function of the step."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.runtime.progress import read_duration


@dataclasses.dataclass(frozen=True)
class PartOfTraining:
    """A part of the training, with constant taps.

    begins: its begin, as a duration.
    config: the config with the taps of this part in place of lists.
    """

    begins: str
    config: ConfigDict


def parts_of_training(config: ConfigDict) -> tuple[PartOfTraining, ...]:
    """The parts, in order; a single one, with `config` itself, where no tap moves.

    A tap is a block, or a list of (when, block) with durations from 0 on: (("0 epochs", 9), ("150 epochs", 12)).
    Raises ValueError for a list that cannot be read, and for epochs in one list and steps in another.
    """
    moving = {key: _pieces(key, value) for key, value in _taps(config).items() if not _is_block(value)}
    if not moving:
        return (PartOfTraining("0 steps", config),)
    begins = {duration: read_duration(duration) for pieces in moving.values() for duration, _ in pieces}
    if len({unit for amount, unit in begins.values() if amount}) > 1:
        raise ValueError(f"{' and '.join(moving)}: the order of epochs and steps is not known here: use one of them")
    changes = {amount: duration for duration, (amount, _) in begins.items()}
    found = []
    for amount in sorted(changes):
        now = config.copy_and_resolve_references().unlock()
        for key, pieces in moving.items():
            block = next(block for begin, block in reversed(pieces) if begins[begin][0] <= amount)
            *sections, name = key.split(".")
            section: Any = now
            for each in sections:
                section = section[each]
            del section[name]  # a list cannot be replaced by a number
            section[name] = block
        found.append(PartOfTraining(changes[amount], now))
    return tuple(found)


def _taps(config: ConfigDict) -> dict[str, Any]:
    """The taps that may move, by their keys."""
    distill = config.distill
    further = {f"distill.teachers.{name}.tap": distill.teachers[name].tap for name in distill.teachers}
    further |= {f"distill.students.{name}.student_tap": distill.students[name].student_tap for name in distill.students}
    return {"distill.student_tap": distill.student_tap, "distill.teacher.tap": distill.teacher.tap} | further


def _is_block(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _pieces(key: str, value: Any) -> list[tuple[str, int]]:
    wrong = ValueError(
        f"{key}={value!r} is neither a block, counted from 1, nor a list of (when, block) from the start on, in order: "
        f'write for example {key}=12, or {key}=\'(("0 epochs", 9), ("150 epochs", 12))\''
    )
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise wrong
    for piece in value:
        if not isinstance(piece, Sequence) or isinstance(piece, str) or len(piece) != 2:
            raise wrong
        if not isinstance(piece[0], str) or piece[1] is None or not _is_block(piece[1]):
            raise wrong
    amounts = [read_duration(when, name=key)[0] for when, _ in value]
    if amounts[0] != 0 or any(first >= second for first, second in itertools.pairwise(amounts)):
        raise wrong
    return [(when, block) for when, block in value]
