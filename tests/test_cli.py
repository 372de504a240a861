"""The command as a user types it, and the commands that the README shows."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from runs import SMALL

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.cli import main as cli
from tinymim_jax.sweeps.points import make_runs, parse_overrides, read_stages

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text() + (ROOT / "docs" / "replication.md").read_text()


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(autouse=True)
def _stay_alone(monkeypatch):
    # Joining a job of one process must come before the first use of a device; the tests around this one used some.
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.chdir(ROOT)


def readme_words(*wanted: str) -> list[str]:
    """Behind `tinymim`: the one command of the README that contains all of these."""
    (words,) = [words for words in commands_shown() if all(any(w in word for word in words) for w in wanted)]
    return words[1:]


@pytest.fixture(scope="module", name="readme_commands")
def _readme_commands() -> list[list[str]]:
    return commands_shown()


def commands_shown() -> list[list[str]]:
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in blocks if not language]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_every_command_of_the_readme_parses(readme_commands, tmp_path):
    seen = set()
    for words in readme_commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert words[0] == "tinymim", words
            options = cli._parse(words[1:])
            seen.add(options.command)
            if getattr(options, "config", None):
                from tinymim_jax.config import load_config

                load_config(options.config, options.overrides)
            if options.command in ("chain", "sweep"):
                assert make_runs(read_stages(options.file), tmp_path, parse_overrides(options.overrides))
    assert {"prepare", "convert", "train", "chain", "sweep", "evaluate", "export"} <= seen


def test_the_digits_commands_of_the_readme_run(readme_commands, tmp_path, data_dir, capsys, golden):
    """In order, as written, only shrunk and with folders moved."""
    trains = [w[1:] for w in readme_commands if w[:2] == ["tinymim", "train"] and "digits" in " ".join(w)]
    assert len(trains) == 3
    for words in trains:
        words = [word.replace("runs/", f"{tmp_path}/") for word in words]
        small = [word for word in SMALL if "checkpoint" not in word]
        if "mae" in " ".join(words):
            small += ["mae.decoder_dim=8", "mae.decoder_depth=1", "mae.decoder_heads=2"]
        if "distill" in " ".join(words):
            small.append("distill.teacher.tap=2")
        code, _, err = run(capsys, *words, "--data_dir", data_dir, "--compile_cache", "", *small)
        assert code == 0, err
    run_folder = tmp_path / "classifier"
    code, out, err = run(capsys, "evaluate", run_folder, "--data_dir", data_dir, "--compile_cache", "")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == pytest.approx(json.loads((run_folder / "result.json").read_text()))
    code, out, err = run(capsys, "knn", run_folder, "--k", "5", "--data_dir", data_dir, "--compile_cache", "")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["knn5_top5"] >= json.loads(out.splitlines()[-1])["knn5_top1"] > 0
    code, _, err = run(capsys, "export", run_folder, "--to", "vit", "--output", tmp_path / "out.safetensors")
    assert code == 0, err
    # And back: what was exported is a legal file to convert.
    heads = ",".join(map(str, load_params(run_folder)[0]["encoder"]["heads"]))
    words = ["convert", "--from", "vit", "--input", tmp_path / "out.safetensors", "--output", tmp_path / "back"]
    code, _, err = run(capsys, *words, "--heads", heads)
    assert code == 0, err
    there, back = load_params(run_folder)[1], load_params(tmp_path / "back")[1]
    np.testing.assert_array_equal(there["head"]["kernel"], back["head"]["kernel"])


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


def test_help_teaches(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for word in ("train", "chain", "sweep", "evaluate", "convert", "export", "prepare", "demo", "configs/distill_b.py"):
        assert word in out
    _, out, _ = run(capsys, "train", "--help")
    assert "resume" in out
    assert "KEY=VALUE" in out


def test_overrides_may_stand_between_flags(capsys):
    options = cli._parse(["train", "--config", "a.py", "optim.base_lr=1", "--workdir", "w"])
    assert (options.config, options.workdir, options.overrides) == ("a.py", "w", ["optim.base_lr=1"])
    options = cli._parse(["evaluate", "runs/b", "--workers", "2", "seed=1", "--data_dir", "d"])
    assert (options.checkpoint, options.overrides) == ("runs/b", ["seed=1"])
    with pytest.raises(SystemExit):
        cli._parse(["export", "runs/b", "--to", "vit", "--output", "x", "seed=1"])
    assert "takes no KEY=VALUE: seed=1" in capsys.readouterr().err
