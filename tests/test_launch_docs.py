"""docs/launch.md: every command that it shows is sound, and none is started."""

import os
import pathlib
import re
import shlex

import pytest
import yaml
from scripts import LAUNCH, ROOT, bash

from tinymim_jax.cli import main as cli
from tinymim_jax.config import load_config
from tinymim_jax.sweeps.points import make_runs, parse_overrides, read_stages

TEXT = (ROOT / "docs" / "launch.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def check_tinymim(words: list[str], workdir: pathlib.Path, *, alone: bool = True) -> None:
    """It parses, and its experiment loads; not `alone`: its workdir is where all processes see it."""
    options = cli._parse(words)
    if getattr(options, "config", None):
        load_config(options.config, options.overrides)
    if options.command == "sweep":
        assert make_runs(read_stages(options.file), workdir, parse_overrides(options.overrides))
    assert alone or options.workdir.startswith("/")


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: "_".join(line.split()[:2]))
def test_command(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(line)
    if name == "tinymim":
        check_tinymim(words, tmp_path)
    elif name == "launch/local.sh":
        result = bash(ROOT / name, "--dry_run", *words, PATH=_without_gpus(tmp_path))
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == int(words[0])
        check_tinymim(words[1:], tmp_path)
    elif name == "launch/tpu_vm.sh":
        result = bash(ROOT / name, words[0], "--dry_run", *words[1:])
        assert result.returncode == 0, result.stderr
        assert "other hosts do not see it" not in result.stderr
        assert result.stdout.startswith("gcloud ")
        if "--" in words:
            check_tinymim(words[words.index("--") + 1 :], tmp_path, alone=False)
    elif name == "sbatch":
        script = words.index("launch/slurm.sbatch")
        known = set(re.findall(r"#SBATCH (--[\w-]+)", (LAUNCH / "slurm.sbatch").read_text())) | {"--array"}
        assert {word.split("=")[0] for word in words[:script]} <= known
        index = ["--index", "0"] if any(word.startswith("--array") for word in words) else []  # the script adds it
        check_tinymim([*words[script + 1 :], *index], tmp_path)
    elif name in ("kubectl", "docker", "git"):
        for file in re.findall(r"launch/[\w.]+", line):
            assert (ROOT / file).exists()
        if name == "kubectl" and "apply" not in words:
            for file in ("jobset.yaml", "jobset_gpu.yaml"):
                assert yaml.safe_load((LAUNCH / file).read_text())["metadata"]["name"] in re.split("[ =,]", line)
    elif name == "sky":
        if "launch" in words:
            assert words[:2] == ["jobs", "launch"]
            task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
            variable, command = words[words.index("--env") + 1].split("=", 1)
            assert variable in task["envs"]
            check_tinymim(command.split(), tmp_path, alone=False)
    else:
        pytest.fail(f"nobody checks {line}")


def test_the_engines_and_scripts_are_all_shown():
    assert {line.split()[0] for line in COMMANDS} >= {"launch/local.sh", "launch/tpu_vm.sh", "sbatch", "kubectl", "sky"}
    for path in LAUNCH.iterdir():
        assert f"launch/{path.name}" in TEXT or path.name == "tpu_host.sh"


def test_every_action_of_tpu_vm_is_shown():
    text = (LAUNCH / "tpu_vm.sh").read_text()
    actions = re.findall(r"^#   (\w+) {2,}", text.split("# Actions:")[1].split("# Options:")[0], re.MULTILINE)
    assert len(actions) == 8
    shown = {line.split()[1] for line in COMMANDS if line.startswith("launch/tpu_vm.sh")}
    assert shown == set(actions)


def _without_gpus(folder: pathlib.Path) -> str:
    """A PATH on which nvidia-smi finds nothing: the command is for a machine with eight."""
    stub = folder / "nvidia-smi"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
