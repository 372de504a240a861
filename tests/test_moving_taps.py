"""Taps that move during the training: each part is a training with constant taps, in one program."""

import itertools
import json
import logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, same_bits, small_config

from tinymim_jax.analysis.replay import replay
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.config import from_json
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer, training_batches
from tinymim_jax.flops import phase_flops, step_flops
from tinymim_jax.metrics import compute, no_averages
from tinymim_jax.models.vit import ViT
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.run_log import RunLog
from tinymim_jax.runtime.exits import Interrupted
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.state import init_state, make_train_step, place_frozen, trained_paths
from tinymim_jax.tasks import TASKS
from tinymim_jax.train import train

TEACHER = ViT(32, 4, 4, 8, (16, 16))
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.zeros(4, jnp.int32)}
MOVING = "distill.teacher.tap=(('0 steps', 2), ('2 steps', 4))"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers") / "teacher"
    params = jax.jit(TEACHER.init)(jax.random.key(1), np.zeros((1, 16, 16, 3), np.float32))["params"]
    save_params(path, {"encoder": params}, {"encoder": TEACHER.record()})
    return path


def distill(teacher, *words):
    """A student of two blocks, four steps."""
    return small_config("distill", f"distill.teacher.path={teacher}", *words)


def task_of(config):
    return TASKS["distill"].build(config, DIGITS)


def test_each_part_has_the_losses_and_gradients_of_constant_taps(teacher):
    further = [f"distill.teachers.other.{word}" for word in (f"path={teacher}", "target=output", "weight=0.5")]
    words = ["distill.target=qk_vv + oo(student=1, teacher=1)", "distill.heads=resplit", *further]
    moving = task_of(distill(teacher, *words, MOVING, "distill.student_tap=(('0 steps', 1), ('4 steps', 2))"))
    assert [phase.begins for phase in moving.phases] == ["0 steps", "2 steps", "4 steps"]
    params = moving.init(jax.random.key(2))
    assert set(params["adapter"]["other"]) == {"taps_0", "taps_1"}  # its block is fixed, the student's moves
    for phase, (student, block) in zip(moving.phases, [(1, 2), (1, 4), (2, 4)], strict=True):
        constant = task_of(distill(teacher, *words, f"distill.teacher.tap={block}", f"distill.student_tap={student}"))
        own = {"taps_0": params["adapter"]["other"][f"taps_{student - 1}"]}

        def results(losses, params, frozen):
            def loss(params):
                values = losses(params, frozen, BATCH, jax.random.key(5), True)
                return values["loss"].mean(), values

            return jax.jit(jax.grad(loss, has_aux=True))(params)

        grads, got = results(phase.losses, params, moving.load_frozen())
        want_grads, want = results(constant.losses, params | {"adapter": {"other": own}}, constant.load_frozen())
        assert set(got) == set(moving.names)
        assert set(got) - {"teacher_tap", "student_tap"} == {
            "loss", "teacher", "teacher_qk", "teacher_vv", "teacher_oo_1_1", "other", "other_output"
        }  # fmt: skip
        for name in ("loss", "teacher", "other"):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads["encoder"], want_grads["encoder"])
        np.testing.assert_array_equal(got["teacher_tap"], np.full(4, block))
        np.testing.assert_array_equal(got["student_tap"], np.full(4, student))
    # Evaluation is by the last part, from the first step on.
    assert moving.losses == moving.phases[-1].losses
    assert moving.origin["teacher"]["blocks"] == [[2, 4], [1, 1], [1, 2], [1, 4]]


def test_a_moving_tap_trains_as_constant_ones_one_after_another(teacher, data_dir):
    """Four steps of the moving tap against two with each block, the second ones from the state of the first."""
    mesh = make_mesh(devices=jax.devices()[:1])

    def run(word, state, steps):
        config = distill(teacher, word, "optim.base_lr=0.1", "train.accumulate=2", "train.ema=0.5")
        experiment = build_experiment(config, data_dir=data_dir)
        task = experiment.task
        frozen = place_frozen(task.load_frozen(), mesh)
        paths = trained_paths(task, frozen, batch_shapes(experiment))
        optimizer, root = build_optimizer(experiment, paths), jax.random.key(0)
        _, fresh = init_state(task, optimizer, paths, mesh, root, ema=0.5)
        step = make_train_step(task, optimizer, paths, mesh, accumulate=2, ema=0.5)
        state, recorded = fresh() if state is None else state, []
        with training_batches(experiment, start_step=int(state.step), workers=0) as batches:
            for _ in range(steps):
                sums = no_averages((*task.names, "gradient_norm"))
                state, sums, _ = step(state, sums, frozen, place_batch(mesh, next(batches)), root)
                recorded.append(compute(sums))
        return jax.tree.map(jnp.copy, state), recorded

    moved, recorded = run(MOVING, None, 4)
    assert [row["teacher_tap"] for row in recorded] == [2, 2, 4, 4]
    first, early = run("distill.teacher.tap=2", None, 2)
    second, late = run("distill.teacher.tap=4", first, 2)
    for got, want in zip(recorded, early + late, strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
    # Float32, compiled as a branch and alone; the updates are about 1e-3.
    for part in ("params", "extra"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), getattr(moved, part), getattr(second, part)
        )


def test_a_run_shows_its_parts_and_resumes_across_a_change_to_the_same_bits(
    teacher, data_dir, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    words = [MOVING, "distill.target=output(norm=fixed)", "distill.statistics_images=12"]
    config, whole, resumed = distill(teacher, *words), tmp_path / "whole", tmp_path / "resumed"
    train(config, whole, data_dir=data_dir)
    assert "from step 1 on: teacher_tap 2" in caplog.text
    assert "from step 3 on: teacher_tap 4" in caplog.text
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/teacher_tap"] for row in rows if "train/teacher_tap" in row] == [2, 2, 4, 4]
    model, params = load_params(whole)
    assert model["teacher"]["blocks"] == [[2, 4], [2, 2]]
    # Each pair of blocks has an adapter and statistics of its own; each saw two batches of eight images.
    assert {name: part["output"]["images"] for name, part in params["statistics"].items()} == {
        "taps_0": 16,
        "taps_1": 16,
    }
    assert set(params["adapter"]) == {"taps_0", "taps_1"}
    # Stopped before and after the change: after steps 1 and 3.
    dispatched, steps = RunLog.dispatched, itertools.count(1)

    def interrupted(self, result):
        dispatched(self, result)
        if next(steps) in (1, 3):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "dispatched", interrupted)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train(config, resumed, data_dir=data_dir)
    train(config, resumed, data_dir=data_dir)
    assert same_bits(params, load_params(resumed)[1])
    # A replayed step is one of its part.
    steps = [replay(str(whole), number, data_dir=data_dir) for number in (2, 3)]
    assert [step.losses["teacher_tap"][0] for step in steps] == [2, 4]
    for step, row in zip(steps, rows[1:3], strict=True):
        np.testing.assert_allclose(step.losses["loss"].mean(), row["train/loss"], rtol=1e-5)
    # It may be extended: its parts stay where they are.
    longer = from_json(json.loads((whole / "config.json").read_text()))
    experiment = build_experiment(longer, data_dir=data_dir)
    assert [phase.span for phase in experiment.task.phases] == [range(0, 2), range(2, 4)]


def test_flops_are_those_of_the_blocks_that_run(teacher):
    one = "distill.teacher.tap=(('0 steps', 2), ('1 steps', 4))"
    planned = plan_experiment(distill(teacher, one))
    task, frozen, batch = planned.experiment.task, planned.frozen, batch_shapes(planned.experiment)
    constant = []
    for block in (2, 4):
        other = task_of(distill(teacher, f"distill.teacher.tap={block}"))
        constant.append(step_flops(other, other.load_frozen(), batch))
    assert phase_flops(task, frozen, batch) == constant
    assert constant[0] < constant[1]
    assert planned.flops[0] == round((constant[0] + 3 * constant[1]) / 4)
    assert planned.phases == ((1, "teacher_tap 2", constant[0]), (3, "teacher_tap 4", constant[1]))


def test_all_blocks_that_are_compared_once_are_trained(teacher):
    moving = task_of(distill(teacher, "distill.student_tap=(('0 steps', 1), ('2 steps', 2))"))
    paths = trained_paths(moving, moving.load_frozen(), BATCH)
    constant = task_of(distill(teacher))
    assert paths == trained_paths(constant, constant.load_frozen(), BATCH)
    # The adaptive block: both are compared with the teacher's last.
    assert moving.model["encoder"]["heads"] == [4, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.teacher.tap=nine"], r"distill\.teacher\.tap='nine' is neither a block"),
        (["distill.teacher.tap=2.0"], r"distill\.teacher\.tap=2\.0 is neither a block"),
        (["distill.student_tap=(('1 steps', 1), ('2 steps', 2))"], r"distill\.student_tap=.* from the start on"),
        (["distill.teacher.tap=(('0 steps', 1), ('3 steps', 2), ('2 steps', 3))"], r"from the start on, in order"),
        (
            ["distill.teacher.tap=((0, 1), (2, 2))"],
            r"is neither a block, counted from 1, nor a list of \(when, block\)",
        ),
        (["distill.teacher.tap=(('0 steps', None),)"], r"is neither a block"),
        (["distill.teacher.tap=(('0 steps', 1), ('half', 2))"], r"distill\.teacher\.tap='half' is not a duration"),
        (["distill.teacher.tap=(('0 steps', 2), ('1 epochs', 5))"], r"distill\.teacher\.tap=5: \S+ has blocks 1 to 4"),
        (["distill.student_tap=(('0 steps', 1), ('1 steps', 3))"], r"distill\.student_tap: the student has no block 3"),
        (
            [MOVING, "distill.student_tap=(('0 epochs', 1), ('1 epochs', 2))"],
            r"distill\.student_tap and distill\.teacher\.tap: the order of epochs and steps is not known",
        ),
        ([MOVING, "distill.taps=((2, 2, 1.0),)"], r"distill\.taps=.*set both to None"),
    ],
)
def test_mistakes_name_the_remedy(teacher, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(distill(teacher, *words))


def test_a_change_after_the_end_is_refused(teacher, data_dir):
    late = "distill.teacher.tap=(('0 steps', 2), ('4 steps', 4))"
    with pytest.raises(
        ValueError, match=r"after '4 steps' \(teacher_tap 4\) has no step: it would be steps 5 to 4 of 4"
    ):
        build_experiment(distill(teacher, late), data_dir=data_dir)
