"""Running the scripts of launch/, with small programs in place of real ones."""

import os
import pathlib
import subprocess
import time

from processes import JOB_VARIABLES

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def environment(**variables) -> dict[str, str]:
    """Environment variables without those of a multi-process job, for one CPU device, changed by `variables`."""
    outside = {k: v for k, v in os.environ.items() if k not in (*JOB_VARIABLES, "TINYMIM")}
    return outside | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""} | variables


def bash(*words, **variables) -> subprocess.CompletedProcess:
    """Runs a bash script in the repository."""
    command = ["bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), cwd=ROOT, timeout=100)


def program(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(condition, process=None, seconds=400) -> None:
    """Waits until `condition()` is true; fails after `seconds` or when `process` ends before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is not true after {seconds} seconds"
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)


def end_of(process) -> tuple[int, str]:
    """Waits for a process; its exit status and output."""
    out, _ = process.communicate(timeout=400)
    return process.returncode, out
