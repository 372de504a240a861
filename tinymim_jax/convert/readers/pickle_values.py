"""The values that inert_pickle makes: Opaque records in place of instances, and plain containers."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from tinymim_jax.convert.errors import ConvertError, printable

MAX_DEPTH = 200
"""Levels of containers in containers."""

_MAX_NAME_LENGTH = 1024  # of a class or function: joining its two parts copies them


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Opaque:
    """What a pickle says about something that is not plain data.

    name: dotted name of the class or function.
    args: the arguments of the call; None if the pickle means the class or function itself.
    state: what unpickling would have set as attributes of the instance.
    items: what unpickling would have appended to it, or set as (key, value).
    """

    name: str
    args: tuple | None = None
    state: Any = None
    items: list = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        return f"Opaque({printable(self.name)})"


COLLECTIONS = (list, tuple, dict, set, frozenset)


def named(module: str, name: str) -> Opaque:
    """The class or function of that name, as a record."""
    if len(module) > _MAX_NAME_LENGTH or len(name) > _MAX_NAME_LENGTH:
        raise ConvertError(f"the pickle inside names a class by {len(module) + len(name)} characters")
    return Opaque(f"{module}.{name}")


def check_depth(root: Any) -> None:
    """Refuses nesting so deep that recursive code would overflow the stack. Shared parts are visited once."""
    level, seen = [root], {id(root)}
    for _ in range(MAX_DEPTH):
        below = {id(child): child for value in level for child in _children(value)}
        level = [child for key, child in below.items() if key not in seen]
        seen.update(below)
        if not level:
            return
    raise ConvertError(f"the pickle inside is nested more than {MAX_DEPTH} deep")


def _children(value: Any) -> Iterable:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, Opaque):
        return (value.args, value.state, value.items)
    return value if isinstance(value, COLLECTIONS) else ()


def _content(args: tuple) -> Any:
    """The argument of a call that builds a container."""
    match args:
        case ():
            return ()
        case (list() | tuple() | dict() | set() | frozenset() as content,):
            return content
    raise ConvertError("the pickle inside builds a container from something else")


def _dict(key: Callable[[Any], Any], args: tuple) -> dict:
    content = _content(args)
    pairs = list(content.items() if isinstance(content, dict) else content)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ConvertError("the pickle inside builds a dict from something else than pairs")
    return {key(name): value for name, value in pairs}


# Containers that pickles build by a call: functions of (check of keys, arguments). A default factory is dropped.
CONTAINERS: dict[str, Callable[[Callable[[Any], Any], tuple], Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda key, args: _dict(key, args[1:]),
    "torch.Size": lambda key, args: tuple(_content(args)),
}
for _module in ("builtins", "__builtin__"):  # the latter up to protocol 2
    CONTAINERS |= {
        f"{_module}.dict": _dict,
        f"{_module}.list": lambda key, args: list(_content(args)),
        f"{_module}.tuple": lambda key, args: tuple(_content(args)),
        f"{_module}.set": lambda key, args: set(map(key, _content(args))),
        f"{_module}.frozenset": lambda key, args: frozenset(map(key, _content(args))),
    }
