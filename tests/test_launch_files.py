"""launch/: the files for GKE and SkyPilot, by hand: their schemas belong to packages that these tests do without."""

import json
import re
import subprocess

import pytest
import yaml
from scripts import LAUNCH, ROOT, bash, environment, program

from tinymim_jax.cli import main as cli
from tinymim_jax.config import load_config


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
