"""distill.target as text: a sum of targets, each with a weight, options and blocks of its own.

qk_vv                                                     one target
qk_vv:1 + output:0.5 + cls:1                              three, with weights
oo(loss=mse, normalize=true, patches=true) + cls:0.5      options in place of the config's
qk_vv(student=12, teacher=18) + output(student=6, teacher=9)
output(final=true) + output(hidden=0.5)                   after the final norm; of hidden patches
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from tinymim_jax.errors import unknown
from tinymim_jax.tasks.distill.targets import ATTENTION_MAP, FEATURES, TARGETS, is_relation

_SUM = re.compile(r"\+(?![^(]*\))")  # not inside of brackets
_PART = re.compile(r"\s*(?P<name>\w*)\s*(\((?P<options>[^()]*)\))?\s*(:\s*(?P<weight>[^\s:]+))?\s*")


@dataclasses.dataclass(frozen=True)
class Part:
    """A target of the sum.

    options: arguments of `targets.find_target` that differ from the config's.
    patches_only: CLS is left out; None: as the config says.
    student, teacher: the blocks that are compared, counted from 1; None: those of the config.
    hidden: share of the patches that are hidden from the student in a pass of its own, and compared (hidden.py).
    """

    name: str
    weight: float = 1.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    patches_only: bool | None = None
    student: int | None = None
    teacher: int | None = None
    hidden: float = 0.0


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# Options of each kind of target: how their text is read, and the argument of `find_target`.
_RELATION: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "loss": (str, ("relation_loss",)),
    "normalize": (_truth, ("relation_normalize",)),
    "temperature": (float, ("relation_temperature",)),
    "heads": (int, ("relation_heads", "output_heads")),
    "beta": (float, ("beta",)),
}
_FEATURE: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "loss": (str, ("feature_loss",)),
    "norm": (str, ("feature_norm",)),
    "adapter": (str, ("adapter",)),
    "beta": (float, ("beta",)),
    "final": (_truth, ("final",)),
    "hidden": (float, ()),
}
_ANY = {"patches": _truth, "student": int, "teacher": int}


def read_parts(text: str) -> tuple[Part, ...]:
    """The parts of `distill.target`. ValueError where the text cannot be read; it names the choices."""
    return tuple(_read_part(piece, text) for piece in _SUM.split(text))


def _read_part(piece: str, text: str) -> Part:
    match = _PART.fullmatch(piece)
    if match is None:
        raise _not_a_part(piece, text)
    name = match["name"]
    if not (is_relation(name) or name in FEATURES or name == ATTENTION_MAP):
        raise unknown("distill.target", name, TARGETS)
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        raise _not_a_part(piece, text) from None
    if not 0 < weight < float("inf"):
        raise ValueError(f"distill.target={text!r}: the weight of {name} is {match['weight']}; it must be positive")
    return Part(name, weight, **_read_options(name, match["options"] or "", text))


def _read_options(name: str, options: str, text: str) -> dict[str, Any]:
    known = _RELATION if is_relation(name) else _FEATURE if name in FEATURES else {}
    found: dict[str, Any] = {"options": {}}
    for word in filter(str.strip, options.split(",")):
        key, equals, value = (part.strip() for part in word.partition("="))
        if key not in known and key not in _ANY:
            raise unknown(f"distill.target={text!r}: option of {name}", key, (*known, *_ANY))
        read, arguments = known.get(key) or (_ANY[key], ())
        try:
            parsed = read(value)
        except (KeyError, ValueError):
            need = {_truth: "true or false", int: "a whole number", float: "a number"}[read]
            raise ValueError(f"distill.target={text!r}: {key}={value!r} of {name} must be {need}") from None
        if not equals or parsed == "":
            raise ValueError(f"distill.target={text!r}: {key} of {name} has no value: write {key}=VALUE")
        if arguments:
            found["options"] |= dict.fromkeys(arguments, parsed)
        else:
            found["patches_only" if key == "patches" else key] = parsed
    return found


def _not_a_part(piece: str, text: str) -> ValueError:
    return ValueError(
        f"distill.target={text!r}: {piece.strip()!r} cannot be read. Write NAME, NAME:WEIGHT or "
        "NAME(OPTION=VALUE, ...):WEIGHT, joined by +, such as 'qk_vv:1 + output(loss=mse):0.5'. Names: "
        f"{', '.join(TARGETS)}; options of relations: {', '.join((*_RELATION, *_ANY))}; of features: "
        f"{', '.join((*_FEATURE, *_ANY))}"
    )
