"""Reads a pickle as data: nothing that it names is imported, called or given attributes.

A pickle is a program, and `pickle.Unpickler` runs it. This interpreter follows the same instructions (decoded
by pickletools, of the standard library) but has no operation that could execute anything: classes, functions
and instances become `Opaque` records, save for names in a table of our own. Work and memory are bounded.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tinymim_jax.convert.errors import ConvertError, printable

# Generous: a tensor takes some 40 instructions, an MAE of ViT-L with its optimizer 50,000.
MAX_WORK = 1_000_000
MAX_DEPTH = 200
# Tuples and integers are hashed afresh at each use, equal strings compared byte by byte: long keys cost time.
_MAX_KEY_LENGTH = 1024
_MAX_KEY_PARTS = 16
_MAX_INTEGER_BITS = 4096


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Opaque:
    """What a pickle says about something that is not plain data.

    name: dotted name of the class or function.
    args: what it was called with; None where the pickle means the class or function itself.
    state: what would have become the attributes of the instance.
    items: what would have been appended to it, or set as (key, value).
    """

    name: str
    args: tuple | None = None
    state: Any = None
    items: list = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        return f"Opaque({printable(self.name)})"


def load(
    data: bytes,
    *,
    rebuild: Mapping[str, Callable[[tuple], Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object that `data` describes: plain values, containers, and `Opaque` records for everything else.

    Args:
      data: one pickle, protocol 0 to 5.
      rebuild: by dotted name, what stands in for a call of that name; it gets the arguments as one tuple.
      persistent: takes a persistent id, returns the value to put there.

    Raises:
      ConvertError: the pickle is damaged, or needs more work or nesting than any checkpoint does.
    """
    machine = _Machine(rebuild, persistent)
    try:
        value = machine.run(data)
    except ConvertError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # pickletools, an empty stack, an absent memo
        raise ConvertError(f"the pickle inside is damaged: {printable(error)}") from error
    _check_depth(value)
    return value


class _Machine:
    """The stack machine of the pickle format: a method for each group of instructions, listed in `_STEPS`."""

    def __init__(self, rebuild: Mapping[str, Callable[[tuple], Any]], persistent: Callable[[Any], Any]):
        self.rebuild = {**_CONTAINERS, **rebuild}
        self.resolve = persistent
        self.stack: list = []
        self.outer: list[list] = []  # stacks set aside by MARK
        self.memo: dict[int, Any] = {}
        self.work = 0

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            self.spend(1)
            if opcode.name not in _STEPS:
                raise ConvertError(f"the pickle inside uses {opcode.name}, which no checkpoint needs")
            _STEPS[opcode.name](self, argument)
        return self.stack.pop()

    def spend(self, amount: int) -> None:
        """Accounts for work, copying included: a short pickle can name one long list again and again."""
        self.work += amount
        if self.work > MAX_WORK:
            raise ConvertError(f"the pickle inside takes more than {MAX_WORK} steps, which no checkpoint needs")

    def pop(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def pop_mark(self) -> list:
        """Everything above the last MARK."""
        above, self.stack = self.stack, self.outer.pop()
        return above

    def push(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
            raise ConvertError(f"the pickle inside holds an integer of {value.bit_length()} bits")
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def drop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def append(self, values: Sequence) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(_key(value) for value in values)
        else:
            raise ConvertError(f"the pickle inside appends to a {type(target).__name__}")

    def set_items(self, flat: Sequence) -> None:
        target, pairs = self.stack[-1], zip(flat[::2], flat[1::2], strict=True)
        if isinstance(target, Opaque):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        else:
            raise ConvertError(f"the pickle inside sets items of a {type(target).__name__}")

    def make_dict(self, _: None) -> None:
        flat = self.pop_mark()
        self.stack.append({})
        self.set_items(flat)

    def build(self, _: None) -> None:
        """Keeps the attributes of what is opaque. Those of a dict are torch's `_metadata`, and dropped."""
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state

    def call(self, function: Any, args: Any) -> None:
        if not isinstance(function, Opaque) or not isinstance(args, tuple):
            raise ConvertError("the pickle inside calls something that is not a function")
        known = self.rebuild.get(function.name) if function.args is None else None
        if known is None:
            self.stack.append(Opaque(function.name, args))
        else:
            self.spend(sum(len(part) for part in args if isinstance(part, _COLLECTIONS)))
            self.stack.append(known(args))

    def call_with_keywords(self, _: None) -> None:
        function, args, keywords = self.pop(3)
        self.call(function, (*args, keywords) if isinstance(args, tuple) else args)

    def stack_global(self, _: None) -> None:
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ConvertError("the pickle inside names a class by something else than text")
        self.stack.append(Opaque(f"{module}.{name}"))


_COLLECTIONS = (list, tuple, dict, set, frozenset)


def _key(value: Any) -> Any:
    """`value`, if it can be hashed and compared as a dictionary key or set member in a short, fixed time."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _MAX_KEY_PARTS:
        raise ConvertError(f"the pickle inside has a key of {len(parts)} parts")
    for part in parts:
        if not (part is None or isinstance(part, int | float | str | bytes | Opaque)):
            raise ConvertError(f"the pickle inside has a {type(part).__name__} in a key")
        if isinstance(part, str | bytes) and len(part) > _MAX_KEY_LENGTH:
            raise ConvertError(f"the pickle inside has a key of {len(part)} characters")
    return value


def _check_depth(root: Any) -> None:
    """Refuses nesting that would overflow the stack of whoever walks the result; visits shared parts once."""
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
        return value.values()
    if isinstance(value, Opaque):
        return (value.args, value.state, value.items)
    return value if isinstance(value, _COLLECTIONS) else ()


def _content(args: tuple) -> Any:
    """The argument of a call that builds a container."""
    match args:
        case ():
            return ()
        case (list() | tuple() | dict() | set() | frozenset() as content,):
            return content
    raise ConvertError("the pickle inside builds a container from something else")


def _dict(args: tuple) -> dict:
    content = _content(args)
    pairs = list(content.items() if isinstance(content, dict) else content)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ConvertError("the pickle inside builds a dict from something else than pairs")
    return {_key(key): value for key, value in pairs}


# Containers that are built by calls. A default factory is dropped: what is missing stays missing.
_CONTAINERS: dict[str, Callable[[tuple], Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda args: _dict(args[1:]),
    "torch.Size": lambda args: tuple(_content(args)),
}
for _module in ("builtins", "__builtin__"):  # the latter up to protocol 2
    _CONTAINERS |= {
        f"{_module}.dict": _dict,
        f"{_module}.list": lambda args: list(_content(args)),
        f"{_module}.tuple": lambda args: tuple(_content(args)),
        f"{_module}.set": lambda args: set(map(_key, _content(args))),
        f"{_module}.frozenset": lambda args: frozenset(map(_key, _content(args))),
    }

# Instructions whose argument, as pickletools decodes it, is the value itself.
_LITERALS = """
    INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""

_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS.split(), _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "DICT": _Machine.make_dict,
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push(m.pop(1)),
    "TUPLE2": lambda m, _: m.push(m.pop(2)),
    "TUPLE3": lambda m, _: m.push(m.pop(3)),
    "FROZENSET": lambda m, _: m.push(frozenset(map(_key, m.pop_mark()))),
    "APPEND": lambda m, _: m.append(m.pop(1)),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, name: m.push(Opaque(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "INST": lambda m, name: m.call(Opaque(name.replace(" ", ".", 1)), tuple(m.pop_mark())),
    "OBJ": lambda m, _: m.call(m.stack[0], tuple(m.pop_mark()[1:])),
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.push(m.resolve(*m.pop(1))),
}
