"""launch/: local processes, TPU VM hosts behind a stand-in for gcloud, Slurm's script, and the files for GKE and SkyPilot."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from processes import JOB_VARIABLES, free_port, saved_steps
from runs import SMALL

from tinymim_jax import cli
from tinymim_jax.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("env.sh", "local.sh", "slurm.sbatch", "tpu_host.sh", "tpu_vm.sh")]


def environment(**variables) -> dict[str, str]:
    """Outside any job, on one CPU device."""
    outside = {k: v for k, v in os.environ.items() if k not in (*JOB_VARIABLES, "TINYMIM")}
    return outside | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""} | variables


def bash(*words, **variables) -> subprocess.CompletedProcess:
    command = ["bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), cwd=ROOT, timeout=100)


def program(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(condition, process=None, seconds=100) -> None:
    """Waits for a condition, or for the process that should bring it about to fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)


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
    line = (
        f"source launch/env.sh gpu; env | grep -E 'XLA|NCCL'; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    )
    result = bash("-c", line, XLA_FLAGS="--xla_force_host_platform_device_count=2", NCCL_DEBUG="INFO")
    assert result.returncode == 0, result.stderr
    *settings, platform = result.stdout.splitlines()
    assert platform == "cpu"
    values = dict(line.split("=", 1) for line in settings)
    assert values["XLA_FLAGS"].endswith(" --xla_force_host_platform_device_count=2")
    assert (values["NCCL_DEBUG"], values["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("INFO", "0.9")


def test_an_accelerator_that_does_not_start_is_an_error():
    line = "unset JAX_PLATFORMS; source launch/env.sh tpu; echo $JAX_PLATFORMS; source launch/env.sh gpu; echo $JAX_PLATFORMS"
    assert bash("-c", line).stdout.split() == ["tpu,cpu", "tpu,cpu"]


# ---- Processes on this machine

# Ends as it is told: at once, process 1 with a number, at SIGTERM or never.
STUB = """#!/usr/bin/env bash
echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS devices ${JAX_LOCAL_DEVICE_IDS:-all}: $*"
case $1 in
  quick) exit 0 ;;
  fails) [[ $JAX_PROCESS_ID == 1 ]] && exit "$2" ;;
  run) trap 'exit 75' TERM ;;
  stuck) trap '' TERM ;;
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
        process = subprocess.Popen(
            ["bash", LAUNCH / "local.sh", *words],
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


def end_of(process) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_local_processes_know_each_other(local):
    code, out = end_of(local("3", "quick", "a b"))
    assert code == 0
    lines = sorted(out.splitlines())
    assert [line.split(" at ")[0] for line in lines] == [f"process {i} of 3" for i in range(3)]
    assert len({line.split(" at ")[1] for line in lines}) == 1
    assert lines[0].endswith("devices all: quick a b")


@pytest.mark.parametrize("status", [1, 86, 137])
def test_one_failing_process_ends_the_others(local, status):
    code, out = end_of(local("3", "fails", str(status), GRACE="0"))
    assert code == status
    assert f"exit status {status}, 2 did not end by themselves: killed" in out


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


def test_local_gpus_are_dealt_out(tmp_path):
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
    assert "4 GPUs cannot be dealt out evenly to 3 processes" in result.stderr


def test_local_usage():
    assert bash(LAUNCH / "local.sh", "--help").returncode == 0
    for words in ([], ["2"], ["two", "train"]):
        assert bash(LAUNCH / "local.sh", *words).returncode == 2


# ---- TPU VMs

# gcloud with one slice of two hosts: each is a folder, its home; a command is run there as a process of its own.
GCLOUD = """#!{python}
import json, os, pathlib, shutil, signal, subprocess, sys

slice_ = pathlib.Path(os.environ["STAND_IN"])
words = sys.argv[1:]
with open(slice_ / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
assert words[:2] == ["compute", "tpus"], words
group, verb, name = words[2:5]
value = lambda flag: words[words.index(flag) + 1]
hosts = [slice_ / "host0", slice_ / "host1"]
queue, node = slice_ / "queue", slice_ / "node"


def not_found():
    sys.exit(f"ERROR: (gcloud.compute.tpus.{{group}}.{{verb}}) NOT_FOUND: Resource 'projects/p/{{name}}' was not found")


if verb == "describe":
    file = queue if group == "queued-resources" else node
    print(file.read_text() if file.exists() else not_found())
elif verb == "create":
    if queue.exists():
        sys.exit("ALREADY_EXISTS")
    queue.write_text("ACTIVE")
    node.write_text("READY")
    for host in hosts:
        host.mkdir()
elif verb == "delete":
    for path in (queue, node):
        path.unlink(missing_ok=True)
    for host in hosts:
        shutil.rmtree(host)
elif node.read_text() != "READY":
    sys.exit("ssh: connect to host: Connection timed out")
elif verb == "scp":
    for host in hosts:
        shutil.copy(name, host / value("--worker").replace("all", "tinymim.tar.gz"))
elif verb == "ssh":
    chosen = [0, 1] if value("--worker") == "all" else [int(value("--worker"))]
    running = []
    for i in chosen:
        own = {{"HOME": str(hosts[i]), "JAX_PROCESS_ID": str(i)}}
        command = ["bash", "-c", value("--command")]
        running.append(subprocess.Popen(command, cwd=hosts[i], env=os.environ | own))
    sys.exit(max(each.wait() for each in running))
"""

UV = """#!/usr/bin/env bash
echo "$*" >>~/uv_calls
[[ $1 == venv ]] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec "%s" -m tinymim_jax "$@"\\n' "{python}" >.venv/bin/tinymim
chmod +x .venv/bin/tinymim
"""


class Slice:
    """What the stand-in keeps, and a way to take the slice away."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        program(folder / "bin" / "gcloud", GCLOUD.format(python=sys.executable))
        program(folder / "bin" / "uv", UV.format(python=sys.executable))
        self.variables = {
            "STAND_IN": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        }

    def tpu_vm(self, action, *words, **variables):
        command = [LAUNCH / "tpu_vm.sh", action, "--name", "b", "--zone", "z", "--poll", "0.2", *words]
        return bash(*command, **self.variables | variables)

    def start(self, action, *words):
        command = ["bash", LAUNCH / "tpu_vm.sh", action, "--name", "b", "--zone", "z", "--poll", "0.2", *words]
        return subprocess.Popen(
            [*map(str, command)],
            env=environment(**self.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def make(self, tinymim: str, *, queue="ACTIVE", node="READY") -> None:
        """A slice that is there, with this program for tinymim."""
        (self.folder / "queue").write_text(queue)
        (self.folder / "node").write_text(node)
        for i in range(2):
            (self.folder / f"host{i}").mkdir(exist_ok=True)
        self.variables["TINYMIM"] = str(program(self.folder / "program", "#!/usr/bin/env bash\n" + tinymim))

    def calls(self, *wanted) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if all(f'"{word}"' in line for word in wanted)]

    def kill(self) -> None:
        for pid in self.folder.glob("host*/tinymim/background/pid"):
            try:
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                continue

    def preempt(self) -> None:
        (self.folder / "queue").write_text("SUSPENDED")
        (self.folder / "node").write_text("PREEMPTED")
        self.kill()


@pytest.fixture(name="slice_")
def _slice(tmp_path):
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("tpu_vm.sh copies the last commit, and this is no git checkout")
    made = Slice(tmp_path)
    yield made
    made.kill()


def test_two_hosts_train_are_preempted_and_go_on(slice_, tmp_path, data_dir):
    workdir = tmp_path / "shared" / "run"
    small = [*SMALL, "train.duration=24 steps"]
    train = ["train", "--config", "configs/digits.py:finetune", "--workdir", str(workdir), *small]
    process = slice_.start("up", "--type", "v4-16", "--spot", "--delete", "--", *train, "--data_dir", data_dir)
    try:
        until(lambda: any(step >= 2 for step in saved_steps(workdir)), process)
        slice_.preempt()
        code, out = end_of(process)
    finally:
        process.kill()
    assert code == 0, out
    assert (workdir / "result.json").exists()
    assert "2 processes" in out
    assert len(re.findall(r"resuming at step \d+ of 24", out)) == 1, out
    assert len(slice_.calls("queued-resources", "create", "--spot", "v4-16")) == 2
    assert len(slice_.calls("queued-resources", "delete", "--force")) == 2  # of the preempted one, and at the end
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize(
    ("ends", "status", "starts", "message"),
    [
        (["exit 0", "exit 0"], 0, 1, "still exists and is paid for"),
        (["exit 1", "exit 1"], 1, 1, "exited 1"),
        (["exit 1", "kill -KILL $$"], 1, 1, "exited 137"),
        (["[[ -e again ]] || { touch again; exit 75; }"] * 2, 0, 2, "preempted: going on"),
        (["[[ -e again ]] || { touch again; exit 86; }"] * 2, 0, 2, "restart 1 of 2"),
        (["exit 86", "kill -KILL $$"], 1, 3, "given up"),
    ],
)
def test_the_ends_of_all_hosts_decide(slice_, ends, status, starts, message):
    own = '[[ $JAX_PROCESS_ID == 0 ]] && { echo "$@" >>~/starts; %s; exit 0; }; %s\n'
    slice_.make(own % tuple(ends))
    result = slice_.tpu_vm("up", "--restarts", "2", "--", "train", "--workdir", "/shared/a b")
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert (slice_.folder / "host0" / "starts").read_text() == "train --workdir /shared/a b\n" * starts
    assert not slice_.calls("create")
    assert not slice_.calls("delete")


def test_a_preempted_host_that_still_answers_is_no_error(slice_):
    """Its peers end with an error before the service says that it is gone."""
    seen = slice_.folder / "seen"
    slice_.make(f"[[ -e {seen} ]] && exit 0; echo PREEMPTED >{slice_.folder / 'node'}; touch {seen}; exit 1\n")
    (slice_.folder / "node").write_text("READY")
    result = slice_.tpu_vm("up", "--type", "v6e-8", "--", "train", "--workdir", "/a")
    assert result.returncode == 0, result.stderr
    assert len(slice_.calls("create")) == 1


def test_stop_and_go_on(slice_):
    slice_.make("trap 'exit 75' TERM; [[ -e ~/again ]] && exit 0; touch ~/again; while :; do sleep 0.1; done\n")
    process = slice_.start("up", "--", "train", "--workdir", "/a")
    until(lambda: len(list(slice_.folder.glob("host*/again"))) == 2, process)
    assert "running" in slice_.tpu_vm("status").stdout
    again = slice_.tpu_vm("run", "--", "train", "--workdir", "/a")
    assert again.returncode != 0
    assert "still running" in again.stderr
    assert slice_.tpu_vm("stop").returncode == 0
    code, out = end_of(process)
    assert code == 75, out
    assert "stopped: the same line goes on" in out
    assert slice_.tpu_vm("status").stdout.count("tinymim: stopped") == 2
    assert slice_.tpu_vm("up", "--", "train", "--workdir", "/a").returncode == 0
    assert slice_.tpu_vm("delete").returncode == 0
    assert not (slice_.folder / "queue").exists()


def test_what_is_copied_and_installed(slice_):
    slice_.make("exit 0\n")
    result = slice_.tpu_vm("install")
    assert result.returncode == 0, result.stderr
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    assert ("not committed, so not copied" in result.stderr) == bool(changed)
    for host in (slice_.folder / "host0", slice_.folder / "host1"):
        calls = (host / "uv_calls").read_text().splitlines()
        assert calls[-1] == "pip install --quiet --constraint requirements.txt --editable .[tpu,gcs]"
        assert (host / "tinymim" / "tinymim_jax" / "train.py").exists()


def test_errors_before_anything_is_started(slice_):
    def refused(action, *words, **variables):
        result = slice_.tpu_vm(action, *words, **variables)
        assert result.returncode == 1
        return result.stderr

    assert "no command" in refused("up")
    assert "--colour is unknown" in refused("status", "--colour")
    assert "fly is none of up, create" in refused("fly")
    assert "--type says what to create" in refused("up", "--", "train", "--workdir", "/a")
    assert "other hosts do not see it" in refused("up", "--", "train", "--workdir", "runs/b")
    program(slice_.folder / "bin" / "gcloud", "#!/bin/sh\necho 'ERROR: PERMISSION_DENIED' >&2; exit 1\n")
    assert "PERMISSION_DENIED" in refused("up", "--type", "v4-8", "--", "train", "--workdir", "/a")
    slice_.make("", node="STOPPED")
    program(slice_.folder / "bin" / "gcloud", GCLOUD.format(python=sys.executable))
    assert "tpu-vm start b" in refused("up", "--", "train", "--workdir", "/a")
    (slice_.folder / "queue").write_text("FAILED")
    gcloud = GCLOUD.replace('write_text("ACTIVE")', 'write_text("FAILED")')
    program(slice_.folder / "bin" / "gcloud", gcloud.format(python=sys.executable))
    assert "lost or refused 3 times" in refused("up", "--type", "v4-8", "--", "train", "--workdir", "/a")


def test_dry_run_prints_the_calls_of_gcloud_and_makes_none(tmp_path):
    gcloud = program(tmp_path / "bin" / "gcloud", "#!/bin/sh\nexit 99\n")
    variables = {"PATH": f"{gcloud.parent}:{os.environ['PATH']}"}
    slice_words = ["--name", "b", "--zone", "z", "--project", "p", "--dry_run"]
    up = ["--type", "v5litepod-16", "--spot", "--delete", "--setup", "mount /data", "--", "train", "--config", "a b.py"]
    result = bash(LAUNCH / "tpu_vm.sh", "up", *slice_words, *up, **variables)
    assert result.returncode == 0, result.stderr
    calls = [shlex.split(line) for line in result.stdout.splitlines()]
    assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
    assert all(call[-5:] == ["--zone", "z", "--project", "p", "--quiet"] for call in calls)
    (create,) = [call for call in calls if "create" in call]
    assert create[create.index("--runtime-version") + 1] == "v2-alpha-tpuv5-lite"
    (start,) = [call for call in calls if "tpu_host.sh start" in " ".join(call)]
    assert "{ mount /data; } && tinymim/launch/tpu_host.sh start train --config a\\ b.py" in start
    assert "delete" in calls[-1]
    for action in ("create", "install", "logs", "status", "stop", "delete"):
        result = bash(LAUNCH / "tpu_vm.sh", action, *slice_words, "--type", "v4-8", **variables)
        assert result.returncode == 0
        assert result.stdout.startswith("gcloud compute tpus ")


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
    result = subprocess.run(
        command, env=environment(**settings | variables), cwd=tmp_path, capture_output=True, text=True
    )
    read = [
        path.read_text().splitlines() if path.exists() else []
        for path in (tmp_path / "srun_words", tmp_path / "scontrol_words")
    ]
    return result.returncode, *read


def test_a_slurm_array_runs_the_points_of_a_sweep(tmp_path):
    words = ["sweep", "configs/digits.py:finetune", "--workdir", "a b"]
    code, srun, scontrol = sbatch(tmp_path, 0, *words, SLURM_ARRAY_TASK_ID="7")
    assert (code, scontrol) == (0, [])
    assert "--cpus-per-task=3" in srun
    options = cli._parse(srun[srun.index("tinymim") + 1 :])
    assert (options.command, options.index, options.workdir) == ("sweep", 7, "a b")


def test_what_slurm_queues_again(tmp_path):
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


# ---- Files for other engines; their schemas' own validators are not needed to run these tests


def jobset(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def only(values):
    (value,) = values
    return value


# Spelt as in JobSet's and Kubernetes' definitions, where a key that is unknown is dropped in silence.
KEYS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"failurePolicy", "replicatedJobs"},
    "spec.failurePolicy": {"maxRestarts", "rules"},
    "spec.failurePolicy.rules": {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"},
    "spec.replicatedJobs": {"name", "replicas", "template"},
    "spec.replicatedJobs.template": {"spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template"
    },
    "spec.replicatedJobs.template.spec.podFailurePolicy": {"rules"},
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules": {"action", "onPodConditions", "onExitCodes"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset_gpu.yaml"])
def test_jobset_keys(name):
    def check(node, path):
        for item in node if isinstance(node, list) else [node]:
            assert set(item) <= KEYS[path], path
            for key, value in item.items():
                if (below := f"{path}.{key}".strip(".")) in KEYS:
                    check(value, below)

    check(jobset(name), "")


def action_of_jobset(spec: dict, exit_code: int | None) -> str:
    """What the controllers of Job and JobSet do when a pod ends so; None: its node is taken away."""
    job = only(spec["replicatedJobs"])["template"]["spec"]
    container = only(job["template"]["spec"]["containers"])["name"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    assert job["backoffLimit"] == 0
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and exit_code in codes["values"]:
            assert (codes["containerName"], codes["operator"]) == (container, "In")
            end = f"failed with exit code {exit_code} matching {rule['action']} rule at index {i}"
            reason, message = "PodFailurePolicy", f"Container {container} for pod default/tinymim-0 {end}"
            break
        if conditions and exit_code is None:
            assert conditions == [{"type": "DisruptionTarget", "status": "True"}]
            end = f"has condition DisruptionTarget matching {rule['action']} rule at index {i}"
            reason, message = "PodFailurePolicy", f"Pod default/tinymim-0 {end}"
            break
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset_gpu.yaml"])
def test_jobset_restarts(name):
    spec = jobset(name)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    actions = {code: action_of_jobset(spec, code) for code in (1, 2, 75, 86, 134, 137, None)}
    for code in (1, 2):
        assert actions.pop(code) == "FailJobSet"
    for code in (75, None):
        assert actions.pop(code) == "RestartJobSetAndIgnoreMaxRestarts"
    assert set(actions.values()) == {"RestartJobSet"}


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset_gpu.yaml"])
def test_jobset_command_and_processes(name):
    whole = jobset(name)
    replicated = only(whole["spec"]["replicatedJobs"])
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = only(pod["containers"])
    assert job["parallelism"] == job["completions"]
    assert (job["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    options = cli._parse(container["args"])
    load_config(options.config, options.overrides)
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert options.workdir.startswith("/data/")
    assert "/data" in mounted
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    if name == "jobset.yaml":
        assert variables["PLATFORM"] == "tpu"
        return
    assert variables["PLATFORM"] == "gpu"
    assert int(variables["JAX_NUM_PROCESSES"]) == job["completions"] * replicated["replicas"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{whole['metadata']['name']}-{replicated['name']}-0-0.{whole['metadata']['name']}"
    assert int(port) in {entry["containerPort"] for entry in container["ports"]}


def test_the_image_starts_tinymim(tmp_path):
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)[1])
    shown = program(tmp_path / "tinymim", '#!/bin/sh\necho $NCCL_DEBUG\nprintf "%s\\n" "$@"\n')
    variables = environment(PLATFORM="gpu", TINYMIM=str(shown))
    command = [*entry, "train", "--config", "a b.py"]
    result = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["WARN", "train", "--config", "a b.py"]


def test_sky_yaml(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "use_spot", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 3}
    options = cli._parse(task["envs"]["COMMAND"].split())
    load_config(options.config, options.overrides)
    assert only(path for path in task["file_mounts"] if options.workdir.startswith(path + "/"))
    assert all(isinstance(value, str) for value in task["envs"].values())
    for part in ("setup", "run"):
        assert bash("-n", program(tmp_path / part, task[part])).returncode == 0
    shown = program(tmp_path / "tinymim", '#!/bin/sh\nenv | grep "^JAX_[CNP]"\necho "$@"\n')
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    result = bash(tmp_path / "run", **task["envs"], **nodes, TINYMIM=str(shown))
    *settings, words = result.stdout.splitlines()
    expected = {"JAX_COORDINATOR_ADDRESS=10.0.0.1:8482", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"}
    assert expected <= set(settings)
    assert words == task["envs"]["COMMAND"]
