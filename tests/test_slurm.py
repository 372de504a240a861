"""launch/slurm.sbatch with a real Slurm: slurmctld, slurmd and munge on this machine, in a temporary folder.

As root, where Debian's slurmctld, slurmd and munge are installed:

    TINYMIM_TEST_SLURM=1 python -m pytest tests/test_slurm.py
"""

import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time

import pytest
from processes import JOB_VARIABLES, free_port, saved_steps
from runs import SMALL

ROOT = pathlib.Path(__file__).parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd")

pytestmark = pytest.mark.skipif(not os.environ.get("TINYMIM_TEST_SLURM"), reason="only with TINYMIM_TEST_SLURM=1")

CONFIGURATION = """
ClusterName=tinymim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=10
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 Gres=gpu:{cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Slurm with one node, whose GPUs exist in its configuration only."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        settings = {"folder": folder, "host": host, "cores": max(os.cpu_count() or 1, 2)}
        settings |= {"controller": free_port(), "daemon": free_port()}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
        (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-{settings['cores'] - 1}]\n")
        for i in range(settings["cores"]):
            (folder / f"gpu{i}").touch()
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        outside = {k: v for k, v in os.environ.items() if k not in JOB_VARIABLES and not k.startswith("SLURM")}
        tinymim = folder / "tinymim"
        tinymim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinymim_jax "$@"\n')
        tinymim.chmod(0o755)
        self.variables = outside | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "JAX_PLATFORMS": "cpu",
            "TINYMIM": str(tinymim),
        }
        self.daemons = []

    def start(self) -> None:
        folder = self.folder
        munge = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
        munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", "--force", "--foreground"]
        self.daemons.append(subprocess.Popen(["munged", *munge]))
        wait_for(lambda: (folder / "munge.socket").exists())
        for daemon in (["slurmctld", "-D"], ["slurmd", "-D"]):
            output = open(folder / f"{daemon[0]}.out", "w")  # noqa: SIM115, the daemon's own
            self.daemons.append(subprocess.Popen(daemon, env=self.variables, stdout=output, stderr=output))
        wait_for(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T", check=False))

    def run(self, *words, check=True) -> str:
        result = subprocess.run(
            [*map(str, words)], env=self.variables, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0 or not check, result.stderr
        return result.stdout

    def submit(self, *words) -> str:
        return self.run(
            "sbatch", "--parsable", f"--output={self.folder}/%A_%a.log", "--cpus-per-task=1", *words
        ).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", number)))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def states(self, number: str) -> list[str]:
        """Of all jobs of an array."""
        return re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", number))

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*_*.log")))

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
        # Files that slurm.sbatch leaves in the folder that jobs are submitted from.
        for path in ROOT.glob("slurm-*.crashes"):
            path.unlink()


def wait_for(condition, seconds=240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory):
    missing = [name for name in DAEMONS if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.fail(f"needs root and {', '.join(DAEMONS)}; missing: {', '.join(missing) or 'root'}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_two_tasks_train_are_signalled_requeue_themselves_and_resume(cluster, tmp_path, data_dir):
    workdir = tmp_path / "run"
    small = [*SMALL, "train.duration=40 steps"]
    words = ["train", "--config", "configs/digits.py:finetune", "--workdir", workdir, "--data_dir", data_dir, *small]
    script = ["--gpus-per-node=2", "--ntasks-per-node=2", "launch/slurm.sbatch"]
    number = cluster.submit(*script, *words)
    wait_for(
        lambda: any(step >= 2 for step in saved_steps(workdir)) or cluster.state(number) not in ("PENDING", "RUNNING")
    )
    assert cluster.state(number) == "RUNNING", cluster.log()
    cluster.run("scancel", "--signal=TERM", number)  # what --signal=TERM@300 does: to the tasks, not to the script
    wait_for(lambda: cluster.job(number)["Restarts"] == "1" or cluster.state(number) == "FAILED")
    assert cluster.job(number)["Restarts"] == "1", cluster.log()
    assert not (workdir / "result.json").exists()
    steps = max(saved_steps(workdir))
    # Slurm holds a job that was queued again for two minutes.
    wait_for(lambda: cluster.state(number) == "PENDING")
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    wait_for(lambda: cluster.state(number) in ("COMPLETED", "FAILED"))
    assert cluster.state(number) == "COMPLETED", cluster.log()
    assert (workdir / "result.json").exists()
    assert "all 2 processes" in cluster.log()
    assert f"resuming at step {steps} of 40" in cluster.log()


def test_an_error_is_not_queued_again(cluster, tmp_path):
    script = ["--gpus-per-node=1", "--ntasks-per-node=1", "launch/slurm.sbatch"]
    number = cluster.submit(*script, "train", "--config", "configs/nothing.py", "--workdir", tmp_path)
    wait_for(lambda: cluster.state(number) not in ("PENDING", "RUNNING", "COMPLETING"))
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "1:0")


def test_a_killed_task_is_queued_again(cluster, tmp_path, data_dir):
    """After kill -9, as by the OOM killer; the other task ends too."""
    workdir = tmp_path / "run"
    small = [*SMALL, "train.duration=4000 steps"]
    words = ["train", "--config", "configs/digits.py:finetune", "--workdir", workdir, "--data_dir", data_dir, *small]
    number = cluster.submit("--gpus-per-node=2", "--ntasks-per-node=2", "launch/slurm.sbatch", *words)
    wait_for(lambda: bool(saved_steps(workdir)) or cluster.state(number) == "FAILED")
    assert cluster.state(number) == "RUNNING", cluster.log()
    (victim, *_) = [
        pid for pid in pathlib.Path("/proc").glob("[0-9]*") if _is_task(pid, str(workdir)) and _rank(pid) == "1"
    ]
    os.kill(int(victim.name), 9)
    wait_for(lambda: cluster.job(number)["Restarts"] == "1" or cluster.state(number) == "FAILED")
    assert cluster.job(number)["Restarts"] == "1", cluster.log()
    cluster.run("scancel", number)
    wait_for(lambda: cluster.state(number) == "CANCELLED")


def test_a_sweep_as_an_array(cluster, tmp_path, data_dir):
    words = ["sweep", "configs/digits.py:finetune", "--workdir", tmp_path / "sweep", "--data_dir", data_dir, *SMALL]
    script = ["--array=0-1", "--gpus-per-node=1", "--ntasks-per-node=1", "launch/slurm.sbatch"]
    number = cluster.submit(*script, *words)
    ended = ("COMPLETED", "FAILED")
    wait_for(lambda: all(state in ended for state in cluster.states(number)))
    results = sorted((tmp_path / "sweep").glob("*/result.json"))
    assert len(results) == 2, cluster.log()
    rates = [json.loads((path.parent / "config.json").read_text())["optim"]["base_lr"] for path in results]
    assert rates == [1.6e-2, 3.2e-2]
    assert cluster.states(number) == ["COMPLETED"] * 2


def _is_task(process: pathlib.Path, workdir: str) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "tinymim_jax" in words and workdir in words


def _rank(process: pathlib.Path) -> str:
    variables = (process / "environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in variables).get("SLURM_PROCID", "")
