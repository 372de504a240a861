"""Names of hardware topologies: v5e-64, v5e:8x8, v4-32, h100x8, h100x8x4; the topology of this machine's devices."""

import dataclasses
import math
import re

from tinymim_jax.errors import unknown
from tinymim_jax.plan.chips import CHIPS, Chip

# Slice shape for each number of chips that Google offers.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_SHAPES = {"v4": _CUBES, "v5p": _CUBES, "tpu7x": _CUBES, "v5e": _FLAT, "v6e": _FLAT}
_BY_CORES = ("v4", "v5p", "tpu7x")  # their names count TensorCores, two per chip
# jax takes 0.75 of a GPU's memory unless told otherwise, and CHIPS counts 0.9.
_LEAST_SHARE = 0.7
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "a100-80": "a100", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The chips of a training.

    name: used in reports.
    kind: a key of CHIPS.
    shape: of one TPU slice, such as (4, 4); for GPUs (nodes, GPUs per node).
    slices: number of TPU slices, connected by the data center's network.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of jax devices: of chips, except that a tpu7x chip counts as two."""
        return math.prod(self.shape) * self.slices * self.chip.devices

    @property
    def hosts(self) -> int:
        """Number of hosts; each runs its own input pipeline."""
        in_one = math.prod(self.shape) * self.chip.devices
        if self.chip.platform != "tpu":
            return self.shape[0]
        per_host = 8 if self.shape == (2, 4) else self.chip.per_host
        return self.slices * max(1, in_one // per_host)

    @property
    def linked(self) -> int:
        """Number of chips that are connected without the data center's network."""
        return self.shape[1] if self.chip.platform != "tpu" else math.prod(self.shape) * self.chip.devices

    def describe(self) -> str:
        """`v5e-16: 16 chips (4x4) on 4 hosts`."""
        what = "GPUs" if self.chip.platform == "gpu" else "chips" if self.chip.devices == 1 else "half chips"
        shape = "x".join(map(str, self.shape)) + (f" in each of {self.slices} slices" if self.slices > 1 else "")
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)}"
        return f"{self.name}: {self.chips} {what if self.chips > 1 else what[:-1]} ({shape}) on {hosts}"


def parse_topology(text: str, *, slices: int = 1) -> Topology:
    """The topology of that name.

    v5e-64, v6e-64: number of chips. v4-32, v5p-32, tpu7x-32: number of cores, two per chip. v5e:8x8, v4:2x2x4: shape
    of a slice. h100x8: GPUs in one node; h100x8x4: in each of four nodes. cpux8: fake devices of this machine.

    Raises:
      ValueError: `text` is none of these; the message has the nearest valid names.
    """
    if slices < 1:
        raise ValueError(f"--slices {slices} must be at least 1")
    word = text.strip().lower()
    if match := re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)+)", word):
        kind, shape = _kind(match[1], text), tuple(map(int, match[2].split("x")))
        return Topology(word + _times(slices), kind, _checked_shape(kind, shape, text), slices)
    if match := re.fullmatch(r"([a-z0-9]+)-(\d+)", word):
        kind, number = _kind(match[1], text), int(match[2])
        if kind in _SHAPES:
            return Topology(word + _times(slices), kind, _shape_of(kind, number, text), slices)
    if match := re.fullmatch(r"([a-z0-9-]+?)x(\d+)(?:x(\d+))?", word):
        kind, per_node, nodes = _kind(match[1], text), int(match[2]), int(match[3] or 1)
        if kind not in _SHAPES and 1 <= per_node <= CHIPS[kind].per_host and nodes >= 1:
            if slices > 1:
                raise ValueError(f"--slices is of TPUs; write {kind}x{per_node}x{slices} for {slices} nodes")
            return Topology(word, kind, (nodes, per_node))
        if kind not in _SHAPES:
            most = CHIPS[kind].per_host
            raise ValueError(
                f"--topology {text!r}: a node has 1 to {most} of these; write {kind}x{most}xN for N whole nodes"
            )
    raise unknown("--topology", text, _examples())


def topology_of(device_kind: str, count: int, memory: int | None = None) -> Topology | None:
    """The topology of this many devices of one machine; None where CHIPS has none of their kind, or only other forms.

    Args:
      device_kind: as jax names them, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
      memory: bytes that a program may use on each, None if unknown; a part of a card (MIG), or a card with another
        memory than the one in CHIPS, is none of them.
    """
    fitting = {name: chip for name, chip in CHIPS.items() if chip.platform != "cpu" and _is_of(device_kind, chip)}
    longest = max((len(chip.kind) for chip in fitting.values()), default=0)
    near = {name: chip for name, chip in fitting.items() if len(chip.kind) == longest}
    if memory:
        near = {name: chip for name, chip in near.items() if _LEAST_SHARE < memory / chip.memory < 1 / _LEAST_SHARE}
    if not near:
        return None
    kind = min(near, key=lambda name: abs(near[name].memory - (memory or near[name].memory)))
    if near[kind].platform == "gpu":
        return Topology(f"{kind}x{count}", kind, (1, count))
    chips = count // near[kind].devices
    shape = _SHAPES[kind].get(chips, "x".join(["1"] * (2 if kind in _BY_CORES else 1) + [str(chips)]))
    return Topology(f"{kind}:{shape}", kind, tuple(map(int, shape.split("x"))))


def _is_of(device_kind: str, chip: Chip) -> bool:
    return device_kind.startswith(chip.kind) and not re.search(r"PCIe|NVL|MIG", device_kind, re.IGNORECASE)


def _kind(name: str, text: str) -> str:
    name = _ALIASES.get(name, name)
    if name not in CHIPS:
        raise unknown("--topology", text, _examples())
    return name


def _shape_of(kind: str, number: int, text: str) -> tuple[int, ...]:
    shapes, per_chip = _SHAPES[kind], 2 if kind in _BY_CORES else 1
    if number % per_chip or number // per_chip not in shapes:
        choices = ", ".join(f"{kind}-{chips * per_chip}" for chips in shapes)
        note = " (the number counts cores, two for each chip)" if per_chip == 2 else ""
        raise ValueError(f"--topology {text!r} is not a slice that is offered{note}. Choices: {choices}")
    return tuple(map(int, shapes[number // per_chip].split("x")))


def _checked_shape(kind: str, shape: tuple[int, ...], text: str) -> tuple[int, ...]:
    if kind not in _SHAPES:
        raise ValueError(f"--topology {text!r}: only TPU slices have a shape; write {kind}x8 for 8 GPUs")
    rank = 3 if kind in _BY_CORES else 2
    if len(shape) != rank or math.prod(shape) < 1:
        choices = ", ".join(f"{kind}:{shape}" for shape in _SHAPES[kind].values())
        raise ValueError(f"--topology {text!r}: slices of {kind} have {rank} sides. Such as {choices}")
    return shape


def _times(slices: int) -> str:
    return f" x {slices} slices" if slices > 1 else ""


def _examples() -> list[str]:
    names = [f"{kind}-{chips * (2 if kind in _BY_CORES else 1)}" for kind, sizes in _SHAPES.items() for chips in sizes]
    return names + [f"{kind}x{count}" for kind in CHIPS if kind not in _SHAPES for count in (1, 8)]
