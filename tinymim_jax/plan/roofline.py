"""How long a compiled step takes, at assumed shares of what the makers promise; and what of it the network costs."""

import dataclasses
from collections.abc import Iterable

from tinymim_jax.plan.chips import Chip
from tinymim_jax.plan.hlo import Work
from tinymim_jax.plan.topology import Topology

# Assumed, not measured: what well-shaped products, long reads and large all-reduces reach of the promised rates.
COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, NETWORK_EFFICIENCY = 0.7, 0.8, 0.6
# From the start of a transfer to its arrival: between neighbours, and through the data centre.
LINK_LATENCY, NETWORK_LATENCY = 1e-6, 20e-6


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on each chip. Every instruction takes the longer of its computing and its memory traffic.

    compute: of the instructions that multiply for longer than they move memory.
    memory: of the others.
    network: of the collectives. Our steps have them at their end, after the last gradient: nothing hides them.
    flops, bytes: that one chip multiplies and moves.
    """

    compute: float
    memory: float
    network: float
    flops: float
    bytes: float

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        """What takes most of the step: compute, memory or network."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind and group size in a step: how often one runs, and bytes of all of them together."""

    kind: str
    group: int
    count: int
    bytes: float


def step_time(work: Iterable[Work], topology: Topology) -> StepTime:
    """Of the compiled step whose instructions are `work`."""
    chip, work = topology.chip, list(work)
    compute = memory = network = 0.0
    for each in work:
        if each.collective:
            network += each.times * collective_seconds(each.collective, each.sent, each.group, topology)
            continue
        multiplying = each.flops / (chip.peak * COMPUTE_EFFICIENCY)
        moving = each.bytes / (chip.bandwidth * MEMORY_EFFICIENCY)
        if multiplying > moving:
            compute += each.times * multiplying
        else:
            memory += each.times * moving
    flops, moved = (sum(each.times * getattr(each, name) for each in work) for name in ("flops", "bytes"))
    return StepTime(compute, memory, network, flops, moved)


def collectives(work: Iterable[Work], topology: Topology) -> list[Collective]:
    """Summed up by kind and group, the largest first."""
    found: dict[tuple[str, int], list[float]] = {}
    for each in work:
        if each.collective:
            total = found.setdefault((each.collective, each.group or topology.chips), [0, 0.0])
            total[0] += each.times
            total[1] += each.times * each.sent
    rows = [Collective(kind, group, int(count), sent) for (kind, group), (count, sent) in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def collective_seconds(kind: str, sent: float, group: int, topology: Topology) -> float:
    """Of one collective: rings within a slice or node, and between these each chip sends its share.

    Args:
      sent: bytes of the operand, or of the result of an all-gather.
      group: chips that take part; 0: all.
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
    """Steps of a ring along every side of a slice; a switch joins the GPUs of a node."""
    if topology.chip.platform != "tpu":
        return 1
    return sum(side - 1 for side in topology.shape) if members == topology.linked else members - 1


def efficiency(flops: float, seconds: float, chips: int, chip: Chip) -> float:
    """Model FLOP utilisation: what the method needs, over what the chips could do in that time."""
    return flops / seconds / (chips * chip.peak)
