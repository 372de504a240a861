"""What may change when a run is resumed, and what is refused: data, teacher, config, duration."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from runs import small_config

from configs import base
from tinymim_jax.config import flat_names
from tinymim_jax.metrics import read
from tinymim_jax.resume import MAY_CHANGE, as_json, check_same
from tinymim_jax.train import train

PEAK = 0.01 * 16 / 256


def make_set(folder, classes=("ant", "bee", "cat"), images=4):
    """A folder of labelled images."""
    draw = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def on_set(folder, *overrides):
    words = [f"data.source=folder:{folder}", "data.train_split=all", "data.eval_split=all", "data.examples=0"]
    return small_config(
        "finetune",
        *words,
        "model.depth=1",
        "train.log_every=1",
        "optim.base_lr=0.01",
        "optim.final_lr=0.0",
        "train.batch_size=16",
        *overrides,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(on_set(images), workdir)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that was killed before its result was written."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "result.json").unlink()
    return workdir


def test_the_inputs_are_recorded(trained, images):
    record = json.loads((trained / "resume.json").read_text())
    assert record["class_names"] == sorted(path.name for path in images.iterdir())
    assert (record["train_images"], record["eval_images"]) == (12, 12)
    assert len(record["frozen"]) == 16


def test_other_class_names_are_refused(run, tmp_path):
    moved = make_set(tmp_path / "set", ("ant", "bee", "zebra"))
    with pytest.raises(ValueError, match="other inputs") as error:
        train(on_set(moved), run)
    assert "class names: only there: 'cat'; only here: 'zebra'" in str(error.value)
    assert "choose another --workdir" in str(error.value)
    assert json.loads((run / "config.json").read_text())["data"]["source"] != f"folder:{moved}"


def test_another_number_of_images_is_refused(run, tmp_path):
    moved = make_set(tmp_path / "set", images=5)
    with pytest.raises(ValueError, match="training images: 12 there, 15 here\n  evaluation images: 12 there, 15 here"):
        train(on_set(moved), run)


@pytest.mark.parametrize(
    ("mistake", "message"), [("model.heads=5", "heads"), ("optim.warmup=9 steps", "does not fit into 4 steps")]
)
def test_a_first_command_with_a_mistake_does_not_claim_the_workdir(mistake, message, images, trained, tmp_path, caplog):
    with pytest.raises(ValueError, match=message):
        train(on_set(images, mistake), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    (tmp_path / "run" / "students" / "old").mkdir(parents=True)
    with caplog.at_level(logging.INFO, logger="tinymim_jax"):
        result = train(on_set(images), tmp_path / "run")
    assert result == pytest.approx(json.loads((trained / "result.json").read_text()))
    assert f"{mistake.split('=')[0]} was" in caplog.text
    assert "has another config but no checkpoint" in caplog.text
    assert (tmp_path / "run" / "config.json").read_text() == (trained / "config.json").read_text()
    assert not (tmp_path / "run" / "students").exists()


def test_a_run_that_ended_in_its_first_step_may_get_other_data_and_another_length(images, tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr("tinymim_jax.train._loop", fails)
        with pytest.raises(MemoryError):
            train(on_set(images), tmp_path / "run")
    assert (tmp_path / "run" / "resume.json").exists()
    others = make_set(tmp_path / "set", images=5)
    train(on_set(others, "train.duration=2 steps", "train.batch_size=8"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "resume.json").read_text())["train_images"] == 15
    with pytest.raises(ValueError, match="another experiment"):
        train(on_set(others, "train.duration=2 steps", "train.batch_size=16"), tmp_path / "run")


def test_moved_data_and_technical_settings_may_change(run, trained, tmp_path, caplog):
    moved = make_set(tmp_path / "set")
    changes = ["train.log_every=2", "train.accumulate=2", "checkpoint.keep=1", "checkpoint.every_minutes=5.0"]
    with caplog.at_level(logging.INFO, logger="tinymim_jax"):
        result = train(on_set(moved, *changes), run)
    assert result == pytest.approx(json.loads((trained / "result.json").read_text()))
    config = json.loads((run / "config.json").read_text())
    assert (config["train"]["accumulate"], config["checkpoint"]["keep"]) == (2, 1)
    assert config["data"]["source"] == f"folder:{moved}"
    assert "train.log_every was 1 and is now 2" in caplog.text


def test_what_may_change_is_a_key_and_everything_else_is_refused(run, images):
    known = {*flat_names(on_set(images)), *flat_names(small_config("distill"))}
    assert set(MAY_CHANGE) <= known
    for override in ("optim.weight_decay=0.123", "seed=7", f"data.source=tar:{images}"):
        with pytest.raises(ValueError, match=rf"another experiment:\n  {override.split('=')[0]}: .* there, .* here\n"):
            train(on_set(images, override), run)


def test_micro_batches_may_not_change_under_batch_norm(tmp_path):
    """It averages over a micro-batch, so a linear probe and a segmentation would be other trainings."""
    for name, make in (("probe", base.probe), ("segment", base.segment), ("classify", base.classify)):
        before, after = make(), make()
        after.train.accumulate = 2
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(as_json(before)))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')
        if name == "classify":
            assert check_same(tmp_path / name, after) == {"train.accumulate": (1, 2)}
            continue
        with pytest.raises(ValueError, match=r"train.accumulate: 1 there, 2 here\nBatch norm averages") as error:
            check_same(tmp_path / name, after)
        assert "train.accumulate" not in str(error.value).partition("Keys that may change")[2]


def test_a_longer_duration_needs_extend_and_follows_its_cosine(trained, images, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")  # finished
    longer = on_set(images, "train.duration=8 steps")
    with pytest.raises(ValueError, match=r"begun with train.duration='4 steps', and '8 steps' .* --extend"):
        train(longer, workdir)
    with pytest.raises(ValueError, match=r"3 steps are asked for, and 4 were before"):
        train(on_set(images, "train.duration=3 steps"), workdir, extend=True)
    assert (workdir / "result.json").exists()
    train(longer, workdir, extend=True)
    rates = {row["step"]: row["lr"] for row in read(workdir / "metrics.jsonl") if "lr" in row}
    before = {step: PEAK * (1 + math.cos(math.pi * (step - 2) / 3)) / 2 for step in (2, 3, 4)}
    after = {step: PEAK * (1 + math.cos(math.pi * (step - 2) / 7)) / 2 for step in (5, 6, 7, 8)}
    assert rates == pytest.approx({1: 0.0} | before | after, rel=1e-4, abs=1e-9)
    assert json.loads((workdir / "config.json").read_text())["train"]["duration"] == "8 steps"
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())[-1] == 8
    assert (workdir / "result.json").exists()
    train(longer, workdir)  # and now it is a run of eight steps


def test_a_damaged_result_is_made_again(trained, images, tmp_path, caplog):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "result.json").write_text("")
    assert train(on_set(images), workdir) == pytest.approx(json.loads((trained / "result.json").read_text()))
    assert f"{workdir / 'result.json'} is empty or damaged" in caplog.text
    assert json.loads((workdir / "result.json").read_text())["examples"] == 12


@pytest.mark.parametrize("recorded", [True, False])
def test_another_teacher_at_the_same_path_is_refused(recorded, data_dir, tmp_path, caplog):
    teacher, other = tmp_path / "teacher", tmp_path / "other"
    quick = ["train.duration=2 steps", "model.depth=1", "mae.decoder_dim=8", "mae.decoder_depth=1"]
    for folder, seed in ((teacher, 0), (other, 1)):
        train(small_config("mae_teacher", *quick, f"seed={seed}"), folder, data_dir=data_dir)

    def config(path):
        words = [f"distill.teacher.path={path}", "model.depth=1", "train.duration=2 steps"]
        return small_config("distill", *words)

    train(config(teacher), tmp_path / "run", data_dir=data_dir)
    (tmp_path / "run" / "result.json").unlink()
    if not recorded:
        (tmp_path / "run" / "resume.json").unlink()  # a run of an earlier version
    teacher.rename(tmp_path / "moved")
    if recorded:
        train(config(tmp_path / "moved"), tmp_path / "run", data_dir=data_dir)
        train(config(teacher), tmp_path / "run", data_dir=data_dir)  # finished: nothing is loaded
        (tmp_path / "run" / "result.json").unlink()
    other.rename(teacher)
    with caplog.at_level(logging.INFO, logger="tinymim_jax"), pytest.raises(ValueError, match="digest of the frozen"):
        train(config(teacher), tmp_path / "run", data_dir=data_dir)
    assert recorded == ("does not record its class names" not in caplog.text)
