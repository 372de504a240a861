"""Makes a plan: memory, time and cost of a config on a topology."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from tinymim_jax import optim
from tinymim_jax.memory import Remedy, remedies
from tinymim_jax.plan.build import Planned, changed, plan_experiment
from tinymim_jax.plan.compiled import CACHE, Compiled, check_installed, compile_step, compiler_of, kept_result
from tinymim_jax.plan.hlo import work_of
from tinymim_jax.plan.roofline import Collective, StepTime, collectives, efficiency, step_time
from tinymim_jax.plan.search import Fit, largest_batch
from tinymim_jax.plan.topology import Topology
from tinymim_jax.sharding import AXES
from tinymim_jax.tasks import TASKS

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan in numbers; bytes and seconds are of each chip unless stated otherwise.

    parameters: numbers of "all", "trained" and "frozen" parameters.
    parts: bytes of "parameters", "optimizer", "moving average", "frozen weights", "batches", "temporaries", "code".
    flops: of a step on all chips, without recomputation; recomputed: the fraction that `model.remat` adds.
    time: None if the step does not fit, since there is no program to analyze.
    steps: of the whole run.
    phases: (number of steps, what differs, FLOPs of a step) of each, where the losses change with the step. `flops` are
      then their mean, and `time` is that of the longest.
    largest: the largest number of images per chip and micro-batch that fits; None if not searched or nothing fits.
    remedy: the first change that makes the step fit, and the plan with that change.
    """

    config: ConfigDict
    topology: Topology
    fsdp: int
    notes: tuple[str, ...]
    parameters: dict[str, int]
    parts: dict[str, int]
    needed: int
    flops: float
    recomputed: float
    time: StepTime | None
    collectives: tuple[Collective, ...]
    steps: int
    compiler: str
    phases: tuple[tuple[int, str, float], ...] = ()
    largest: Fit | None = None
    remedy: tuple[Remedy, "Plan"] | None = None
    searched: bool = False

    @property
    def fits(self) -> bool:
        return self.time is not None and self.needed <= self.topology.chip.memory

    @property
    def batch(self) -> int:
        return self.config.train.batch_size

    @property
    def images_per_second(self) -> float:
        """Throughput of the devices if the hosts keep up."""
        return self.batch / self.time.seconds if self.time else 0.0

    @property
    def images_per_core(self) -> int:
        """Images per second that a core of a host decodes and augments."""
        return TASKS[self.config.task].images_per_core

    @property
    def cores_wanted(self) -> float:
        """Cores that each host needs to decode images as fast as its devices use them."""
        return self.images_per_second / self.config.data.crops / self.topology.hosts / self.images_per_core

    @property
    def cores_there(self) -> float:
        """Physical cores of a host (two hardware threads each)."""
        chip, topology = self.topology.chip, self.topology
        return chip.vcpus * topology.chips / topology.hosts / 2

    @property
    def seconds(self) -> float:
        """Time of a step, including waiting for images."""
        return self.time.seconds * max(1.0, self.cores_wanted / self.cores_there) if self.time else math.inf

    @property
    def bound(self) -> str:
        """What limits the step: input, compute, memory or network; empty if it does not fit."""
        return "" if self.time is None else "input" if self.cores_wanted > self.cores_there else self.time.bound

    @property
    def hours(self) -> float:
        """Hours of the whole run, without compiling, evaluation and checkpoints."""
        return self.steps * self.seconds / 3600

    @property
    def chip_hours(self) -> float:
        """Hours of the whole run, times the number of chips."""
        return self.hours * self.topology.chips / self.topology.chip.devices

    @property
    def utilisation(self) -> float:
        """Estimated model FLOP utilization."""
        return efficiency(self.flops, self.seconds, self.topology.chips, self.topology.chip)


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    fsdp: int = 1,
    cache: str = CACHE,
    data_dir: str | None = None,
    search: bool = True,
) -> Plan:
    """Compiles the step of `config` for `topology` and analyzes it.

    Args:
      search: also find the largest batch and, if the step does not fit, a change that makes it fit. This takes several
        more compilations.

    Raises:
      ValueError: the training could not start on this topology; ImportError, RuntimeError: see `compile_step`.
    """
    if config.train.accumulate == 0:
        log.info("train.accumulate=0, the smallest number that fits: planned for 1, see what it advises")
        config = changed(config, {"train.accumulate": 1})
    check_layout(config, topology, fsdp)
    if kept_result(config, topology, fsdp=fsdp, cache=cache) is None:
        check_installed(topology)
    planned = plan_experiment(config, data_dir=data_dir)
    log.info("compiling for %s with %s", topology.describe(), compiler_of(topology))
    compiled = compile_step(config, topology, fsdp=fsdp, cache=cache, data_dir=data_dir)
    plan = read_plan(planned, topology, fsdp, compiled)
    if not search:
        return plan
    measure = functools.partial(_needed, config, topology, fsdp, cache, data_dir)
    largest = largest_batch(measure, _images(config, topology), topology.chip.memory)
    plan = dataclasses.replace(plan, largest=largest, searched=True)
    return plan if plan.fits else dataclasses.replace(plan, remedy=_first_that_fits(plan, cache, data_dir))


def check_layout(config: ConfigDict, topology: Topology, fsdp: int) -> None:
    """Raises ValueError if the batch or the mesh cannot be split over the chips, as training would."""
    chips = topology.chips
    if fsdp < 1 or chips % fsdp:
        choices = ", ".join(str(n) for n in range(1, chips + 1) if chips % n == 0)
        raise ValueError(f"--fsdp {fsdp} does not divide the {chips} chips of {topology.name}. Choices: {choices}")
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch % parts or (batch // parts) % chips:
        whole, in_parts = chips * parts, f" in train.accumulate={parts} micro-batches" if parts > 1 else ""
        below, above = max(1, batch // whole) * whole, (batch // whole + 1) * whole
        raise ValueError(
            f"train.batch_size={batch}{in_parts} cannot be split over the {chips} chips of {topology.name}: "
            f"choose a multiple of {whole}, such as {below}{f' or {above}' if below < above else ''}"
            + (f", or at most {batch // parts} chips for this batch" if batch // parts < chips else "")
        )


def read_plan(planned: Planned, topology: Topology, fsdp: int, compiled: Compiled) -> Plan:
    """The plan from the compiled step of `planned`, without any search."""
    experiment, work = planned.experiment, work_of(compiled.hlo) if compiled.hlo else []
    params = planned.params()
    trained, _ = optim.split(params, planned.paths)
    needed, executed = planned.flops
    return Plan(
        config=planned.config,
        topology=topology,
        fsdp=fsdp,
        notes=planned.notes,
        parameters={"all": _count(params), "trained": _count(trained), "frozen": _count(planned.frozen)},
        parts=_parts(planned, topology, fsdp, compiled),
        needed=compiled.needed,
        flops=needed,
        recomputed=executed / needed - 1,
        time=step_time(work, topology) if work else None,
        collectives=tuple(collectives(work, topology)),
        steps=experiment.total_steps,
        compiler=compiled.compiler,
        phases=planned.phases,
    )


def _parts(planned: Planned, topology: Topology, fsdp: int, compiled: Compiled) -> dict[str, int]:
    """Memory of a chip by kind: arrays computed from their shapes, the rest as reported by the compiler."""
    mesh = AbstractMesh((topology.chips // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)
    _, (state, _, frozen, batch, _) = planned.step(mesh)
    parts = {
        "parameters": _bytes_here(state.params),
        "optimizer": _bytes_here(state.opt_state),
        "moving average": _bytes_here(state.extra),
        "frozen weights": _bytes_here(frozen),
        "batch": _bytes_here(batch),
    }
    known = sum(parts.values())
    if compiled.refused:
        return parts | {"temporaries and padding": max(0, compiled.needed - known)}
    padding = max(0, compiled.arguments - known)
    return parts | {"padding": padding, "temporaries": compiled.temporaries, "code": compiled.code}


def _bytes_here(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _images(config: ConfigDict, topology: Topology) -> int:
    """Images per chip and micro-batch."""
    return config.train.batch_size // config.train.accumulate // topology.chips


def _needed(config: ConfigDict, topology: Topology, fsdp: int, cache: str, data_dir: str | None, images: int) -> float:
    batch = images * topology.chips * config.train.accumulate
    log.info("trying %d images on each chip", images)
    other = changed(config, {"train.batch_size": batch})
    return compile_step(other, topology, fsdp=fsdp, cache=cache, data_dir=data_dir).needed or math.inf


def _first_that_fits(plan: Plan, cache: str, data_dir: str | None) -> tuple[Remedy, Plan] | None:
    topology, fitting = plan.topology, plan.largest.images if plan.largest else 0
    shared = topology.linked if topology.chip.platform == "gpu" else min(topology.chips, 8)
    for remedy in remedies(plan.config, topology.chips, shared, plan.fsdp, fitting):
        log.info("trying %s", " ".join(remedy.words))
        config, fsdp = changed(plan.config, remedy.changes), max(plan.fsdp, remedy.fsdp)
        compiled = compile_step(config, topology, fsdp=fsdp, cache=cache, data_dir=data_dir)
        if not compiled.refused and compiled.needed <= topology.chip.memory:
            planned = plan_experiment(config, data_dir=data_dir)
            return remedy, read_plan(planned, topology, fsdp, compiled)
    return None
