"""launch/tpu_vm.sh with a slice of two hosts, which a stand-in for gcloud simulates on this machine."""

import functools
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
from processes import free_port, saved_steps
from runs import SMALL
from scripts import LAUNCH, ROOT, bash, end_of, environment, program, until

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
    """The state of the stand-in, and a way to preempt the slice."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.started = []
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
        process = subprocess.Popen(
            [*map(str, command)],
            env=environment(**self.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # In a shell's background jobs SIGINT is ignored, by their children too, these tests perhaps among them.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def make(self, tinymim: str, *, queue="ACTIVE", node="READY") -> None:
        """Creates the slice, with this program as tinymim."""
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
    head = ["git", "rev-parse", "HEAD"]
    if not shutil.which("git") or subprocess.run(head, cwd=ROOT, capture_output=True).returncode:
        pytest.skip("tpu_vm.sh copies the last commit, and this is no git checkout")
    made = Slice(tmp_path)
    yield made
    for process in made.started:
        process.kill()
    made.kill()


@pytest.mark.slow
def test_two_hosts_train_are_preempted_and_go_on(slice_, tmp_path, data_dir):
    workdir = tmp_path / "shared" / "run"
    up = ["--type", "v4-16", "--spot", "--delete", "--poll", "1"]
    small = [*SMALL, "train.duration=24 steps"]
    train = ["train", "--config", "configs/digits.py:finetune", "--workdir", str(workdir), *small]
    process = slice_.start("up", *up, "--", *train, "--data_dir", data_dir)
    until(lambda: any(step >= 2 for step in saved_steps(workdir)), process)
    slice_.preempt()
    code, out = end_of(process)
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
    """The other hosts fail before the service reports the preemption."""
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
    while process.poll() is None:  # Ctrl-C while it starts the command is for what it starts
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, out = end_of(process)
    assert code == 130, out
    assert "the command goes on" in out
    assert slice_.tpu_vm("status").stdout.count("tinymim: running") == 2
    followed = len(slice_.calls("tinymim/launch/tpu_host.sh log"))
    process = slice_.start("up", "--", "train", "--workdir", "/a")
    until(lambda: len(slice_.calls("tinymim/launch/tpu_host.sh log")) > followed, process)
    assert len(slice_.calls("tinymim/launch/tpu_host.sh start train --workdir /a")) == 1
    again = slice_.tpu_vm("run", "--", "train", "--workdir", "/a")
    assert again.returncode != 0
    assert "still running" in again.stderr
    assert slice_.tpu_vm("stop").returncode == 0
    code, out = end_of(process)
    assert code == 75, out
    assert "stopped: the same line resumes" in out
    assert slice_.tpu_vm("status").stdout.count("tinymim: stopped") == 2
    assert slice_.tpu_vm("up", "--", "train", "--workdir", "/a").returncode == 0
    assert slice_.tpu_vm("delete").returncode == 0
    assert not (slice_.folder / "queue").exists()


def test_create_waits(slice_):
    gcloud = GCLOUD.replace('write_text("ACTIVE")', 'write_text("WAITING_FOR_RESOURCES")').replace(
        'node.write_text("READY")', "pass"
    )
    program(slice_.folder / "bin" / "gcloud", gcloud.format(python=sys.executable))
    process = slice_.start("create", "--type", "v5p-8", "--wait")
    until(lambda: (slice_.folder / "queue").exists() and len(slice_.calls("describe")) >= 4, process)
    (slice_.folder / "node").write_text("READY")
    (slice_.folder / "queue").write_text("ACTIVE")
    code, out = end_of(process)
    assert code == 0, out
    assert "b is pending" in out
    assert len(slice_.calls("create")) == 1


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
    assert "give --type to create one" in refused("up", "--", "train", "--workdir", "/a")
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
