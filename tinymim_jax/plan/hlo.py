"""FLOPs, memory traffic and communication of each instruction of a compiled program."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

from tinymim_jax.plan.hlo_text import SHAPE, Instruction, dimensions, moved_bytes, payload_bytes, read_program

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions without memory traffic.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_CUDNN_ATTENTION = "__cudnn$fmha"
_KERNELS = ("tpu_custom_call", _CUDNN_ATTENTION)
_SLICES = ("dynamic-slice", "slice", "gather")


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
    int8: the part of `flops` that are products of 8-bit integers.
    """

    times: int
    flops: float
    bytes: float
    collective: str = ""
    sent: float = 0.0
    group: int = 0
    kernel: bool = False
    int8: float = 0.0


def work_of(text: str) -> list[Work]:
    """The work of all instructions of a program; the bodies of loops have `times` above 1.

    `text` is the result of `compiled.as_text()`, after optimization and partitioning. For a fusion, the traffic of its
    operands and results is counted; intermediate values stay in registers. Arrays that the TPU compiler keeps in fast
    memory are not counted. The padding of arrays to whole tiles is.
    """
    program = _Program(text)
    return list(program.work(program.entry, 1))


class _Program:
    def __init__(self, text: str):
        self.computations, self.entry = read_program(text)

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
                flops, moved = self._flops(each, scope), self._bytes(each, scope)
                yield Work(times, flops, moved, kind, sent, group, kernel, self._flops(each, scope, int8=True))

    def _longest_branch(self, each: Instruction, times: int) -> list[Work]:
        names = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
        found = names[1].replace("%", "").split(", ") if names else []
        found += [name for key in ("true_computation", "false_computation") if (name := each.called(key))]
        branches = [list(self.work(name, times)) for name in found]
        return max(branches, key=lambda branch: sum(work.flops + work.bytes for work in branch), default=[])

    def _trips(self, loop: Instruction) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        # A scan counts from 0 up to a constant of its condition.
        condition = self.computations.get(loop.called("condition"), {})
        limits = [int(c.operands[0]) for c in condition.values() if c.opcode == "constant" and c.operands[0].isdigit()]
        return max(limits, default=1)

    def _inside(self, each: Instruction) -> dict[str, Instruction]:
        return self.computations.get(each.called("calls"), {}) if each.opcode == "fusion" else {}

    def _flops(self, each: Instruction, scope: dict[str, Instruction], *, int8: bool = False) -> float:
        """FLOPs of the matrix products; with `int8` only of those whose operands are 8-bit integers."""
        if inside := self._inside(each):
            return sum(self._flops(inner, inside, int8=int8) for inner in inside.values())
        factors = [scope[name].shape for name in each.operands[:2] if name in scope]
        if int8 and not (factors and all(shape.startswith("s8[") for shape in factors)):
            return 0.0
        shapes = [dimensions(shape) for shape in factors]
        if each.opcode == "dot" and shapes:
            return _dot_flops(each.shape, shapes[0], _numbers(each.attributes, r"lhs_contracting_dims=\{([\d,]*)\}"))
        if each.opcode == "convolution" and len(shapes) == 2:
            return _convolution_flops(each, *shapes)
        if "tpu_custom_call" in each.attributes:  # a Pallas kernel, whose cost estimate is among its attributes
            stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', each.attributes)
            return float(stated[1]) if stated else 0.0
        if _CUDNN_ATTENTION in each.attributes:
            return _attention_flops(each)
        if each.opcode == "custom-call" and "matmul" in each.attributes and shapes:
            contracted = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', each.attributes)
            return _dot_flops(each.shape, shapes[0], [int(n) for n in json.loads(contracted[1])]) if contracted else 0.0
        return 0.0

    def _bytes(self, each: Instruction, scope: dict[str, Instruction]) -> float:
        operands = [scope[name] for name in each.operands if name in scope]
        if each.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            return _fetched(each.shape, operands[0].shape)
        if each.opcode.endswith("-start"):  # its result names the operands once more
            return 2.0 * sum(moved_bytes(operand.shape) for operand in operands)
        if each.opcode in _SLICES:
            return 2.0 * moved_bytes(each.shape)
        if each.opcode == "dynamic-update-slice" and len(operands) > 1:
            return 2.0 * moved_bytes(operands[1].shape)
        inside = self._inside(each)
        if not inside:
            return moved_bytes(each.shape) + sum(moved_bytes(operand.shape) for operand in operands)
        written = max(0.0, moved_bytes(each.shape) - self._kept_in_place(inside))
        return written + sum(self._read(moved_bytes(x.shape), index, inside) for index, x in enumerate(operands))

    def _kept_in_place(self, inside: dict[str, Instruction]) -> float:
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
                kept += max(0.0, moved_bytes(result.shape) - moved_bytes(inside[result.operands[1]].shape))
        return kept

    def _read(self, whole: float, index: int, inside: dict[str, Instruction]) -> float:
        """Bytes that a fusion reads of an operand of `whole` bytes: only the slices, if it uses nothing else of it."""
        own = [each for each in inside.values() if each.opcode == "parameter" and each.operands[0] == str(index)]
        if not whole or not own:
            return whole
        total = 0.0
        for name, user in _uses(own[0].name, inside):
            if user.opcode in _SLICES:
                total += moved_bytes(user.shape, everywhere=True)
            elif user.opcode == "fusion":
                within = self._inside(user)
                total += sum(self._read(whole, i, within) for i, used in enumerate(user.operands) if used == name)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(whole, total)

    def _collective(self, each: Instruction, scope: dict[str, Instruction]) -> tuple[str, float, int]:
        for inner in self._inside(each).values():  # the TPU compiler fuses some collectives with others
            if (found := self._collective(inner, self._inside(each)))[0]:
                return found
        kind = each.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return "", 0.0, 0
        group = _group_size(each.attributes)
        sent = sum(payload_bytes(scope[name].shape) for name in each.operands if name in scope)
        return kind, sent * max(group, 1) if kind == "all-gather" else sent, group


def _fetched(shape: str, source: str) -> float:
    """Bytes of an asynchronous copy or slice between memories: the size of the result for each end in main memory."""
    arrives = next((each for each in SHAPE.finditer(shape) if each[0] not in source), None)
    size = moved_bytes(arrives[0] if arrives else source, everywhere=True)
    return size * bool(moved_bytes(source)) + size * (arrives is None or bool(moved_bytes(arrives[0])))


def _uses(name: str, inside: dict[str, Instruction]) -> Iterator[tuple[str, Instruction]]:
    """(name of the operand, instruction that uses it) for each use of `name`, looking through bitcasts."""
    for user in inside.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _uses(user.name, inside)
            else:
                yield name, user


def _dot_flops(result: str, left: list[int], contracted: list[int]) -> float:
    return 2.0 * math.prod(dimensions(result)) * math.prod(left[axis] for axis in contracted)


def _attention_flops(each: Instruction) -> float:
    """FLOPs of cuDNN's attention: two products forward; five backward, where the map is computed again."""
    found = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*(\[[^\]]*\])', each.attributes)
    pairs = math.prod(int(n) for n in json.loads(found[1])) if found else 0  # batch, heads, queries, keys
    head_dim = dimensions(each.shape)[-1]
    return 2.0 * (5 if "Backward" in each.attributes else 2) * pairs * head_dim


def _convolution_flops(each: Instruction, left: list[int], kernel: list[int]) -> float:
    """FLOPs of a convolution. The TPU compiler expresses matrix products as convolutions and batches of them as dilated
    ones, so only kernel taps that meet an element of the input are counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if not labels:
        return 0.0
    result = dimensions(each.shape)
    total = 2.0 * kernel[labels[2].index("i")]
    for axis, label in enumerate(labels[3]):
        if label in "bf":
            total *= result[axis]
            continue
        sizes = left[labels[1].index(label)], kernel[labels[2].index(label)], result[axis]
        total *= _taps(*sizes, *(_of_window(each.attributes, name, int(label)) for name in _WINDOW))
    return total


# Window attributes of an axis that the text leaves out.
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
