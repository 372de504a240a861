"""Parses the text of a compiled program: FLOPs, memory traffic and communication of each instruction."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions without memory traffic.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_CUDNN_ATTENTION = "__cudnn$fmha"
_KERNELS = ("tpu_custom_call", _CUDNN_ATTENTION)
_SLICES = ("dynamic-slice", "slice", "gather")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one instruction on one chip; all numbers are of a single execution.

    times: number of executions in a step.
    flops: of its matrix products.
    bytes: read from and written to the chip's main memory.
    collective: a name in COLLECTIVES, or empty.
    sent: size of the collective in bytes: operands of an all-reduce, result of an all-gather.
    group: number of participating chips; 0: all.
    kernel: a kernel that the compiler cannot see into: a Pallas call, whose FLOPs are its own statement, or one of
      cuDNN's attention kernels, whose FLOPs follow from its shapes.
    """

    times: int
    flops: float
    bytes: float
    collective: str = ""
    sent: float = 0.0
    group: int = 0
    kernel: bool = False


def work_of(text: str) -> list[Work]:
    """The work of all instructions of a program; the bodies of loops have `times` above 1.

    `text` is the result of `compiled.as_text()`, after optimization and partitioning. For a fusion, the traffic of its
    operands and results is counted; intermediate values stay in registers. Arrays that the TPU compiler keeps in fast
    memory are not counted. The padding of arrays to whole tiles is.
    """
    program = _Program(text)
    return list(program.work(program.entry, 1))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, key: str) -> str:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if not line.startswith((" ", "}")) and (header := _COMPUTATION.match(line)):
                current = self.computations.setdefault(header[1], {})
                if line.startswith("ENTRY"):
                    self.entry = header[1]
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[2], bool(found[1]), line[found.end() :])
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("this is not HLO text: it has no ENTRY computation")

    def work(self, computation: str, times: int) -> Iterator[Work]:
        scope = self.computations[computation]
        for each in scope.values():
            if each.opcode == "while":
                yield from self.work(each.called("body"), times * self._trips(each))
            elif each.opcode in ("call", "async-start"):
                yield from self.work(each.called("to_apply") or each.called("calls"), times)
            elif each.opcode == "conditional":
                yield from self._longest_branch(each, times)
            elif each.opcode not in _FREE and not each.opcode.endswith(("-done", "-update")):
                kind, sent, group = self._collective(each, scope)
                kernel = each.opcode == "custom-call" and any(name in each.attributes for name in _KERNELS)
                yield Work(times, self._flops(each, scope), self._bytes(each, scope), kind, sent, group, kernel)

    def _longest_branch(self, each: _Instruction, times: int) -> list[Work]:
        names = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
        found = names[1].replace("%", "").split(", ") if names else []
        found += [name for key in ("true_computation", "false_computation") if (name := each.called(key))]
        branches = [list(self.work(name, times)) for name in found]
        return max(branches, key=lambda branch: sum(work.flops + work.bytes for work in branch), default=[])

    def _trips(self, loop: _Instruction) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        # A scan counts from 0 up to a constant of its condition.
        condition = self.computations.get(loop.called("condition"), {})
        limits = [int(c.operands[0]) for c in condition.values() if c.opcode == "constant" and c.operands[0].isdigit()]
        return max(limits, default=1)

    def _inside(self, each: _Instruction) -> dict[str, _Instruction]:
        return self.computations.get(each.called("calls"), {}) if each.opcode == "fusion" else {}

    def _flops(self, each: _Instruction, scope: dict[str, _Instruction]) -> float:
        if inside := self._inside(each):
            return sum(self._flops(inner, inside) for inner in inside.values())
        shapes = [_dimensions(scope[name].shape) for name in each.operands[:2] if name in scope]
        if each.opcode == "dot" and shapes:
            return _dot_flops(each.shape, shapes[0], _numbers(each.attributes, r"lhs_contracting_dims=\{([\d,]*)\}"))
        if each.opcode == "convolution" and len(shapes) == 2:
            return _convolution_flops(each, *shapes)
        if "tpu_custom_call" in each.attributes:  # a Pallas kernel, which says what it costs
            stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', each.attributes)
            return float(stated[1]) if stated else 0.0
        if _CUDNN_ATTENTION in each.attributes:
            return _attention_flops(each)
        if each.opcode == "custom-call" and "matmul" in each.attributes and shapes:
            contracted = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', each.attributes)
            return _dot_flops(each.shape, shapes[0], [int(n) for n in json.loads(contracted[1])]) if contracted else 0.0
        return 0.0

    def _bytes(self, each: _Instruction, scope: dict[str, _Instruction]) -> float:
        operands = [scope[name] for name in each.operands if name in scope]
        if each.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            return _fetched(each.shape, operands[0].shape)
        if each.opcode.endswith("-start"):  # its result names the operands once more
            return 2.0 * sum(_moved(operand.shape) for operand in operands)
        if each.opcode in _SLICES:
            return 2.0 * _moved(each.shape)
        if each.opcode == "dynamic-update-slice" and len(operands) > 1:
            return 2.0 * _moved(operands[1].shape)
        inside = self._inside(each)
        if not inside:
            return _moved(each.shape) + sum(_moved(operand.shape) for operand in operands)
        written = max(0.0, _moved(each.shape) - self._kept_in_place(inside))
        return written + sum(self._read(_moved(x.shape), index, inside) for index, x in enumerate(operands))

    def _kept_in_place(self, inside: dict[str, _Instruction]) -> float:
        """Bytes of a fusion's results that it does not write because it updates only a slice of them in place."""
        root = next((each for each in inside.values() if each.root), None)
        if root is None:
            return 0.0
        kept = 0.0
        for result in [inside[name] for name in root.operands if name in inside] if root.opcode == "tuple" else [root]:
            while result.opcode == "bitcast" and result.operands[0] in inside:
                result = inside[result.operands[0]]
            if result.opcode == "fusion":
                kept += self._kept_in_place(self._inside(result))
            elif result.opcode == "dynamic-update-slice" and result.operands[1] in inside:
                kept += max(0.0, _moved(result.shape) - _moved(inside[result.operands[1]].shape))
        return kept

    def _read(self, whole: float, index: int, inside: dict[str, _Instruction]) -> float:
        """Bytes that a fusion reads of an operand of `whole` bytes: only the slices, if it uses nothing else of it."""
        own = [each for each in inside.values() if each.opcode == "parameter" and each.operands[0] == str(index)]
        if not whole or not own:
            return whole
        total = 0.0
        for name, user in _uses(own[0].name, inside):
            if user.opcode in _SLICES:
                total += _moved(user.shape, everywhere=True)
            elif user.opcode == "fusion":
                within = self._inside(user)
                total += sum(self._read(whole, i, within) for i, used in enumerate(user.operands) if used == name)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(whole, total)

    def _collective(self, each: _Instruction, scope: dict[str, _Instruction]) -> tuple[str, float, int]:
        for inner in self._inside(each).values():  # the TPU compiler fuses some collectives with others
            if (found := self._collective(inner, self._inside(each)))[0]:
                return found
        kind = each.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return "", 0.0, 0
        group = _group_size(each.attributes)
        sent = sum(_payload(scope[name].shape) for name in each.operands if name in scope)
        return kind, sent * max(group, 1) if kind == "all-gather" else sent, group


def _parse(name: str, root: bool, rest: str) -> _Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    opcode = rest[end:start].strip()
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return _Instruction(name, root, rest[:end], opcode, operands, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _fetched(shape: str, source: str) -> float:
    """Bytes of an asynchronous copy or slice between memories: the size of the result for each end in main memory."""
    arrives = next((each for each in _SHAPE.finditer(shape) if each[0] not in source), None)
    size = _moved(arrives[0] if arrives else source, everywhere=True)
    return size * bool(_moved(source)) + size * (arrives is None or bool(_moved(arrives[0])))


def _uses(name: str, inside: dict[str, _Instruction]) -> Iterator[tuple[str, _Instruction]]:
    """(name of the operand, instruction that uses it) for each use of `name`, looking through bitcasts."""
    for user in inside.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _uses(user.name, inside)
            else:
                yield name, user


def _dimensions(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _dot_flops(result: str, left: list[int], contracted: list[int]) -> float:
    return 2.0 * math.prod(_dimensions(result)) * math.prod(left[axis] for axis in contracted)


def _attention_flops(each: _Instruction) -> float:
    """FLOPs of cuDNN's attention: two products forward; five backward, where the map is computed again."""
    found = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*(\[[^\]]*\])', each.attributes)
    pairs = math.prod(int(n) for n in json.loads(found[1])) if found else 0  # batch, heads, queries, keys
    head_dim = _dimensions(each.shape)[-1]
    return 2.0 * (5 if "Backward" in each.attributes else 2) * pairs * head_dim


def _convolution_flops(each: _Instruction, left: list[int], kernel: list[int]) -> float:
    """FLOPs of a convolution. The TPU compiler expresses matrix products as convolutions and batches of them as dilated
    ones, so only kernel taps that meet an element of the input are counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if not labels:
        return 0.0
    result = _dimensions(each.shape)
    total = 2.0 * kernel[labels[2].index("i")]
    for axis, label in enumerate(labels[3]):
        if label in "bf":
            total *= result[axis]
            continue
        sizes = left[labels[1].index(label)], kernel[labels[2].index(label)], result[axis]
        total *= _taps(*sizes, *(_of_window(each.attributes, name, int(label)) for name in _WINDOW))
    return total


# With what an axis has where the text says nothing.
_WINDOW = {"stride": (1,), "pad": (0, 0), "lhs_dilate": (1,), "rhs_dilate": (1,)}


def _of_window(attributes: str, name: str, axis: int) -> tuple[int, ...]:
    window = re.search(r"window=\{([^}]*)\}", attributes)
    found = re.search(rf"\b{name}=([\d_x-]+)", window[1]) if window else None
    return tuple(int(n) for n in found[1].split("x")[axis].split("_")) if found else _WINDOW[name]


@functools.cache
def _taps(size: int, kernel: int, result: int, stride: tuple, pad: tuple, dilated: tuple, spread: tuple) -> int:
    """Number of (output position, kernel position) pairs along one axis that read an element of the input."""
    places = [o * stride[0] + k * spread[0] - pad[0] for o in range(result) for k in range(kernel)]
    return sum(place % dilated[0] == 0 and 0 <= place <= (size - 1) * dilated[0] for place in places)


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _width(dtype: str) -> float:
    """Bytes of an element: bf16 2, f8e4m3fn 1, s4 0.5."""
    if dtype == "pred":
        return 1.0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 0.0


def _payload(shape: str) -> float:
    """Bytes of an array or tuple, in any memory and without padding."""
    return sum(
        _width(dtype) * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes, _ in _SHAPE.findall(shape)
    )


def _moved(shape: str, *, everywhere: bool = False) -> float:
    """Bytes with padding to tiles; of arrays in main memory only, unless `everywhere`."""
    return sum(
        _width(dtype) * _padded([int(n) for n in sizes.split(",") if n], layout)
        for dtype, sizes, layout in _SHAPE.findall(shape)
        if everywhere or not re.search(r"S\([1-9]", layout)
    )


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


def _group_size(attributes: str) -> int:
    """Number of chips in each group; 0 if no groups are given, which means all chips."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([\w.]+)'", named[2]))
    return 0
