"""The README's commands that need no data and little time, run one after another in one clone of the repository."""

import concurrent.futures
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, run, shown_in
from runs import SMALL

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.config import load_config
from tinymim_jax.demo import demo, pictures

pytestmark = pytest.mark.slow
_NOT_CLONED = (".git", ".venv", "runs", "data", "teachers", "build", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> pathlib.Path:
    """The repository's files in another folder; the tests of this file leave there what the commands leave."""
    folder = tmp_path_factory.mktemp("clone") / "tinymim-jax"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_NOT_CLONED))
    return folder


@pytest.fixture(autouse=True)
def _in_the_clone(clone, monkeypatch):
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.chdir(clone)


def small(spec: str) -> list[str]:
    """Overrides that make an experiment of configs/digits.py a matter of seconds."""
    words = [word for word in SMALL if "checkpoint" not in word]
    if "mae" in spec:
        words += ["mae.decoder_dim=8", "mae.decoder_depth=1", "mae.decoder_heads=2"]
    return [*words, "distill.teacher.tap=2"] if "distill" in spec else words


class Inline(concurrent.futures.Executor):
    """Runs what is submitted at once, in this process."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def test_make_demo(clone, monkeypatch, capsys, data_dir):
    """`make demo` runs this command; models and durations are small here, and all trainings are in one process."""
    assert "$(BIN)/tinymim demo --workdir runs/demo" in (clone / "Makefile").read_text()
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Inline)
    for module in (demo, pictures):
        monkeypatch.setattr(module, "load_config", lambda spec, words=(): load_config(spec, [*words, *small(spec)]))
    code, out, err = run(capsys, "demo", "--workdir", "runs/demo", "--seeds", "1", "--compile_cache", "")
    assert code == 0, err
    result = json.loads((clone / "runs" / "demo" / "result.json").read_text())
    assert [row["arm"] for row in result["rows"]] == ["from scratch", "MAE directly", "TinyMIM"]
    for row in result["rows"]:
        assert f"| {row['arm']} | {row['top1']:.1f} |" in out
        assert row["validation"][str(row["learning_rate"])] == max(row["validation"].values())
    for picture in ("losses.png", "relations.png"):
        assert (clone / "runs" / "demo" / picture).stat().st_size > 1000


def test_the_digits_commands(clone, data_dir, capsys):
    """Those of the tutorial, as written and in order; only the models and durations are smaller."""
    commands = [shlex.split(line)[1:] for line in shown_in("docs/tutorial.md")]
    commands = [words for words in commands if words[0] != "sweep"]  # test_sweep.py runs these
    assert [words[0] for words in commands] == ["train"] * 3 + ["evaluate", "knn", "export"]
    where = ["--data_dir", data_dir, "--compile_cache", ""]
    printed = {}
    for words in commands:
        more = [*where, *small(" ".join(words))] if words[0] == "train" else where if words[0] != "export" else []
        code, out, err = run(capsys, *words, *more)
        assert code == 0, err
        printed[words[0]] = out.splitlines()
    folder = clone / "runs" / "classifier"
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(printed["evaluate"][-1]) == pytest.approx(result)
    nearest = json.loads(printed["knn"][-1])
    assert nearest["knn5_top5"] >= nearest["knn5_top1"] > 0
    # What was exported can be converted back.
    heads = ",".join(map(str, load_params(folder)[0]["encoder"]["heads"]))
    words = ["convert", "--from", "vit", "--input", "out.safetensors", "--output", "teachers/back", "--heads", heads]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    there, back = load_params(folder)[1], load_params("teachers/back")[1]
    np.testing.assert_array_equal(there["head"]["kernel"], back["head"]["kernel"])
    code, out, err = run(capsys, "status", "runs/classifier")
    assert (code, "finished" in out) == (0, True), err


def test_lists_and_help(capsys, data_dir):
    """A sweep is listed; of commands that need ImageNet or other hardware, the help is shown."""
    (words,) = (line for line in shown_in("docs/sweeps.md") if "--list" in line)
    code, out, _ = run(capsys, *shlex.split(words)[1:], "--data_dir", data_dir)
    assert (code, out.count("not started")) == (0, 2)
    for command in ("prepare", "convert", "train", "evaluate", "predict", "plan", "chain", "probe"):
        code, out, _ = run(capsys, command, "--help")
        assert (code, f"tinymim {command}" in out) == (0, True)


def test_make_test_after_all_that(clone):
    """Lint and tests see the repository's files alone, whatever the commands before have left in the clone."""
    for folder in ("data", "jobs", "commands", "pictures"):  # folders that are called like modules of the tests
        (clone / folder).mkdir(exist_ok=True)
    assert (clone / "runs").is_dir()
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    files = [f"tests/test_{name}.py" for name in ("layout", "makefile", "docs")]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
