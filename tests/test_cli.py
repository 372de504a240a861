"""The command as a user types it."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from commands import run

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.cli import main as cli

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _stay_alone(monkeypatch):
    # Joining a job of one process must come before the first use of a device; the tests around this one used some.
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.chdir(ROOT)


def test_convert_as_a_user(golden, tmp_path, capsys):
    words = ["convert", "--from", "mae", "--input", golden.path("teacher.pth"), "--output", tmp_path / "teacher"]
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert "--heads" in err
    code, out, _ = run(capsys, *words, "--heads", golden.meta["teacher"]["heads"])
    assert code == 0
    assert f"{golden.meta['teacher']['depth']} blocks" in out
    model, params = load_params(tmp_path / "teacher")
    width = golden.meta["teacher"]["embed_dim"]
    assert model["encoder"]["embed_dim"] == width == params["encoder"]["cls_token"].shape[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "configs/nothing.py", "--workdir", "x"], "no such file"),
        (["train", "--config", "configs/distill_b.py", "--workdir", "x", "optim.lr=1"], "did you mean"),
        (["train", "--config", "configs/finetune_t.py", "--workdir", "x"], "tinymim prepare imagenet2012"),
        (["evaluate", "nowhere"], "--config"),
        (["export", "nowhere", "--to", "vit", "--output", "x.safetensors"], "nowhere"),
        (["export", "nowhere", "--to", "vit", "--output", "a.pth"], "writes a .safetensors file, not .pth"),
        (["export", "nowhere", "--to", "litert", "--output", "a.onnx"], "give --output a.tflite"),
        (["export", "nowhere", "--to", "hub", "--output", "a.bin"], "writes a folder, not .bin: give --output a"),
        (["convert", "--from", "mae", "--input", "nothing.pth", "--output", "x"], "nothing.pth"),
    ],
)
def test_errors_are_one_message_without_a_traceback(words, message, tmp_path, capsys):
    words = [str(tmp_path / "x") if word == "x" else word for word in words]
    data = ["--data_dir", tmp_path, "--compile_cache", ""] if words[0] in ("train", "evaluate") else []
    code, _, err = run(capsys, *words, *data)
    assert code == 1
    assert err.startswith(f"tinymim {words[0]}: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "x" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "--config", "digits:finetune", "--workdir", "a[1]"], "--workdir"),
        (["sweep", "digits:finetune", "--run", "local", "--workdir", "a[1]"], "--workdir"),
        (["sweep", "digits:finetune", "--study", "study", "--workdir", "a[1]"], "--workdir"),
        (["chain", "chain", "--workdir", "a[1]"], "--workdir"),
        (["distill", "digits", "--teacher", "t", "--output", "a[1]"], "--output"),
        (["advise", "digits", "--teacher", "t", "--output", "a[1]"], "--output"),
    ],
)
def test_a_folder_that_cannot_hold_checkpoints_is_refused_at_once(words, option, capsys):
    code, _, err = run(capsys, *words)
    assert code == 1
    assert f"{option} " in err
    assert "checkpoints cannot be kept in a path with [ in it" in err


def test_closed_output_is_no_error(mae_run, monkeypatch):
    """`>&-` in a shell, and some managers of services: Python has no standard output then."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(mae_run)])
    assert ended.value.code == 0


def test_a_damaged_config_is_named(mae_run, tmp_path, capsys):
    shutil.copytree(mae_run, tmp_path / "run")
    for text, what in (("", "is empty"), ("{", "is damaged")):
        (tmp_path / "run" / "config.json").write_text(text)
        for words in (["evaluate", tmp_path / "run"], ["train", "--config", "digits", "--workdir", tmp_path / "run"]):
            code, _, err = run(capsys, *words)
            assert code == 1
            assert f"run/config.json {what}" in err
            assert "Put back a copy" in err


def test_help_teaches(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for word in ("train", "chain", "sweep", "evaluate", "convert", "export", "prepare", "demo", "configs/distill_b.py"):
        assert word in out
    for status in ("0", "1", "2", "75", "86", "130", "143"):
        assert re.search(rf"^  {status} ", out, re.MULTILINE)
    for command in ("train", "chain", "sweep", "status", "plan"):
        _, out, _ = run(capsys, command, "--help")
        assert re.search(r"Exit\s+status: 0 ", out)
    _, out, _ = run(capsys, "train", "--help")
    assert "resume" in out
    assert "--extend" in out
    assert "KEY=VALUE" in out


def test_overrides_may_stand_between_flags(capsys):
    options = cli._parse(["train", "--config", "a.py", "optim.base_lr=1", "--workdir", "w"])
    assert (options.config, options.workdir, options.overrides) == ("a.py", "w", ["optim.base_lr=1"])
    options = cli._parse(["evaluate", "runs/b", "--workers", "2", "seed=1", "--data_dir", "d"])
    assert (options.checkpoint, options.overrides) == ("runs/b", ["seed=1"])
    with pytest.raises(SystemExit):
        cli._parse(["export", "runs/b", "--to", "vit", "--output", "x", "seed=1"])
    assert "takes no KEY=VALUE: seed=1" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "cache"), [("", "~/.cache/tinymim_jax"), ("/a", "")])
def test_a_compile_cache_that_jax_was_given_stays_as_it_is(variable, cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    words = ["train", "--config", "a.py", "--workdir", "w"]
    assert cli._parse(words).compile_cache == cache
    assert cli._parse([*words, "--compile_cache", "b"]).compile_cache == "b"


def test_an_error_is_status_1_even_if_the_interpreter_cannot_shut_down(tmp_path):
    """As with a /dev/shm that is too small for the workers, where threads may abort it: exit status 134."""
    code = "import atexit, os, sys; atexit.register(os.abort); sys.argv = ['tinymim', 'status', sys.argv[1]]"
    code += "; from tinymim_jax.cli.main import main; main()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert "no run has begun in" in done.stderr
