"""`tinymim chain`: stages run in order, and resume after a kill."""

import functools
import json
import os
import pathlib
import re
import shutil
import time

import jax
import numpy as np
import pytest
from commands import documented_words, run
from processes import output_of, run_python, saved_steps
from runs import SMALL

from tinymim_jax.metrics import read
from tinymim_jax.models.vit import ViT
from tinymim_jax.sweeps.checks import check_points
from tinymim_jax.sweeps.points import Point, make_runs, read_stages

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("teacher", "large", "small", "classifier")
WORDS = (
    *SMALL,
    "mae.decoder_dim=8",
    "mae.decoder_depth=1",
    "mae.decoder_heads=2",
    "large.distill.teacher.tap=2",
    "large.train.duration=100 steps",
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def command(workdir, data_dir) -> list[str]:
    """The documented chain on the digits, with small models."""
    words = documented_words("docs/sweeps.md", "chain", "digits")
    shown = [str(workdir) if word.startswith("runs/") else word for word in words]
    return [*shown, "--data_dir", data_dir, "--compile_cache", "", *WORDS]


def start(words):
    os.chdir(ROOT)
    return run_python(f"from tinymim_jax.cli.main import main; main({[str(w) for w in words]!r})")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("chain")
    status, out, err = output_of(start(command(workdir, data_dir)))
    assert status == 0, out + err
    return workdir, out


@pytest.mark.slow
def test_each_stage_is_taught_by_the_one_before_it(undisturbed):
    workdir, out = undisturbed
    configs = {name: json.loads((workdir / name / "config.json").read_text()) for name in STAGES}
    assert configs["large"]["distill"]["teacher"]["path"] == str(workdir / "teacher")
    assert configs["small"]["distill"]["teacher"]["path"] == str(workdir / "large")
    assert configs["classifier"]["init"] == str(workdir / "small")
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == [f"| {name}" for name in STAGES]
    top1 = json.loads((workdir / "classifier" / "result.json").read_text())["top1"]
    assert f"top1 {top1:.4g}" in lines[-1]


@pytest.mark.slow
def test_killed_in_its_second_stage_it_goes_on_to_the_same_bits(undisturbed, data_dir, tmp_path):
    shutil.copytree(undisturbed[0] / "teacher", tmp_path / "teacher")  # a finished stage is not run again
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").rglob("*")}
    process = start(command(tmp_path, data_dir))
    metrics = tmp_path / "large" / "metrics.jsonl"
    for _ in range(600):
        if saved_steps(metrics.parent):
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(1.0)
    assert read(metrics)[-1]["step"] < 100
    assert not (tmp_path / "small").exists()
    status, out, err = output_of(start(command(tmp_path, data_dir)))
    assert status == 0, out + err
    assert not any(line.startswith("teacher | ") for line in out.splitlines())
    assert re.search(r"^large \| .*resuming at step", out, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").rglob("*")} == before
    for name in STAGES:
        same = (tmp_path / name / "result.json", undisturbed[0] / name / "result.json")
        assert same[0].read_bytes() == same[1].read_bytes(), name


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["small.optim.base_rl=1"], ["stage 'small'", "did you mean 'optim.base_lr'"]),
        (["classifier.model.patch_size=4"], ["stage classifier", "do not fit this model"]),
        (["large.distill.target=qk_v"], ["stage large", "distill.target"]),
    ],
)
def test_all_stages_are_checked_before_the_first(words, messages, data_dir, tmp_path, capsys):
    status, _, err = run(capsys, *command(tmp_path / "w", data_dir), *words)
    assert status == 1
    for message in messages:
        assert message in err
    assert not (tmp_path / "w").exists()


def test_mistaken_chain_files(tmp_path, capsys):
    status, _, err = run(capsys, "chain", "configs/distill_b.py", "--workdir", tmp_path)
    assert status == 1
    assert "has no function get_chain()" in err
    shutil.copy(ROOT / "configs" / "base.py", tmp_path / "base.py")
    (tmp_path / "one.py").write_text("from configs import base\ndef get_config(): return base.mae()\n")
    for name, overrides, message in (
        ("optim", {}, "cannot be called 'optim'"),
        ("a", {"init": "{b}"}, "'b' is unknown"),
    ):
        (tmp_path / "chain.py").write_text(f"def get_chain(): return [({name!r}, 'one.py', {overrides})]")
        status, _, err = run(capsys, "chain", tmp_path / "chain.py", "--workdir", tmp_path / "w")
        assert status == 1
        assert message in err


@functools.cache  # to trace 24 blocks takes a second
def large_teacher():
    """(record, zeros as weights) of a ViT-L."""
    vit = ViT(embed_dim=1024, depth=24, heads=16, image_size=(224, 224), pos_embed="learned")
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
    return vit.record(), jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)


@pytest.mark.parametrize(
    ("sizes", "heads"), [("", "adaptive"), ("", "resplit"), (":s,t", "resplit"), (":b,t", "adaptive")]
)
def test_the_published_chains_build_at_full_size(sizes, heads, monkeypatch, tmp_path):
    record, zeros = large_teacher()
    loads = []
    monkeypatch.setattr(
        "tinymim_jax.tasks.pretrained.load_params",
        lambda path, **_: loads.append(path) or ({"encoder": record}, {"encoder": zeros}),
    )
    words = {
        "distill.teacher.path": "teachers/mae",
        "distill.heads": heads,
        "model.scan": True,
        "model.dtype": "float32",
    }
    runs = make_runs(read_stages(f"configs/chain.py{sizes}"), tmp_path, words)
    check_points([Point("", 0, None, {}, {}, runs)], data_dir=str(tmp_path), need_data=False)
    assert loads == ["teachers/mae"]
    assert [run.name for run in runs] == [*(sizes[1:] or "b,s,t").split(","), "classifier"]
    with pytest.raises(ValueError, match="Choose digits, or some of b, s, t"):
        read_stages("configs/chain.py:b,x")
