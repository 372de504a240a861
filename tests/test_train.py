"""Training: resuming, devices, faults; with real data and checkpoints and tiny models."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from runs import SMALL, run_steps, same_bits, small_config

from tinymim_jax import sharding
from tinymim_jax.checkpoints.manager import Checkpoints
from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.experiment import training_batches
from tinymim_jax.metrics import read
from tinymim_jax.runtime.exits import Interrupted
from tinymim_jax.runtime.progress import input_advice
from tinymim_jax.sharding import make_mesh
from tinymim_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(mae_run):
    return mae_run


def distill_config(teacher, *overrides):
    return small_config("distill", f"distill.teacher.path={teacher}", *overrides)


def test_a_run_leaves_what_it_says(teacher):
    names = {path.name for path in teacher.iterdir()}
    assert {"config.json", "model.json", "metrics.jsonl", "tensorboard", "checkpoints", "result.json"} <= names
    rows = [row for row in read(teacher / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "images_per_second" not in rows[0]  # a step that compiles is no measure
    assert all(row["images_per_second"] > 0 for row in rows[1:])
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    # lr: linear from 0 over one step to the peak, base_lr * 8 / 256.
    config = json.loads((teacher / "config.json").read_text())
    np.testing.assert_allclose([row["lr"] for row in rows[:2]], [0, config["optim"]["base_lr"] * 8 / 256])
    assert json.loads((teacher / "result.json").read_text())["examples"] == 13


class Clock:
    """Stands in for the module `time`: it goes on only when told to."""

    def __init__(self):
        self.seconds = 1000.0

    def perf_counter(self):
        return self.seconds


class SlowBatches:
    """The experiment's batches; `clock` goes on by `seconds` during each."""

    substitutions = 0

    def __init__(self, batches, clock, seconds):
        self._batches, self._clock, self._seconds = batches, clock, seconds

    def __next__(self):
        self._clock.seconds += self._seconds
        return next(self._batches)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._batches.close()


@pytest.mark.slow
def test_a_run_that_waits_for_its_data_says_so(data_dir, tmp_path, monkeypatch, caplog):
    """Each batch is late by half a second, and each step takes a quarter of one beside that."""
    late, busy, clock = 0.5, 0.25, Clock()

    def place_batch(mesh, batch):
        clock.seconds += busy
        return sharding.place_batch(mesh, batch)

    monkeypatch.setattr("tinymim_jax.runtime.progress.time", clock)
    monkeypatch.setattr("tinymim_jax.train.place_batch", place_batch)
    monkeypatch.setattr(
        "tinymim_jax.train.training_batches",
        lambda *args, **options: SlowBatches(training_batches(*args, **options), clock, late),
    )
    with caplog.at_level(logging.INFO, logger="tinymim_jax"):
        train(small_config("mae_teacher", "train.log_every=3"), tmp_path, data_dir=data_dir)
    rows = [row for row in read(tmp_path / "metrics.jsonl") if "data_wait" in row]
    assert [row["step"] for row in rows] == [3, 4]
    for row in rows:
        assert row["data_wait"] == pytest.approx(late / (late + busy))
        assert row["longest_data_wait_seconds"] == pytest.approx(late)
        assert row["images_per_second"] == pytest.approx(8 / (late + busy))
    advice = [record.getMessage() for record in caplog.records if "input is the bottleneck" in record.getMessage()]
    assert len(advice) == 1  # once, not with every line
    assert all(words in advice[0] for words in ("--workers", "tinymim prepare", "data.crops"))


def test_input_advice_names_workers_only_while_there_are_cores_for_them():
    assert "--workers 8 (processes that decode; 2 now, on 8 cores)" in input_advice(0.2, workers=2, cores=8)
    assert "--workers" not in input_advice(0.2, workers=8, cores=8)


def test_a_finished_run_is_not_run_again(teacher, data_dir):
    before = (teacher / "metrics.jsonl").read_text()
    result = train(small_config("mae_teacher", "model.heads=4"), teacher, data_dir=data_dir)
    assert result == json.loads((teacher / "result.json").read_text())
    assert (teacher / "metrics.jsonl").read_text() == before


def test_what_the_data_lacks_is_said_before_devices_are_taken(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("tinymim_jax.train.make_mesh", lambda *_: pytest.fail("devices were taken"))
    with pytest.raises(FileNotFoundError, match="tinymim prepare cifar10"):
        train(small_config("mae_teacher", "data.source=cifar10"), tmp_path, data_dir=data_dir)


def test_another_experiment_in_the_same_workdir_is_refused(teacher, data_dir):
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        train(small_config("mae_teacher", "model.heads=4", "seed=1"), teacher, data_dir=data_dir)


KILL_AT_STEP_3 = """
    import os, signal, sys
    sys.path.insert(0, "tests")
    import tinymim_jax.train as loop
    from runs import small_config

    calls, place = [], loop.place_batch
    def place_batch(mesh, batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return place(mesh, batch)
    loop.place_batch = place_batch
    config = small_config("distill", "distill.teacher.path=" + sys.argv[3], "model.drop_path=0.1", "train.ema=0.5")
    loop.train(config, sys.argv[1], data_dir=sys.argv[2])
"""


@pytest.mark.slow
def test_four_steps_are_two_then_a_kill_then_two(tmp_path, teacher, data_dir):
    config = distill_config(teacher, "model.drop_path=0.1", "train.ema=0.5")
    result = train(config, tmp_path / "whole", data_dir=data_dir)
    command = [sys.executable, "-c", textwrap.dedent(KILL_AT_STEP_3), tmp_path / "killed", data_dir, teacher]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    resumed = train(config, tmp_path / "killed", data_dir=data_dir)
    assert resumed == result
    for folder in ("whole", "killed"):
        assert [r["step"] for r in read(tmp_path / folder / "metrics.jsonl") if "lr" in r] == [1, 2, 3, 4]
    whole, killed = (load_params(tmp_path / folder)[1] for folder in ("whole", "killed"))
    assert same_bits(whole, killed)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, data_dir):
    small = [word for word in SMALL if "checkpoint" not in word and "duration" not in word]
    small += ["mae.decoder_dim=8", "mae.decoder_depth=1", "mae.decoder_heads=2", "train.duration=100000 steps"]
    command = [sys.executable, "-m", "tinymim_jax", "train", "--config", "configs/digits.py:mae_student"]
    command += ["--workdir", tmp_path / "run", "--data_dir", data_dir, "--compile_cache", "", *small]
    seen = []
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if "| loss " in line:
                process.send_signal(signal.SIGINT)
                break
        seen.append(process.stdout.read())
        assert process.wait(timeout=120) == 75, "".join(seen)
        stopped = int(seen[-1].split("stopped after step ")[1].split(",")[0])
        assert str(stopped) in os.listdir(tmp_path / "run" / "checkpoints")
    assert "resuming at step" in "".join(seen)


def test_ctrl_c_right_after_a_save_stops_at_the_next_step(tmp_path, data_dir, monkeypatch):
    """The step at which a run says that everything is saved is one that was saved, whenever the signal comes."""
    save, asked = Checkpoints.save, []

    def interrupted(self, step, *args, **kwargs):
        saved = save(self, step, *args, **kwargs)
        if not asked:
            asked.append(step)
            signal.raise_signal(signal.SIGINT)
        return saved

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    config = small_config("mae_student", "checkpoint.every_minutes=60.0")
    with pytest.raises(Interrupted, match="stopped after step 2, all saved"):
        train(config, tmp_path / "run", data_dir=data_dir)
    assert asked == [1]
    assert "2" in os.listdir(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["mae_teacher", "distill", "finetune"])
def test_devices_do_not_change_the_losses(experiment, teacher, data_dir):
    """1 device, 8, and 4 x 2 with split parameters have the same examples, masks and jitter, hence the same losses."""
    overrides = [f"distill.teacher.path={teacher}"] if experiment == "distill" else []
    config = small_config(experiment, "model.drop_path=0.1", *overrides)
    single, losses, before, after = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 3)
    assert len(set(losses)) == 3
    # The frozen weights are an argument of the step: bit for bit what they were.
    assert same_bits(before, after)
    for mesh in (make_mesh(), make_mesh(fsdp=2)):
        state, got, *_ = run_steps(config, data_dir, mesh, 3)
        np.testing.assert_allclose(got, losses, rtol=1e-5)  # sums in another order
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, single.params)


def test_fsdp_splits_large_parameters_and_their_moments(data_dir):
    config = small_config("mae_teacher", "model.embed_dim=512", "model.heads=8", "model.depth=1")
    state, losses, *_ = run_steps(config, data_dir, make_mesh(fsdp=2), 1)
    assert np.isfinite(losses).all()
    kernel = state.params["encoder"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert moments
    assert all(x.addressable_shards[0].data.size == x.size // 2 for x in moments)


def test_accumulated_parts_give_the_update_of_the_whole(data_dir):
    mesh = make_mesh(devices=jax.devices()[:1])
    whole, losses, *_ = run_steps(small_config("finetune", "model.drop_path=0.0"), data_dir, mesh, 2)
    parts, got, *_ = run_steps(small_config("finetune", "model.drop_path=0.0", "train.accumulate=4"), data_dir, mesh, 2)
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    # Adam divides by the gradient's size: where that is tiny, rounding shows.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), parts.params, whole.params)


def test_moving_average_in_closed_form(data_dir):
    mesh = make_mesh(devices=jax.devices()[:1])
    config = small_config("finetune", "train.ema=0.75")
    run_steps(config, data_dir, mesh, 2, states := [])
    start, first, second = (state.params["head"]["kernel"] for state in states)
    want = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second
    np.testing.assert_allclose(states[2].extra["ema"]["head"]["kernel"], want, atol=1e-7)


def test_parameters_without_gradient_are_left_out_of_the_optimizer(teacher, data_dir):
    mesh = make_mesh(devices=jax.devices()[:1])
    config = distill_config(teacher, "optim.weight_decay=0.5", "optim.base_lr=1.0")
    run_steps(config, data_dir, mesh, 3, states := [])
    start, end = states[0], states[-1]
    last_start, last_end = (state.params["encoder"]["blocks_1"] for state in (start, end))
    for name in ("mlp", "norm2"):
        assert same_bits(last_start[name], last_end[name])
    assert same_bits(last_start["attn"]["proj"], last_end["attn"]["proj"])
    assert not np.array_equal(last_start["attn"]["qkv"]["kernel"], last_end["attn"]["qkv"]["kernel"])
    # Two moments of each trained parameter and two counts: the untrained ten are not held.
    assert len(jax.tree.leaves(end.opt_state)) == 2 * (len(jax.tree.leaves(end.params)) - 10) + 2


def test_updates_that_are_not_finite_are_skipped_and_counted(data_dir):
    mesh = make_mesh(devices=jax.devices()[:1])
    config = small_config("finetune", "data.std=(0.0,1.0,1.0)", "train.ema=0.5")
    end, losses, *_ = run_steps(config, data_dir, mesh, 3, states := [])
    start = states[0]
    assert np.isnan(losses).all()  # nothing was counted
    assert int(end.skipped) == int(end.skipped_in_a_row) == int(end.step) == 3
    assert same_bits(start.params, end.params)
    assert same_bits(start.opt_state, end.opt_state)


@pytest.mark.parametrize("tolerated", [0, 2])
def test_a_run_of_skipped_updates_stops_and_names_the_step(tmp_path, data_dir, tolerated):
    """At the first that is not finite, or at the one that follows as many as may be skipped."""
    config = small_config("finetune", "data.std=(0.0,1.0,1.0)", f"train.max_skipped={tolerated}")
    last = f"{tolerated + 1} steps? up to step {tolerated + 1}"
    with pytest.raises(FloatingPointError, match=rf"not finite in the {last}.*optim\.base_lr"):
        train(config, tmp_path, data_dir=data_dir)
    _, params = load_params(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_no_update_needs_to_be_skipped(tmp_path, data_dir):
    assert "loss" in train(small_config("finetune", "train.max_skipped=0"), tmp_path, data_dir=data_dir)
    with pytest.raises(ValueError, match=r"train\.max_skipped=-1.*0 stops at the first"):
        train(small_config("finetune", "train.max_skipped=-1"), tmp_path / "other", data_dir=data_dir)


def test_a_batch_that_does_not_fit_the_devices(tmp_path, data_dir):
    with pytest.raises(ValueError, match="choose a multiple of 8"):
        train(small_config("finetune", "train.batch_size=12"), tmp_path, data_dir=data_dir)


def test_a_workdir_that_cannot_be_written(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a folder you may write to"):
        train(small_config("finetune"), tmp_path / "file" / "run", data_dir=data_dir)
