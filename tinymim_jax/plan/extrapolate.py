"""Estimates a plan for another number of chips or another batch from a compiled plan."""

import dataclasses

from tinymim_jax.plan.build import changed
from tinymim_jax.plan.plan import Plan
from tinymim_jax.plan.roofline import MEMORY_EFFICIENCY, StepTime, collective_seconds
from tinymim_jax.plan.topology import Topology

# Adam reads parameter, gradient and two moments, and writes all but the gradient; float32.
_UPDATE_BYTES = 7 * 4


def extrapolate(
    plan: Plan,
    topology: Topology,
    *,
    batch: int | None = None,
    accumulate: int | None = None,
    other_program: bool = False,
) -> Plan:
    """Estimates `plan` (without --fsdp) on `topology` and for this batch, without compiling.

    Temporaries, compute and memory traffic are proportional to the images per chip and micro-batch, except for the
    optimizer's traffic. Parameters and optimizer state per chip do not change, nor do the bytes of each collective.

    Args:
      other_program: allow chips of another kind, for which a different program would be compiled. The estimate then
        takes the work of `plan`'s program at the speeds of `topology`'s chips, which is less accurate.

    Raises:
      ValueError: the plan has --fsdp, its step did not fit, or the chips run another program.
    """
    if plan.fsdp > 1 or plan.time is None:
        raise ValueError("only a plan that was compiled, and without --fsdp, can be scaled")
    same = same_program(plan.topology.kind, topology.kind)
    if not (same or other_program):
        raise ValueError(f"a program for {plan.topology.kind} says nothing about {topology.kind}")
    train = plan.config.train
    batch, accumulate = batch or train.batch_size, accumulate or train.accumulate
    ratio = batch / topology.chips / (train.batch_size / plan.topology.chips)
    parts = dict(plan.parts)
    parts["batch"] = round(parts["batch"] * ratio)
    parts["temporaries"] = round(parts["temporaries"] * ratio * train.accumulate / accumulate)
    config = changed(plan.config, {"train.batch_size": batch, "train.accumulate": accumulate})
    return dataclasses.replace(
        plan,
        config=config,
        topology=topology,
        parts=parts,
        needed=sum(parts.values()),
        flops=plan.flops * batch / train.batch_size,
        time=_time(plan, topology, ratio),
        collectives=tuple(
            dataclasses.replace(each, group=topology.chips if each.group == plan.topology.chips else each.group)
            for each in plan.collectives
        ),
        steps=round(plan.steps * train.batch_size / batch),
        compiler=f"{'scaled' if same else 'guessed'} from {plan.batch // plan.topology.chips} images on each "
        f"{'chip' if same else plan.topology.kind} ({plan.compiler})",
        largest=None,
        remedy=None,
        searched=False,
    )


def same_program(first: str, second: str) -> bool:
    """Whether two kinds of chips run the same programs (an H200 is an H100 with more and faster memory)."""
    return first == second or {first, second} == {"h100", "h200"}


def _time(plan: Plan, topology: Topology, ratio: float) -> StepTime:
    assert plan.time is not None
    before, chip, other = plan.time, plan.topology.chip, topology.chip
    update = min(_UPDATE_BYTES * plan.parameters["trained"] / (chip.bandwidth * MEMORY_EFFICIENCY), before.memory)
    bytes_of_update = min(_UPDATE_BYTES * plan.parameters["trained"], before.bytes)
    faster = chip.bandwidth / other.bandwidth
    network = 0.0
    for each in plan.collectives:
        group = 0 if each.group == plan.topology.chips else each.group
        network += each.count * collective_seconds(each.kind, each.bytes / each.count, group, topology)
    return dataclasses.replace(
        before,
        compute=before.compute * ratio * chip.peak / other.peak,
        memory=((before.memory - update) * ratio + update) * faster,
        network=network,
        flops=before.flops * ratio,
        bytes=(before.bytes - bytes_of_update) * ratio + bytes_of_update,
        kernel_flops=before.kernel_flops * ratio,
        kernel_bytes=before.kernel_bytes * ratio,
        int8_flops=before.int8_flops * ratio,
    )
