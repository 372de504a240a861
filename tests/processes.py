"""Starting separate Python processes, for tests that kill, interrupt or pair them."""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
from importlib import metadata

JOB_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST", "XLA_FLAGS")


def cpu_devices(devices):
    """Environment variables for this many fake CPU devices, with a compiler that optimizes little.

    Tests run tiny programs once, so compiling takes most of their time, and optimizing most of that. Set
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 to run the tests with all optimizations.
    """
    flags, unoptimized = f"--xla_force_host_platform_device_count={devices}", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    quick = os.environ.get(unoptimized, "1")
    if quick == "1" and metadata.version("jaxlib").startswith("0.10."):  # XLA aborts at a flag that it does not know
        flags += " --xla_cpu_use_fusion_emitters=false"  # a third less compile time
        flags += " --xla_cpu_parallel_codegen_split_count=1"  # another 4 %, in CPU time
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, unoptimized: quick}


def run_python(code, *, devices=1, **variables):
    """Starts a Python process on `devices` CPU devices; it is killed when this one exits, at the latest.

    Variables that describe a multi-process job are removed from its environment.
    """
    environment = {k: v for k, v in os.environ.items() if k not in JOB_VARIABLES} | cpu_devices(devices)
    errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, a full pipe would block the process
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
    """Steps of a run's complete checkpoints."""
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def free_port():
    """A TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
