"""Estimates the time of a compiled step with a roofline model, at assumed fractions of the chips' peak rates."""

import dataclasses
from collections.abc import Iterable

from tinymim_jax.plan.chips import Chip
from tinymim_jax.plan.hlo import Work
from tinymim_jax.plan.topology import Topology

# Assumed, not measured: the fractions of peak rates that large matrix products, memory reads and all-reduces achieve.
COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, NETWORK_EFFICIENCY = 0.7, 0.8, 0.6
# Latency of a transfer, in seconds: between neighboring chips, and over the data center's network.
LINK_LATENCY, NETWORK_LATENCY = 1e-6, 20e-6


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on each chip. An instruction takes the longer of its compute time and its memory time.

    compute: total of the instructions bound by computing.
    memory: total of the instructions bound by memory traffic.
    network: total of the collectives; assumed not to overlap with anything (gradients are reduced at the step's end).
    flops, bytes: FLOPs and bytes of memory traffic of one chip.
    int8_flops: the part of `flops` that are products of 8-bit integers, at their own rate.
    kernels: calls of kernels that are not the compiler's (Pallas, cuDNN); kernel_flops, kernel_bytes: their part of
      `flops` and `bytes`.
    """

    compute: float
    memory: float
    network: float
    flops: float
    bytes: float
    kernels: int = 0
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0
    int8_flops: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        """The largest part of the step: compute, memory or network."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size in a step: their number and their bytes in total."""

    kind: str
    group: int
    count: int
    bytes: float


def step_time(work: Iterable[Work], topology: Topology) -> StepTime:
    """Time of the compiled step with the instructions `work`."""
    chip, work = topology.chip, list(work)
    compute = memory = network = 0.0
    for each in work:
        if each.collective:
            network += each.times * collective_seconds(each.collective, each.sent, each.group, topology)
            continue
        multiplying = (each.flops - each.int8 + each.int8 / chip.int8) / (chip.peak * COMPUTE_EFFICIENCY)
        moving = each.bytes / (chip.bandwidth * MEMORY_EFFICIENCY)
        if multiplying > moving:
            compute += each.times * multiplying
        else:
            memory += each.times * moving
    flops, moved = (sum(each.times * getattr(each, name) for each in work) for name in ("flops", "bytes"))
    kernels = [each for each in work if each.kernel]
    return StepTime(
        compute, memory, network, flops, moved,
        kernels=sum(each.times for each in kernels),
        kernel_flops=sum(each.times * each.flops for each in kernels),
        kernel_bytes=sum(each.times * each.bytes for each in kernels),
        int8_flops=sum(each.times * each.int8 for each in work),
    )  # fmt: skip


def collectives(work: Iterable[Work], topology: Topology) -> list[Collective]:
    """The collectives in `work`, summed by kind and group size, most bytes first."""
    found: dict[tuple[str, int], list[float]] = {}
    for each in work:
        if each.collective:
            total = found.setdefault((each.collective, each.group or topology.chips), [0, 0.0])
            total[0] += each.times
            total[1] += each.times * each.sent
    rows = [Collective(kind, group, int(count), sent) for (kind, group), (count, sent) in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def collective_seconds(kind: str, sent: float, group: int, topology: Topology) -> float:
    """Time of one collective: a ring within each slice or node, then a ring of each chip's share between these.

    Args:
      sent: bytes of the operand, or of the result of an all-gather.
      group: number of participating chips; 0: all.
    """
    group = group or topology.chips
    if group == 1:
        return 0.0
    rounds = 2 if kind == "all-reduce" else 1
    inside = min(group, topology.linked)
    seconds = rounds * (_ring(sent, inside, topology.chip.link) + LINK_LATENCY * _hops(topology, inside))
    if (outside := group // inside) > 1:
        seconds += rounds * (_ring(sent / inside, outside, topology.chip.network) + NETWORK_LATENCY * (outside - 1))
    return seconds


def _ring(sent: float, members: int, bandwidth: float) -> float:
    return sent * (members - 1) / members / (bandwidth * NETWORK_EFFICIENCY)


def _hops(topology: Topology, members: int) -> int:
    """Hops of a ring along every axis of a slice; the GPUs of a node are connected by a switch."""
    if topology.chip.platform != "tpu":
        return 1
    return sum(side - 1 for side in topology.shape) if members == topology.linked else members - 1


def efficiency(flops: float, seconds: float, chips: int, chip: Chip) -> float:
    """Model FLOP utilization: FLOPs that the method needs, relative to the chips' peak in that time."""
    return flops / seconds / (chips * chip.peak)
