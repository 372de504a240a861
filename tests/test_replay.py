"""`tinymim replay`: a step again is the step as it was; what a run that stopped for NaN says."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from pages import check_page
from processes import saved_steps
from runs import run_steps, small_config

from tinymim_jax.analysis.replay import replay
from tinymim_jax.analysis.steps import Step, _in_order, describe_step
from tinymim_jax.experiment import build_experiment, training_batches
from tinymim_jax.metrics import read
from tinymim_jax.reports.write import write_report
from tinymim_jax.sharding import make_mesh
from tinymim_jax.train import train


@pytest.fixture(scope="module")
def teacher(mae_run):
    return mae_run


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory, data_dir):
    """Four steps with everything that is random: masks, jitter, drop path; one checkpoint, at the end."""
    workdir = tmp_path_factory.mktemp("student")
    words = [f"distill.teacher.path={teacher}", "model.drop_path=0.5", "distill.mask_ratio=0.5"]
    words += ["checkpoint.every_minutes=60.0"]  # saved once, at the end
    words += ["train.accumulate=2", "train.batch_size=16", "train.ema=0.5", "data.crops=2"]
    train(small_config("distill", *words), workdir, data_dir=data_dir)
    return workdir


def recorded(workdir, step):
    (row,) = [row for row in read(workdir / "metrics.jsonl") if row["step"] == step and "train/loss" in row]
    return row


def same(step, row):
    """The step's figures are those that the run wrote, up to the order of float32 sums."""
    for name, values in step.losses.items():
        np.testing.assert_allclose(values.mean(), row[f"train/{name}"], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(step.gradient_norm, row["train/gradient_norm"], rtol=1e-5)
    np.testing.assert_allclose(step.lr, row["lr"], rtol=1e-6)


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def fourth(teacher, data_dir):
    """The last step of the teacher, and the files of its workdir before."""
    before = listing(teacher)
    return replay(str(teacher), 4, data_dir=data_dir), before


def test_a_step_from_a_checkpoint_is_the_step_of_the_run(teacher, fourth):
    step, before = fourth
    assert step.repeated == 3 - max(saved for saved in saved_steps(teacher) if saved <= 3)
    same(step, recorded(teacher, 4))
    assert listing(teacher) == before


def test_a_step_from_the_start_with_micro_batches_and_noise(student, data_dir):
    """The only checkpoint is of step 4: step 3 is computed from the initial weights, with the two steps before it."""
    step = replay(str(student), 3, data_dir=data_dir)
    assert step.repeated == 2
    same(step, recorded(student, 3))
    assert len(step.records) == len(step.losses["loss"]) == 16
    assert {tuple(tile["seen"]) for tile in step.tiles} == {("student", "teacher")}
    losses = [step.losses["loss"][tile["row"]] for tile in step.tiles]
    assert losses == sorted(losses, reverse=True)


def test_losses_gradients_and_records_of_the_images(fourth, data_dir):
    """Against the task's own losses and jax.grad of their mean, at the weights after three steps of the loop."""
    step, _ = fourth
    config = small_config("mae_teacher", "model.heads=4")
    experiment = build_experiment(config, data_dir=data_dir)
    with training_batches(experiment, start_step=3, workers=0) as batches:
        batch = next(batches)
    params = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 3)[0].params
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    images = {"image": jnp.asarray(batch["image"]), "label": jnp.asarray(batch["label"])}

    def loss(params):
        values = experiment.task.losses(params, {}, images, key, True)["loss"]
        return values.mean(), values

    gradients, values = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(step.losses["loss"], values, rtol=1e-5)
    layers = {layer["name"]: layer for layer in step.layers}
    for name in ("encoder/blocks_0/attn/qkv", "encoder/blocks_1/mlp/fc2", "encoder/cls_token"):
        for key, tree in (("gradient", gradients), ("weights", params)):
            for word in name.split("/"):
                tree = tree[word]
            norm = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))
            np.testing.assert_allclose(layers[name][key], norm, rtol=1e-4)
    names = list(layers)
    assert names.index("encoder/blocks_0/norm2") < names.index("encoder/blocks_1/attn/qkv")
    # The records are those of the batch: their labels agree.
    numbers = [int(record.split()[1]) for record in step.records]
    assert [experiment.train_source[i]["label"] for i in numbers] == batch["label"].tolist()


def test_the_command_and_the_report(student, data_dir, capsys, tmp_path):
    shutil.copytree(student, tmp_path / "run")
    words = ["--step", "4", "--data_dir", data_dir, "--compile_cache", ""]
    code, out, err = run(capsys, "replay", tmp_path / "run", *words)
    assert code == 0, err
    assert "step 4: loss" in out
    folder = tmp_path / "run" / "replay"
    assert out.splitlines()[-1] == str(folder / "step_4.html")
    found = json.loads((folder / "step_4.json").read_text())
    assert found["repeated"] == 3
    np.testing.assert_allclose(found["loss"], recorded(student, 4)["train/loss"], rtol=1e-5)
    page = check_page((folder / "step_4.html").read_text())
    assert len(page.all("img")) == 2 * 16
    assert {"Losses of the images", "Gradient norm of each layer"} <= set(page.texts["figcaption"])
    report = check_page(write_report(tmp_path / "run", look=False).read_text())
    assert {"href": "replay/step_4.html"} in report.all("a")


def test_what_cannot_be_replayed(student, teacher, data_dir, capsys, tmp_path):
    words = ["--data_dir", data_dir, "--compile_cache", ""]
    code, _, err = run(capsys, "replay", student, "--step", "5", *words)
    assert (code, "--step 5: the run has steps 1 to 4" in err) == (1, True)
    code, _, err = run(capsys, "replay", tmp_path, "--step", "1", *words)
    assert (code, "give the --workdir of a run" in err) == (1, True)
    shutil.copytree(student, tmp_path / "other")
    inputs = json.loads((tmp_path / "other" / "resume.json").read_text())
    (tmp_path / "other" / "resume.json").write_text(json.dumps(inputs | {"frozen": "0" * 16}))
    code, _, err = run(capsys, "replay", tmp_path / "other", "--step", "1", *words)
    assert (code, "was trained with other inputs" in err) == (1, True)


def test_a_run_stopped_for_nan_shows_its_first_bad_step(data_dir, tmp_path, capsys):
    config = small_config("finetune", "data.std=(0.0,1.0,1.0)", "train.max_skipped=1")
    with pytest.raises(FloatingPointError) as stop:
        train(config, tmp_path / "run", data_dir=data_dir)
    said = str(stop.value)
    assert "not finite in the 2 steps up to step 2" in said
    assert "In step 1 the loss of 8 of 8 images is not finite (row 0: record" in said
    assert "the gradient is not finite in" in said
    page = tmp_path / "run" / "replay" / "step_1.html"
    assert said.endswith(f"Its images, losses and gradients: {page}")
    assert len(check_page(page.read_text()).all("img")) == 8
    found = json.loads(page.with_suffix(".json").read_text())
    assert (found["loss"], found["losses"]["loss"]) == (None, [None] * 8)
    report = check_page((tmp_path / "run" / "report.html").read_text())
    assert any("not finite in the 2 steps" in text for text in report.texts["pre"])
    assert {"href": "replay/step_1.html"} in report.all("a")


def test_a_step_that_cannot_be_shown_does_not_hide_the_error(data_dir, tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise MemoryError("too large")

    monkeypatch.setattr("tinymim_jax.analysis.replay.look_at_step", broken)
    config = small_config("finetune", "data.std=(0.0,1.0,1.0)", "train.max_skipped=0")
    with pytest.raises(FloatingPointError, match="not finite in the 1 step up to step 1") as stop:
        train(config, tmp_path / "run", data_dir=data_dir)
    assert f"tinymim replay {tmp_path / 'run'} --step 1" in str(stop.value)
    assert "step 1 could not be looked at: MemoryError: too large" in caplog.text


def step_of(losses, gradients):
    layers = [{"name": f"blocks_{i}", "gradient": value, "weights": 1.0} for i, value in enumerate(gradients)]
    records = [f"record {i} of pets/train" for i in range(len(losses))]
    return Step(7, {"loss": np.array(losses)}, records, layers, [], 0.1)


def test_what_is_said_of_a_step():
    nan, inf = float("nan"), float("inf")
    assert describe_step(step_of([1.0, 3.0], [3.0, 4.0])) == "step 7: loss 2, gradient norm 5"
    one = describe_step(step_of([1.0, nan, 2.0], [1.0, nan]))
    assert one == (
        "in step 7 the loss of 1 of 3 images is not finite (row 1: record 1 of pets/train), and the gradient is not "
        "finite in 1 of 2 layers (blocks_1)"
    )
    many = describe_step(step_of([inf] * 5, [inf] * 5))
    assert "row 2: record 2 of pets/train; ...)" in many
    assert "(blocks_0, blocks_1, blocks_2, ...)" in many
    assert "the loss of every image is finite, and the gradient is not" in describe_step(step_of([1.0], [nan]))


def test_layers_are_in_the_order_of_their_numbers():
    names = ["b/blocks_10/x", "b/blocks_2/x", "b/blocks_2/a", "b/cls"]
    assert sorted(names, key=_in_order) == ["b/blocks_2/a", "b/blocks_2/x", "b/blocks_10/x", "b/cls"]
