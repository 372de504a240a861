"""Trainings of several processes with injected faults, for tests and soak.py."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from processes import JOB_VARIABLES, cpu_devices, free_port
from runs import SMALL

ROOT = pathlib.Path(__file__).parents[1]

# A `tinymim` process with a fault: FAULT=KIND:STEP:PROCESS[:PROCESS...] in the environment says which, before which
# step's batch is transferred, and in which processes of the job.
CHILD = """
import os, signal, sys, time
kind, _, where = os.environ.get("FAULT", "").partition(":")
if kind and os.environ.get("JAX_PROCESS_ID", "0") in where.split(":")[1:]:
    import tinymim_jax.train as loop
    place, when = loop.place_batch, int(where.split(":")[0])
    calls = []
    def place_batch(mesh, batch):
        calls.append(1)
        if len(calls) == when:
            print("FAULT", kind, flush=True)
            if kind == "raise":
                raise KeyError("a mistake on one host")
            if kind == "hang":
                # From now on the process counts as stalled after three seconds instead of half an hour.
                import gc
                from tinymim_jax.runtime.heartbeat import Heartbeat
                for heart in (each for each in gc.get_objects() if isinstance(each, Heartbeat)):
                    heart._stall_seconds = 3
                time.sleep(1e6)
            if kind == "worker":
                import multiprocessing
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            if kind == "full":
                import resource
                # Files larger than this cannot be written: smaller than a checkpoint's arrays, larger than any log.
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if kind == "clock":
                now = time.time
                time.time = lambda: now() - 86400
        return place(mesh, batch)
    loop.place_batch = place_batch
if __name__ == "__main__":
    from tinymim_jax.cli.main import main
    main(sys.argv[1:])
"""


class Job:
    """One attempt at a run: `processes` processes with `devices` CPU devices each, training in `workdir`.

    A context manager that kills what is left at its end. The output of each process goes to a file of its own.
    words: further arguments of the command. fault: the FAULT variable, see CHILD.
    """

    def __init__(self, workdir, data_dir, *words, processes=2, devices=4, fault="", fsdp=1, command="train"):
        self._folder = tempfile.TemporaryDirectory(prefix="tinymim-job-")
        script = pathlib.Path(self._folder.name) / "child.py"
        script.write_text(CHILD)
        environment = {k: v for k, v in os.environ.items() if k not in JOB_VARIABLES} | cpu_devices(devices)
        environment |= {"PYTHONPATH": str(ROOT), "FAULT": fault}
        if processes > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
        where = ["--config", "configs/digits.py:finetune", "--workdir", workdir]
        options = ["--data_dir", data_dir, "--compile_cache", "", *(["--fsdp", fsdp] if command == "train" else [])]
        if command != "train":
            where = [workdir]
        line = [sys.executable, "-u", script, command, *where, *options, *words]
        self.logs = [pathlib.Path(self._folder.name) / f"{p}.log" for p in range(processes)]
        self.processes = []
        for number, log in enumerate(self.logs):
            own = environment | ({"JAX_PROCESS_ID": str(number)} if processes > 1 else {})
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen([str(w) for w in line], cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def text(self, process=0):
        """The output of a process so far."""
        return self.logs[process].read_text(errors="replace")

    def wait_for(self, words, process=0, timeout=200):
        """Waits until a process has printed `words`; False if it ends before that."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            running = self.processes[process].poll() is None
            if words in self.text(process):
                return True
            if not running:
                return False
            time.sleep(0.05)
        raise TimeoutError(f"{words!r} was not printed:\n{self.text(process)}")

    def send(self, number, process=0):
        """Sends a signal to one process, if it is running."""
        if self.processes[process].poll() is None:
            self.processes[process].send_signal(number)

    def ended(self, timeout=200):
        """Waits for all processes; returns their exit statuses and the seconds that this took."""
        began = time.monotonic()
        codes = [process.wait(timeout=max(1.0, timeout - (time.monotonic() - began))) for process in self.processes]
        return codes, time.monotonic() - began


def tiny(*overrides):
    """Overrides that make configs/digits.py:finetune take seconds; of equal keys the last one counts."""
    words = dict(word.split("=", 1) for word in (*SMALL, "model.depth=1", "model.embed_dim=32", *overrides))
    return [f"{key}={value}" for key, value in words.items()]


def saved_steps(workdir):
    """Steps of a run's complete checkpoints, ascending."""
    folder = pathlib.Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def final_bits(workdir):
    """The step of the newest checkpoint and digests of its arrays, optimizer included; equal for equal states."""
    step = saved_steps(workdir)[-1]
    path = pathlib.Path(workdir) / "checkpoints" / str(step) / "manifest" / "metadata"
    return {"step": step} | {name: leaf[2] for name, leaf in json.loads(path.read_text())["leaves"].items()}
