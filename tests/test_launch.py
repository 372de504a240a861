"""launch/: the environment, processes on this machine, Slurm's script."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from scripts import LAUNCH, bash, end_of, environment, program, until

from tinymim_jax.cli import main as cli

SCRIPTS = [LAUNCH / name for name in ("env.sh", "local.sh", "slurm.sbatch", "tpu_host.sh", "tpu_vm.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound_bash(script):
    assert bash("-n", script).returncode == 0


def test_every_file_is_known():
    others = {"Dockerfile", "jobset.yaml", "jobset_gpu.yaml", "sky.yaml"}
    assert {path.name for path in LAUNCH.iterdir()} == {path.name for path in SCRIPTS} | others


# ---- The environment


def test_jaxlib_knows_the_flags():
    """An unknown flag ends the process."""
    code = "import jax; print(jax.devices()[0].platform)"
    line = f"source launch/env.sh gpu; env | grep -E 'XLA|NCCL'; exec {sys.executable} -c '{code}'"
    result = bash("-c", line, XLA_FLAGS="--xla_force_host_platform_device_count=2", NCCL_DEBUG="INFO")
    assert result.returncode == 0, result.stderr
    *settings, platform = result.stdout.splitlines()
    assert platform == "cpu"
    values = dict(line.split("=", 1) for line in settings)
    assert values["XLA_FLAGS"].endswith(" --xla_force_host_platform_device_count=2")
    assert (values["NCCL_DEBUG"], values["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("INFO", "0.9")


def test_an_accelerator_that_does_not_start_is_an_error():
    for platform, expected in (("tpu", "tpu,cpu"), ("gpu", "cuda,cpu"), ("cpu", "")):
        line = f"unset JAX_PLATFORMS; source launch/env.sh {platform}; echo $JAX_PLATFORMS"
        assert bash("-c", line).stdout.strip() == expected


# ---- Processes on this machine


def heed_signals():
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def is_running(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"  # ended, but its new parent has not asked yet


# Ends as it is told: at once, process 1 with a number, at SIGTERM or never.
STUB = """#!/usr/bin/env bash
echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS ${JAX_LOCAL_DEVICE_IDS:-all}: $*"
case $1 in
  quick) exit 0 ;;
  fails) [[ $JAX_PROCESS_ID == 1 ]] && exit "$2" ;;
  run) trap 'exit 75' TERM ;;
  stuck) trap '' TERM ;;
  python) exec "$2" -c "$3" ;;
esac
touch "$MARKS/$JAX_PROCESS_ID"
while :; do sleep 0.1; done
"""


@pytest.fixture(name="local")
def _local(tmp_path):
    """local.sh with the stub for tinymim, started."""
    stub = program(tmp_path / "tinymim", STUB)
    (tmp_path / "marks").mkdir()
    started = []

    def start(*words, **variables):
        settings = {"TINYMIM": str(stub), "MARKS": str(tmp_path / "marks")} | variables
        # In a shell's background jobs SIGINT is ignored and under nohup SIGHUP, by these tests' children too.
        process = subprocess.Popen(
            ["bash", LAUNCH / "local.sh", *words],
            preexec_fn=heed_signals,
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def test_local_processes_know_each_other(local):
    code, out = end_of(local("3", "quick", "a b"))
    assert code == 0
    lines = sorted(out.splitlines())
    assert [line.split(" at ")[0] for line in lines] == [f"process {i} of 3" for i in range(3)]
    assert len({line.split(" at ")[1] for line in lines}) == 1
    assert lines[0].endswith(" all: quick a b")


@pytest.mark.parametrize("status", [1, 86, 137])
def test_one_failing_process_ends_the_others(local, status):
    code, out = end_of(local("3", "fails", str(status), GRACE="0"))
    assert code == status
    assert f"exit status {status}; 2 others did not end by themselves and are killed" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_local_processes(local, tmp_path, number):
    process = local("2", "run")
    until(lambda: len(list((tmp_path / "marks").iterdir())) == 2, process)
    os.kill(process.pid, number)
    assert end_of(process)[0] == 75


def test_the_second_interrupt_acts_at_once(local, tmp_path):
    process = local("2", "stuck")
    until(lambda: len(list((tmp_path / "marks").iterdir())) == 2, process)
    # A signal that comes while the one before is being dealt with counts once: repeat it.
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert end_of(process)[0] == 137


def test_processes_end_when_the_script_is_killed(local, tmp_path):
    code = """
import os, time
from tinymim_jax.runtime.parent import end_with_parent_of_environment
end_with_parent_of_environment()
open(f"{os.environ['MARKS']}/{os.getpid()}", "w").close()
time.sleep(1e6)
"""
    process = local("2", "python", sys.executable, code, PYTHONPATH=str(LAUNCH.parent))
    until(lambda: len(list((tmp_path / "marks").iterdir())) == 2, process)
    started = [int(path.name) for path in (tmp_path / "marks").iterdir()]
    process.kill()
    until(lambda: not any(is_running(pid) for pid in started), seconds=60)


def test_gpus_are_divided_among_local_processes(tmp_path):
    program(tmp_path / "nvidia-smi", "#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i; done\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    lines = bash(LAUNCH / "local.sh", "--dry_run", 2, "train", "--config", "a b.py", PATH=path).stdout.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines):
        words = shlex.split(line)
        assert {f"JAX_PROCESS_ID={i}", "JAX_NUM_PROCESSES=2"} <= set(words)
        assert f"JAX_LOCAL_DEVICE_IDS={2 * i},{2 * i + 1}" in words
        assert words[-3:] == ["train", "--config", "a b.py"]
    result = bash(LAUNCH / "local.sh", "--dry_run", 3, "train", PATH=path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "4 GPUs cannot be divided evenly among 3 processes" in result.stderr


def test_a_broken_nvidia_smi_is_no_gpu(tmp_path):
    program(tmp_path / "nvidia-smi", "#!/bin/sh\necho NVIDIA-SMI has failed.\necho\nexit 9\n")
    for processes in (2, 3):
        words = ["--dry_run", processes, "train", "--config", "x"]
        result = bash(LAUNCH / "local.sh", *words, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert (result.returncode, len(result.stdout.splitlines())) == (0, processes)
        assert "JAX_LOCAL_DEVICE_IDS" not in result.stdout
        assert "nvidia-smi lists no GPU" in result.stderr


def test_local_usage():
    assert bash(LAUNCH / "local.sh", "--help").returncode == 0
    for words in ([], ["2"], ["two", "train"]):
        assert bash(LAUNCH / "local.sh", *words).returncode == 2


# ---- Slurm (tests/test_slurm.py runs it for real)


def sbatch(tmp_path, status: int, *words, **variables):
    """(exit status, srun's words, scontrol's words) of slurm.sbatch when the tasks end with `status`."""
    for name, code in (("srun", status), ("scontrol", 0)):
        program(tmp_path / name, f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/{name}_words\nexit {code}\n')
        (tmp_path / f"{name}_words").unlink(missing_ok=True)
    (tmp_path / "launch").mkdir(exist_ok=True)
    shutil.copy(LAUNCH / "env.sh", tmp_path / "launch")
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "3"}
    command = ["bash", LAUNCH / "slurm.sbatch", *words]
    variables = environment(**settings | variables)
    result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    written = [tmp_path / "srun_words", tmp_path / "scontrol_words"]
    return result.returncode, *[path.read_text().splitlines() if path.exists() else [] for path in written]


def test_a_slurm_array_runs_the_points_of_a_sweep(tmp_path):
    words = ["sweep", "configs/digits.py:finetune", "--workdir", "a b"]
    code, srun, scontrol = sbatch(tmp_path, 0, *words, SLURM_ARRAY_TASK_ID="7")
    assert (code, scontrol) == (0, [])
    assert "--cpus-per-task=3" in srun
    options = cli._parse(srun[srun.index("tinymim") + 1 :])
    assert (options.command, options.index, options.workdir) == ("sweep", 7, "a b")


def test_what_slurm_requeues(tmp_path):
    assert sbatch(tmp_path, 1, "train")[2] == []
    for _ in range(5):
        assert sbatch(tmp_path, 75, "train")[2] == ["requeue", "12"]
    for status, again in ((86, True), (137, True), (134, False)):
        code, _, scontrol = sbatch(tmp_path, status, "train", RESTARTS="2")
        assert code == status
        assert scontrol == (["requeue", "12"] if again else [])
    assert len((tmp_path / "slurm-12.crashes").read_text().splitlines()) == 3
    assert sbatch(tmp_path, 0, "train")[0] == 0
    assert not (tmp_path / "slurm-12.crashes").exists()


def test_slurm_dry_run():
    words = shlex.split(bash(LAUNCH / "slurm.sbatch", "--dry_run", "train", "--config", "a b.py").stdout)
    assert words[0] == "srun"
    assert words[-3:] == ["train", "--config", "a b.py"]
