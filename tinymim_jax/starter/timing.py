"""The duration of a training step on the devices of this machine: planned on accelerators, measured on CPUs."""

import json
import logging
import pathlib
import statistics

from ml_collections import ConfigDict

from tinymim_jax.metrics import read
from tinymim_jax.plan.topology import Topology, topology_of
from tinymim_jax.starter.choices import Hardware, Measured
from tinymim_jax.starter.helpers import Failed, Helpers

log = logging.getLogger(__name__)

RESERVE = 1.5
"""Planned steps are multiplied by this. The roofline assumes efficiencies that were not measured on any chip, and real
steps are longer (float32 products on GPUs, many small kernels). `real_step` shows the error afterwards."""


def topology_here(hardware: Hardware) -> Topology | None:
    """The topology to plan for; None if a step has to be measured: on CPUs, and on chips that plan does not know."""
    if hardware.platform == "cpu":
        return None
    return topology_of(hardware.kind, hardware.devices, hardware.memory)


def step_time(
    helpers: Helpers, name: str, config: ConfigDict, hardware: Hardware, data_dir: str | None, workers: int
) -> Measured:
    """The time of a step of the training `name`, and the number of micro-batches that fits into memory.

    On an accelerator that can be planned for, it is the longer of two times: the planned step times RESERVE, and the
    measured time in which this machine reads and augments a batch. Elsewhere a few steps are run and timed.
    """
    topology = topology_here(hardware)
    if topology is not None:
        try:
            return _planned(helpers, name, config, topology, hardware.memory, data_dir, workers)
        except Failed as error:
            log.warning("a step is measured, as it cannot be planned: %s", error)
    elif hardware.platform != "cpu":
        log.info("a step is measured, as `tinymim plan` does not know %s", hardware.kind)
    return Measured(**helpers.measure(name, config, data_dir, workers))


def real_step(workdir: pathlib.Path) -> float | None:
    """Seconds of a step of a finished training: the median over the rows of metrics.jsonl. None without rows."""
    path = workdir / "metrics.jsonl"
    speeds = [row["images_per_second"] for row in read(path) if row.get("images_per_second")] if path.exists() else []
    batch = json.loads((workdir / "config.json").read_text())["train"]["batch_size"] if speeds else 0
    return batch / statistics.median(speeds) if speeds else None


def _planned(
    helpers: Helpers,
    name: str,
    config: ConfigDict,
    topology: Topology,
    memory: int,
    data_dir: str | None,
    workers: int,
) -> Measured:
    plan = helpers.plan(topology.name, config, data_dir, name=f"plan_{name}", memory=memory)
    reading = helpers.reading(name, config, data_dir, workers)
    device = RESERVE * plan["seconds"]
    by = f"planned for {topology.name}: {plan['seconds']:.3g} s of the roofline, times {RESERVE:g}"
    if reading > device:
        by = f"measured: reading and augmenting a batch with {workers} workers; the devices wait"
    return Measured(
        seconds=max(device, reading),
        micro_batches=plan["micro_batches"],
        steps=plan["steps"],
        parameters=plan["parameters"],
        trained=plan["trained"],
        by=by,
    )
