"""Formats a plan as text and as plain JSON."""

import dataclasses
from typing import Any

from tinymim_jax.plan.chips import GIB
from tinymim_jax.plan.plan import Plan
from tinymim_jax.plan.roofline import COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, NETWORK_EFFICIENCY
from tinymim_jax.runtime.progress import format_seconds


def as_json(plan: Plan) -> dict[str, Any]:
    """All numbers by name, in bytes, seconds and hours."""
    time = plan.time
    return {
        "topology": {**dataclasses.asdict(plan.topology), "chips": plan.topology.chips, "hosts": plan.topology.hosts},
        "fsdp": plan.fsdp,
        "batch_size": plan.batch,
        "images_per_chip": plan.batch / plan.topology.chips,
        "accumulate": plan.config.train.accumulate,
        "fits": plan.fits,
        "bytes": plan.parts | {"all": plan.needed, "limit": int(plan.topology.chip.memory)},
        "parameters": plan.parameters,
        "flops_per_step": plan.flops,
        "phases": [{"steps": steps, "label": label, "flops": flops} for steps, label, flops in plan.phases],
        "recomputed": plan.recomputed,
        "step": time and dataclasses.asdict(time) | {"seconds": plan.seconds, "bound": plan.bound},
        "images_per_second": time and plan.batch / plan.seconds,
        "model_flop_utilisation": time and plan.utilisation,
        "collectives": [dataclasses.asdict(each) for each in plan.collectives],
        "run": time and {"steps": plan.steps, "hours": plan.hours, "chip_hours": plan.chip_hours},
        "input": time and {"cores_wanted_per_host": plan.cores_wanted, "cores_per_host": plan.cores_there},
        "largest_images_per_chip": plan.largest and plan.largest.images,
        "remedy": plan.remedy and {"words": list(plan.remedy[0].words), "plan": as_json(plan.remedy[1])},
        "compiler": plan.compiler,
        "notes": list(plan.notes),
    }


def as_text(plan: Plan) -> str:
    """The output of `tinymim plan`."""
    lines = [plan.topology.describe() + (f", --fsdp {plan.fsdp}" if plan.fsdp > 1 else ""), ""]
    lines += [_memory_verdict(plan), *_memory(plan), "", *_method(plan)]
    lines += [*(_speed(plan) if plan.fits else ()), ""]
    if plan.remedy:
        lines += [*_remedy(plan), ""]
    elif plan.searched and not plan.fits:
        lines += ["Nothing that was tried makes it fit: take more chips, or larger ones", ""]
    if plan.searched:
        lines += [_largest(plan), ""]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join([*lines, _assumptions(plan)])


def _memory_verdict(plan: Plan) -> str:
    chip, parts = plan.topology.chip, plan.config.train.accumulate
    images = plan.batch // plan.topology.chips
    how = f"{plan.batch} images in a batch, {images} on each chip" + (f" in {parts} micro-batches" if parts > 1 else "")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if not plan.needed:
        return f"{verdict}: {how}; the compiler refuses, {chip.memory / GIB:.2f} GiB are not enough"
    return f"{verdict}: {how}; {plan.needed / GIB:.2f} of {chip.memory / GIB:.2f} GiB on each chip"


def _memory(plan: Plan) -> list[str]:
    shown = {name: size for name, size in plan.parts.items() if size >= GIB / 1000}
    return [f"  {name:<24}{size / GIB:>8.3f} GiB" for name, size in shown.items()]


def _method(plan: Plan) -> list[str]:
    counts = plan.parameters
    again = f", {plan.recomputed:.0%} more with what remat computes again" if plan.recomputed > 0.001 else ""
    frozen = f"; {counts['frozen'] / 1e6:.2f} M frozen" if counts["frozen"] else ""
    return [
        f"parameters      {counts['all'] / 1e6:.2f} M, {counts['trained'] / 1e6:.2f} M of them trained{frozen}",
        f"FLOPs           {plan.flops:.3e} a step, {plan.flops / plan.batch:.3e} an image{again}",
        *(f"  {steps:>7} steps {flops:.3e} a step with {label}" for steps, label, flops in plan.phases),
    ]


def _speed(plan: Plan) -> list[str]:
    time = plan.time
    assert time is not None
    shares = ", ".join(f"{name} {getattr(time, name) * 1e3:.1f} ms" for name in ("compute", "memory", "network"))
    lines = [
        f"step            {time.seconds * 1e3:.0f} ms on the devices: {shares}; bound by {plan.bound}",
        f"speed           {plan.batch / plan.seconds:,.0f} images/s; model FLOP utilisation {plan.utilisation:.0%}",
        f"run             {plan.steps} steps, {format_seconds(plan.hours * 3600)} = {plan.hours / 24:.2f} days, "
        f"{plan.chip_hours:,.0f} chip-hours, without evaluation and compiling",
        f"input           {plan.cores_wanted * plan.images_per_core:,.0f} images/s for each host: "
        f"{plan.cores_wanted:.1f} cores at {plan.images_per_core} each; it has about {plan.cores_there:.0f}"
        + ("" if plan.bound != "input" else ", so the devices wait: see data.crops, prepare --short_side"),
    ]
    if time.kernels:
        lines.append(
            f"kernels         {time.kernels} calls of Pallas or cuDNN, which the compiler cannot see into: counted "
            f"with {time.kernel_flops / time.flops:.0%} of the FLOPs, by their own statement or shapes, and "
            f"{time.kernel_bytes / 1e9:.1f} of {time.bytes / 1e9:.0f} GB, the arrays that they read and write"
        )
    if time.int8_flops:
        lines.append(
            f"int8            {time.int8_flops / time.flops:.0%} of the FLOPs are products of 8-bit integers, taken at "
            f"{plan.topology.chip.int8:.0f} x the bfloat16 peak"
        )
    for row in plan.collectives:
        lines.append(f"collectives     {row.kind} over {row.group} chips: {row.count} x, {row.bytes / 1e6:.1f} MB")
    return lines


def _remedy(plan: Plan) -> list[str]:
    assert plan.remedy is not None
    remedy, fitting = plan.remedy
    return [
        f"to make it fit: {' '.join(remedy.words)}",
        f"  then {fitting.needed / GIB:.2f} GiB, {fitting.seconds * 1e3:.0f} ms a step, "
        f"{format_seconds(fitting.hours * 3600)} in all; {remedy.cost}",
    ]


def _largest(plan: Plan) -> str:
    if plan.largest is None:
        return "not one image on each chip fits"
    images, parts = plan.largest.images, plan.config.train.accumulate
    return (
        f"largest batch that was seen to fit: {images * parts * plan.topology.chips}, {images} images on each chip at "
        f"a time ({plan.largest.needed / GIB:.2f} GiB)"
    )


def _assumptions(plan: Plan) -> str:
    longest = "; a step takes as long as in its longest phase" if plan.phases else ""
    return (
        f"memory, traffic and collectives: {plan.compiler}'s compiled step, read; time: a roofline of its instructions "
        f"at {COMPUTE_EFFICIENCY:.0%} of the peak FLOP/s, {MEMORY_EFFICIENCY:.0%} of the memory's and "
        f"{NETWORK_EFFICIENCY:.0%} of the network's bandwidth, assumed and not measured{longest}"
    )
