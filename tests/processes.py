"""Python processes of their own, for tests that kill, interrupt or pair them."""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
from importlib import metadata

JOB_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST", "XLA_FLAGS")


def cpu_devices(devices):
    """Variables for so many fake devices that compile quickly.

    Most of the time of so small programs is compiling, and most of that is optimizing what then runs for milliseconds.
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 around the tests has it all done.
    """
    flags, unoptimized = f"--xla_force_host_platform_device_count={devices}", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    quick = os.environ.get(unoptimized, "1")
    if quick == "1" and metadata.version("jaxlib").startswith("0.10."):  # 0.12 ends at a flag that it no longer knows
        flags += " --xla_cpu_use_fusion_emitters=false"  # a third less time for all of compiling
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, unoptimized: quick}


def run_python(code, *, devices=1, **variables):
    """A Python process of its own, outside any job, on `devices` CPU devices; killed with this one at the latest."""
    environment = {k: v for k, v in os.environ.items() if k not in JOB_VARIABLES} | cpu_devices(devices)
    errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, a pipe that nobody empties would stop the process
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment | variables, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    process.errors = errors
    atexit.register(process.kill)
    return process


def output_of(process):
    """(exit status, the rest of stdout, all of stderr) once the process has ended."""
    out, _ = process.communicate(timeout=500)
    process.errors.seek(0)
    return process.returncode, out, process.errors.read()


def saved_steps(workdir):
    """Steps of the complete checkpoints of a run."""
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
