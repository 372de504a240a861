"""Reads a pickle as data: nothing that it names is imported, called or given attributes.

A pickle is a program, and `pickle.Unpickler` runs it. This interpreter follows the same instructions (decoded by
pickletools, of the standard library) but has no operation that could execute anything: classes, functions and instances
become `Opaque` records, except for the names in `CONTAINERS` and in the caller's table. Work and memory are bounded by
the limits below and in pickle_values, whatever the pickle says.
"""

import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.readers.pickle_values import COLLECTIONS, CONTAINERS, Opaque, check_depth, named

# One unit is an instruction or a copied element. A tensor takes about 40 instructions, an MAE of ViT-L with its
# optimizer 50,000.
MAX_WORK = 1_000_000
_MAX_INTEGER_BITS = 4096
# Keys are hashed and compared, which must take a short time: equal strings are compared character by character. The
# hashes of integers are known (the value modulo 2^61 - 1), so long ones can be made to collide, thousands in one dict.
_MAX_KEY_LENGTH = 1024
_MAX_KEY_PARTS = 16
_MAX_KEY_BITS = 64
# Tuples of integers can be made to collide too: each tuple counts as so much work that 2,000 of them are the limit.
_TUPLE_KEY_WORK = 500
# Every use of a class joins the two parts of its name into a new text.
_CHARACTERS_PER_WORK = 32


def load(
    data: bytes,
    *,
    rebuild: Mapping[str, Callable[[tuple], Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object that `data` describes: plain values, containers, and `Opaque` records for everything else.

    Args:
      data: one pickle, protocol 0 to 5.
      rebuild: functions to use in place of those that the pickle calls, by dotted name; each gets the arguments as
        one tuple.
      persistent: returns the value for a persistent id.

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
    check_depth(value)
    return value


class _Machine:
    """The stack machine of the pickle format: a method for each group of instructions, listed in `_STEPS`."""

    def __init__(self, rebuild: Mapping[str, Callable[[tuple], Any]], persistent: Callable[[Any], Any]):
        self.rebuild = rebuild
        self.resolve = persistent
        self.stack: list = []
        self.outer: list[list] = []  # MARK begins a new stack and keeps the old one here
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
        """Accounts for work. Copied elements count, because a short pickle can copy one long list again and again."""
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
            target.update(self.key(value) for value in values)
        else:
            raise ConvertError(f"the pickle inside appends to a {type(target).__name__}")

    def set_items(self, flat: Sequence) -> None:
        target, pairs = self.stack[-1], zip(flat[::2], flat[1::2], strict=True)
        if isinstance(target, Opaque):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((self.key(key), value) for key, value in pairs)
        else:
            raise ConvertError(f"the pickle inside sets items of a {type(target).__name__}")

    def make_dict(self, _: None) -> None:
        flat = self.pop_mark()
        self.stack.append({})
        self.set_items(flat)

    def build(self, _: None) -> None:
        """Keeps the attributes of an Opaque. Those of a dict are torch's `_metadata`; they are dropped."""
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state

    def call(self, function: Any, args: Any) -> None:
        if not isinstance(function, Opaque) or not isinstance(args, tuple):
            raise ConvertError("the pickle inside calls something that is not a function")
        container = CONTAINERS.get(function.name) if function.args is None else None
        rebuild = self.rebuild.get(function.name) if function.args is None else None
        if container is not None:
            self.spend(sum(len(part) for part in args if isinstance(part, COLLECTIONS)))
            self.stack.append(container(self.key, args))
        elif rebuild is not None:
            self.stack.append(rebuild(args))
        else:
            self.stack.append(Opaque(function.name, args))

    def call_with_keywords(self, _: None) -> None:
        function, args, keywords = self.pop(3)
        if isinstance(args, tuple):
            self.spend(len(args))
            args = (*args, keywords)
        self.call(function, args)

    def push_global(self, dotted: str) -> None:
        """The argument of GLOBAL and INST as pickletools gives it: module and name with a space between them."""
        self.stack.append(self.named(*dotted.split(" ", 1)))

    def stack_global(self, _: None) -> None:
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ConvertError("the pickle inside names a class by something else than text")
        self.stack.append(self.named(module, name))

    def named(self, module: str, name: str) -> Opaque:
        self.spend((len(module) + len(name)) // _CHARACTERS_PER_WORK)
        return named(module, name)

    def key(self, value: Any) -> Any:
        """`value`, if it can be hashed and compared as a dictionary key or set member in a short, fixed time."""
        if isinstance(value, tuple):
            self.spend(_TUPLE_KEY_WORK)
        parts = value if isinstance(value, tuple) else (value,)
        if len(parts) > _MAX_KEY_PARTS:
            raise ConvertError(f"the pickle inside has a key of {len(parts)} parts")
        for part in parts:
            if not (part is None or isinstance(part, int | float | str | bytes | Opaque)):
                raise ConvertError(f"the pickle inside has a {type(part).__name__} in a key")
            if isinstance(part, str | bytes) and len(part) > _MAX_KEY_LENGTH:
                raise ConvertError(f"the pickle inside has a key of {len(part)} characters")
            if isinstance(part, int) and part.bit_length() > _MAX_KEY_BITS:
                raise ConvertError(f"the pickle inside has an integer of {part.bit_length()} bits in a key")
        return value


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
    "FROZENSET": lambda m, _: m.push(frozenset(map(m.key, m.pop_mark()))),
    "APPEND": lambda m, _: m.append(m.pop(1)),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "INST": lambda m, dotted: m.call(m.named(*dotted.split(" ", 1)), tuple(m.pop_mark())),
    "OBJ": lambda m, _: m.call(m.stack[0], tuple(m.pop_mark()[1:])),
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.push(m.resolve(*m.pop(1))),
}
