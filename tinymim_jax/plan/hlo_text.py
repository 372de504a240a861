"""The text of a compiled program (HLO) as instructions, and the sizes of the arrays that it names."""

import dataclasses
import math
import re

# dtype, sizes and layout of an array, such as bf16[8,128]{1,0:T(8,128)}
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. shape: of its result, as text; root: it is the result of its computation.

    operands: names of instructions; of a constant or parameter its value or number.
    attributes: the text behind the operands.
    """

    name: str
    root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, key: str) -> str:
        """The computation that an attribute such as body=%name names; "" without it."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


def read_program(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(the instructions of each computation by name, name of the entry) of the text of a compiled program.

    Raises ValueError for other text.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (header := _COMPUTATION.match(line)):
            current = computations.setdefault(header[1], {})
            if line.startswith("ENTRY"):
                entry = header[1]
        elif found := _INSTRUCTION.match(line):
            instruction = _parse(found[2], bool(found[1]), line[found.end() :])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not HLO text: it has no ENTRY computation")
    return computations, entry


def dimensions(shape: str) -> list[int]:
    """Sizes of an array, or of the first one of a tuple."""
    found = SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


def payload_bytes(shape: str) -> float:
    """Bytes of an array or tuple, in any memory and without padding."""
    return sum(
        _width(dtype) * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes, _ in SHAPE.findall(shape)
    )


def moved_bytes(shape: str, *, everywhere: bool = False) -> float:
    """Bytes of an array or tuple with padding to tiles; of arrays in main memory only, unless `everywhere`."""
    return sum(
        _width(dtype) * _padded([int(n) for n in sizes.split(",") if n], layout)
        for dtype, sizes, layout in SHAPE.findall(shape)
        if everywhere or not re.search(r"S\([1-9]", layout)
    )


def _parse(name: str, root: bool, rest: str) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    opcode = rest[end:start].strip()
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, root, rest[:end], opcode, operands, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _width(dtype: str) -> float:
    """Bytes of an element: bf16 2, f8e4m3fn 1, s4 0.5."""
    if dtype == "pred":
        return 1.0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 0.0


def _padded(sizes: list[int], layout: str) -> int:
    """Number of elements with padding; a layout {1,0:T(8,128)} lists the axes from the innermost, and the tile."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if not tile or not sizes:
        return math.prod(sizes)
    axes = [int(n) for n in order.split(",") if n]
    for axis, side in zip(axes, reversed([int(n) for n in tile[1].split(",")])):
        sizes[axis] = -(-sizes[axis] // side) * side
    return math.prod(sizes)
