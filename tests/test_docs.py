"""Every command of README.md, docs/, benchmarks/README.md, configs/ and `tinymim COMMAND --help` is one that works.

Checked without running it: it parses, its config and overrides load, its sweep or chain can be planned, launchers print
what they would run, scripts have the flags, packages the extras. What small data and two cores allow is run in
test_readme.py, test_sweep.py, test_chain.py, test_benchmark_step.py and test_benchmark_input.py.
"""

import os
import pathlib
import re
import shlex
import tomllib

import pytest
import yaml
from commands import DOCUMENTS, ROOT, shown_in
from scripts import LAUNCH, bash

from tinymim_jax.cli import main as cli
from tinymim_jax.config import load_config
from tinymim_jax.sweeps.points import make_runs, parse_overrides, read_stages

PYTHON_FILES = [
    str(path.relative_to(ROOT))
    for folder in ("configs", "tinymim_jax/cli", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
COMMANDS = {(document, line): line for document in (*DOCUMENTS, *PYTHON_FILES) for line in shown_in(document)}
OURS = "my"  # configs/my.py stands for a file that the reader has written
# Programs of others: what they do is not ours to check, files that they are given are.
OTHERS = ("git", "docker", "kubectl", "pip")


def check_tinymim(words: list[str], workdir: pathlib.Path, *, alone: bool = True) -> None:
    """It parses and its experiment loads; if it is not `alone`, its workdir is an absolute path."""
    options = cli._parse(words)
    file = getattr(options, "config", None) or getattr(options, "file", None) or ""
    if file == f"configs/{OURS}.py":
        return
    if getattr(options, "config", None):
        load_config(options.config, options.overrides)
    if options.command in ("sweep", "chain"):
        assert make_runs(read_stages(options.file), workdir, parse_overrides(options.overrides))
    assert alone or options.workdir.startswith("/")


def check_script(words: list[str]) -> None:
    """The Python script exists and has these flags."""
    text = (ROOT / words[0]).read_text()
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in text, flag


def check_pip(words: list[str]) -> None:
    """Its extras are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"\.\[(\S+)\]", " ".join(words)):
        assert name in extras


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=lambda text: "_".join(text.split()[:2]))
def test_command(document, line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(line)
    if name == "tinymim":
        check_tinymim(words, tmp_path)
    elif name == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif name == "python" and words[0] != "-m":
        check_script(words)
    elif name == "python":
        assert words[1] == "venv"  # an environment for another library, and what is installed into it
    elif name == "pip":
        check_pip(words)
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
    elif name in OTHERS:
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
        pytest.fail(f"{document}: no check for the program of {line!r}")


def test_all_launchers_scripts_and_commands_are_shown():
    launched = {line.split()[0] for line in shown_in("docs/launch.md")}
    assert launched >= {"launch/local.sh", "launch/tpu_vm.sh", "sbatch", "kubectl", "sky"}
    for path in LAUNCH.iterdir():
        assert f"launch/{path.name}" in (ROOT / "docs" / "launch.md").read_text() or path.name == "tpu_host.sh"
    shown = {line.split()[1] for line in COMMANDS.values() if line.startswith("tinymim ")}
    assert shown >= {module.__name__.rpartition(".")[2] for module in cli.COMMANDS} - {"demo"}  # which `make demo` runs


def test_every_action_of_tpu_vm_is_shown():
    text = (LAUNCH / "tpu_vm.sh").read_text()
    actions = re.findall(r"^#   (\w+) {2,}", text.split("# Actions:")[1].split("# Options:")[0], re.MULTILINE)
    assert len(actions) == 8
    shown = {line.split()[1] for line in shown_in("docs/launch.md") if line.startswith("launch/tpu_vm.sh")}
    assert shown == set(actions)


def _without_gpus(folder: pathlib.Path) -> str:
    """A PATH whose nvidia-smi fails, as on a machine without GPUs."""
    stub = folder / "nvidia-smi"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
