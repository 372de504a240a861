"""One measurement of `tinymim bench`: run as a module with a job in JSON, it prints a line of JSON."""

import functools
import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tinymim_jax.convert.formats.runners import RUNNERS, Runner
from tinymim_jax.runtime.parent import end_with_parent_of_environment

_WARM_UP = 3


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The row of one runtime and number of threads; see bench.bench."""
    threads = job["threads"]
    if threads and hasattr(os, "sched_setaffinity"):
        # Before a runtime starts: jax makes a thread for each processor that it may use.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    batches, name = {}, ""
    for batch, file in job["files"].items():
        runner = RUNNERS[job["runtime"]](pathlib.Path(file), threads or None) if file else _jax(job["checkpoint"])
        size = (int(batch), *job["size"], 3)
        pixels = runner.prepare(np.random.default_rng(0).normal(size=size).astype(np.float32))
        batches[int(batch)] = _time(lambda runner=runner, pixels=pixels: runner.run(pixels), int(batch), job["seconds"])
        name = runner.runtime
    files = {pathlib.Path(file) for file in job["files"].values() if file}
    sizes = [file.stat().st_size for file in files]
    return {
        "runtime": name,
        "megabytes": max(sizes) / 1e6 if sizes else None,
        "peak_megabytes": _peak_megabytes(),
        "batches": batches,
    }


def _peak_megabytes() -> float:
    """The most memory that this process has had. (On Linux, ru_maxrss would include its parent's.)"""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def _jax(checkpoint: str) -> Runner:
    import jax

    from tinymim_jax.evaluation.exporting import network_of
    from tinymim_jax.evaluation.predictor import load

    model = load(checkpoint)
    network = network_of(model)
    step = functools.partial(jax.jit(network.forward()), jax.device_put(network.used_params()))
    return Runner(f"jax {jax.__version__}", np.asarray, lambda pixels: np.asarray(step(pixels)))


def _time(call: Callable[[], Any], images: int, seconds: float) -> dict[str, float]:
    for _ in range(_WARM_UP):
        call()
    walls, began, cpu = [], time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds or len(walls) < _WARM_UP:
        before = time.perf_counter()
        call()
        walls.append(time.perf_counter() - before)
    median = statistics.median(walls)
    return {
        "milliseconds": 1e3 * median,
        "cpu_milliseconds": 1e3 * (time.process_time() - cpu) / len(walls),
        "images_per_second": images / median,
    }


if __name__ == "__main__":
    end_with_parent_of_environment()
    print(json.dumps(main(json.loads(sys.argv[1]))))
