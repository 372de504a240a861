"""Several students in one step: each is trained as it would be alone, and is found by its name afterwards."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import check_page
from runs import DIGITS, SMALL, same_bits, small_config

from tinymim_jax import optim
from tinymim_jax.analysis.replay import replay
from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_params, load_record, save_params
from tinymim_jax.config import apply_overrides, from_json, load_config, parse
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.model_card import licence_of, lineage
from tinymim_jax.evaluation.predictor import load
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer, training_batches
from tinymim_jax.flops import matmul_flops, step_flops
from tinymim_jax.metrics import compute, no_averages
from tinymim_jax.models.vit import ViT
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.reports.record import by_student
from tinymim_jax.resume import check_same
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.starter.teacher import find_teacher
from tinymim_jax.state import init_state, make_train_step, place_frozen, trained_paths
from tinymim_jax.sweeps.checks import check_points
from tinymim_jax.sweeps.points import Point, Stage, make_runs
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.distill.settings import student_settings
from tinymim_jax.train import train

TEACHER = ViT(32, 3, 4, 4, (16, 16))
OTHER = ViT(48, 2, 3, 8, (16, 16))
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.zeros(4, jnp.int32)}
KEY = jax.random.key(5)
# The first student, and one of another width, depth, patch size, target and drop path.
FIRST = ("model.patch_size=4", "model.drop_path=0.2", "distill.heads=resplit", "distill.jitter.contrast=0.4")
MODEL = {"embed_dim": 32, "depth": 3, "heads": 2, "patch_size": 8, "drop_path": 0.3}
OWN = {"target": "vv + output(norm=fixed, loss=mse)", "student_tap": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random teachers, with licences."""
    path = tmp_path_factory.mktemp("teachers")
    for name, vit in (("small", TEACHER), ("wide", OTHER)):
        params = jax.jit(vit.init)(jax.random.key(len(name)), np.zeros((1, 16, 16, 3), np.float32))["params"]
        source = {"family": "vit", "licence": f"licence of {name}"}
        save_params(path / name, {"encoder": params}, {"encoder": vit.record(), "source": source})
    return path


def students(**entries):
    """Overrides for further students: NAME=(model keys, other keys)."""
    words = []
    for name, (model, own) in entries.items():
        words += [f"distill.students.{name}.model.{key}={value}" for key, value in model.items()]
        words += [f"distill.students.{name}.{key}={value}" for key, value in ({"lr_scale": 1.0} | own).items()]
    return words


def alone(model, own):
    """Overrides for the same student as the only one."""
    return [f"model.{key}={value}" for key, value in model.items()] + [f"distill.{k}={v}" for k, v in own.items()]


def distill(folder, *words):
    return small_config("distill", f"distill.teacher.path={folder / 'small'}", *FIRST, *words)


def task_of(config):
    return TASKS["distill"].build(config, DIGITS)


def close(got, want, **tolerance):
    """Float32, compiled in one program or in two."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 2e-5, "atol": 1e-6} | tolerance)), got, want)


def trained(config, data_dir, steps=3):
    """(state, figures of every step) on one device."""
    mesh, experiment = make_mesh(devices=jax.devices()[:1]), build_experiment(config, data_dir=data_dir)
    task, settings = experiment.task, experiment.config.train
    frozen = place_frozen(task.load_frozen(), mesh)
    paths = trained_paths(task, frozen, batch_shapes(experiment))
    optimizer, root = build_optimizer(experiment, paths), jax.random.key(config.seed)
    _, fresh = init_state(task, optimizer, paths, mesh, root, ema=settings.ema)
    step = make_train_step(task, optimizer, paths, mesh, accumulate=settings.accumulate, ema=settings.ema)
    state, rows = fresh(), []
    with training_batches(experiment, start_step=0, workers=0) as batches:
        for _ in range(steps):
            sums = no_averages((*task.names, "gradient_norm"))
            state, sums, _ = step(state, sums, frozen, place_batch(mesh, next(batches)), root)
            rows.append(compute(sums))
    return state, rows


def test_what_is_said_of_a_teacher_is_said_once(folder, caplog):
    with caplog.at_level("INFO", logger="tinymim_jax"):
        task_of(distill(folder, *students(other=(MODEL, OWN), third=(MODEL, {}))))
    said = [record.getMessage() for record in caplog.records if "pixels are normalized" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("distill.teacher: ")


def test_each_student_is_trained_as_it_would_be_alone(folder, data_dir):
    """Three steps with clipped gradients, layer decay, micro-batches and a moving average, against each one's own."""
    words = ["optim.clip_norm=0.05", "optim.layer_decay=0.7", "train.accumulate=2", "train.ema=0.5"]
    words += ["optim.base_lr=0.1", "optim.warmup=0 steps", "distill.statistics_images=20"]
    both, rows = trained(distill(folder, *words, *students(other=(MODEL, OWN))), data_dir)
    first, first_rows = trained(distill(folder, *words), data_dir)
    second, second_rows = trained(distill(folder, *words, *alone(MODEL, OWN)), data_dir)
    for part in (lambda state: state.params, lambda state: state.extra["ema"]):
        found = dict(part(both))
        others = found.pop("students")
        assert set(others) == {"other"}
        # Updates are about 0.003, and Adam divides by gradients of about 1e-4.
        close(found, part(first), rtol=0, atol=3e-6)
        close(others["other"], part(second), rtol=0, atol=3e-6)
    assert float(both.params["students"]["other"]["statistics"]["taps_1"]["output"]["images"]) == 20
    names = {"student_qk": "qk", "student_vv": "vv", "student": "loss"}
    for row, one, two in zip(rows, first_rows, second_rows, strict=True):
        close({name: row[name] for name in names}, {name: one[own] for name, own in names.items()})
        close([row["other"], row["other_vv"], row["other_output"]], [two[name] for name in ("loss", "vv", "output")])
        close([row["loss"]], [one["loss"] + two["loss"]])
        close([row["gradient_norm"]], [np.hypot(one["gradient_norm"], two["gradient_norm"])])
    # Gradients were clipped: their norms are above the limit, and not equal.
    assert min(first_rows[0]["gradient_norm"], second_rows[0]["gradient_norm"]) > 0.05


def test_a_learning_rate_of_ones_own(folder, data_dir):
    """Ten times smaller for the second of two equal students."""
    words = ["optim.warmup=0 steps", *students(slow=({}, {"lr_scale": 0.1}))]
    config = distill(folder, *words)
    before, _ = trained(config, data_dir, steps=0)
    after, _ = trained(config, data_dir, steps=1)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), after.params, before.params)
    slow, kernel = moved["students"]["slow"], ("encoder", "blocks_0", "mlp", "fc1", "kernel")
    assert same_bits(before.params["students"]["slow"]["encoder"], before.params["encoder"])
    for name in kernel:
        slow, moved = slow[name], moved[name]
    np.testing.assert_allclose(slow, 0.1 * moved, rtol=0, atol=3e-8)  # half of the last bit of each of these weights
    assert np.abs(moved).max() > 1e-4


def test_the_config_of_one_student_has_its_learning_rate(folder):
    config = distill(folder, "optim.final_lr=1e-3", *students(slow=(MODEL, {"lr_scale": 0.25, **OWN})))
    own = student_settings(config)["slow"]
    assert (own.optim.base_lr, own.optim.final_lr) == (0.25 * config.optim.base_lr, 2.5e-4)
    want = distill(folder, *alone(MODEL, OWN), f"optim.base_lr={own.optim.base_lr}", "optim.final_lr=2.5e-4")
    assert own.to_dict() == want.to_dict()
    assert student_settings(config)["student"].to_dict() == distill(folder, "optim.final_lr=1e-3").to_dict()


def test_optimizers_side_by_side():
    """With clipping, decay and layer decay; the reference is each optimizer on its own."""
    rng = np.random.default_rng(0)

    def tree():
        return {"encoder": {"blocks_0": {"k": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}}}

    settings = {"weight_decay": 0.1, "layer_decay": 0.5, "clip_norm": 0.5}
    params = tree() | {"students": {"a": tree(), "b": tree()}}
    one = {
        name: optim.make_optimizer("adamw", lambda step: 0.01 * (step + 1), tree(), depth=depth, **settings)
        for depth, name in enumerate(("", "a", "b"), 1)
    }
    joined = optim.with_others(one[""], {"a": one["a"], "b": one["b"]}, "students")
    state, apart = joined.init(params), {}
    for step in range(2):
        grads = tree() | {"students": {"a": tree(), "b": tree()}}
        updates, state = joined.update(grads, state, params, step=jnp.asarray(3 * step))
        for name, optimizer in one.items():
            own = params["students"][name] if name else {"encoder": params["encoder"]}
            grad = grads["students"][name] if name else {"encoder": grads["encoder"]}
            before = apart[name] if step else optimizer.init(own)
            want, apart[name] = optimizer.update(grad, before, own, step=jnp.asarray(3 * step))
            got = updates["students"][name] if name else {"encoder": updates["encoder"]}
            assert same_bits(got, want)
        params = optax.apply_updates(params, updates)


def test_the_teacher_runs_once(folder):
    """FLOPs of the traced step and of the compiled one, against both trainings apart and a pass of the teacher."""
    words = ["distill.teacher.drop_path=0.2"]
    more = (students(b=(MODEL, {})), [], alone(MODEL, {}))
    both, one, two = (task_of(distill(folder, *words, *own)) for own in more)
    frozen = both.load_frozen()

    def compared(params, images):
        tap = TEACHER.apply({"params": params}, images, tap=3, method="encode")
        return tap.q, tap.k, tap.v

    teacher = matmul_flops(compared, frozen, jnp.zeros((4, 16, 16, 3)))
    flops = [step_flops(task, frozen, BATCH) for task in (both, one, two)]
    assert flops[0] == flops[1] + flops[2] - teacher

    def compiled(task):
        def gradient(params, frozen):
            return jax.grad(lambda p: task.losses(p, frozen, BATCH, KEY, True)["loss"].mean())(params)

        analysis = jax.jit(gradient).lower(task.init(KEY), frozen).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    found = [compiled(task) for task in (both, one, two)]
    assert found[1] + found[2] - found[0] > 0.9 * teacher


FAMILY = {"ti": (MODEL, {"target": "vv + output"}), "twin": ({}, {})}


@pytest.fixture(scope="module")
def run(folder, data_dir, tmp_path_factory):
    """(folder of a finished run of four steps with three students, its config)."""
    path = tmp_path_factory.mktemp("runs") / "family"
    words = ["train.probe_every=4 steps", "train.probe_images=40", "train.ema=0.5", *students(**FAMILY)]
    config = distill(folder, *words)
    train(config, path, data_dir=data_dir)
    return path, config


def test_a_run_has_figures_and_records_of_each_student(run):
    path, _ = run
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    parts = {"student", "student_qk", "student_vv", "ti", "ti_vv", "ti_output", "twin", "twin_qk", "twin_vv"}
    assert {f"train/{name}" for name in ("loss", "gradient_norm", *parts)} == {
        name for name in rows[0] if name.startswith("train/")
    }
    result = json.loads((path / "result.json").read_text())
    assert parts <= set(result)
    assert result["loss"] == pytest.approx(result["student"] + result["ti"] + result["twin"], rel=1e-5)
    probed = next(row for row in rows if "probe/knn" in row)
    assert {"probe/ti_knn", "probe/twin_knn", "probe/ti_effective_rank"} <= set(probed)
    assert probed["probe/twin_effective_rank"] == pytest.approx(probed["probe/effective_rank"], rel=1e-4)
    assert probed["probe/ti_effective_rank"] != pytest.approx(probed["probe/effective_rank"], rel=1e-2)
    record = json.loads((path / "students" / "ti" / "model.json").read_text())
    assert (record["encoder"]["embed_dim"], record["encoder"]["depth"], record["encoder"]["patch_size"]) == (32, 3, 8)
    assert record["teacher"]["blocks"] == [[3, 3]]
    assert set(record) >= {"adapter", "preprocessing", "lineage"}
    first = json.loads((path / "model.json").read_text())
    assert first["teacher"]["blocks"] == [[2, 3]]
    assert "adapter" not in first
    own = from_json(json.loads((path / "students" / "ti" / "config.json").read_text()))
    assert (own.model.embed_dim, own.distill.target, list(own.distill.students)) == (32, "vv + output", [])
    assert licence_of(str(path / "students" / "ti")) == "licence of small"
    assert lineage(str(path / "students" / "ti"))[0]["teacher"] == "small"


def test_the_report_has_a_row_for_each_student(run):
    path, _ = run
    page = check_page((path / "report.html").read_text())
    result = json.loads((path / "result.json").read_text())
    cells = page.texts["td"]
    start = cells.index("student")
    # student, loss, qk, vv, output
    assert cells[start : start + 15 : 5] == ["student", "ti", "twin"]
    assert cells[start + 6 : start + 10] == [
        f"{result['ti']:.4g}",
        "-",
        f"{result['ti_vv']:.4g}",
        f"{result['ti_output']:.4g}",
    ]
    drawn = set(re.findall(r"(\w+): [\d.]+ at step", " ".join(page.texts["desc"])))
    assert {"student", "ti", "twin", "gradient_norm"} <= drawn
    assert not drawn & {"loss", "student_qk", "ti_output"}


def test_figures_belong_to_the_longest_name_that_fits():
    figures = {"loss": 3, "ti": 1, "ti_qk": 0.5, "ti_long": 2, "ti_long_qk": 0.25, "examples": 9}
    common, own = by_student(figures, ("student", "ti", "ti_long"))
    assert common == {"loss": 3, "examples": 9}
    assert own == {"ti": {"loss": 1, "qk": 0.5}, "ti_long": {"loss": 2, "qk": 0.25}}


def test_weights_are_found_by_the_students_folder(run, data_dir, tmp_path):
    path, config = run
    first, ti = load_params(path)[1], load_params(path / "students" / "ti")[1]
    assert set(first) == {"encoder"}
    assert set(ti) == {"encoder", "adapter"}
    assert ti["encoder"]["blocks_0"]["mlp"]["fc1"]["kernel"].shape == (32, 128)
    close(load_params(path / "students" / "twin")[1]["encoder"], first["encoder"])
    # They are the moving averages, which are what was evaluated.
    experiment = build_experiment(config, data_dir=data_dir)
    params = first | {"students": {"ti": ti, "twin": load_params(path / "students" / "twin")[1]}}
    assert jax.tree.structure(jax.device_get(experiment.task.init(KEY))) == jax.tree.structure(params)
    result = json.loads((path / "result.json").read_text())
    found = evaluate_checkpoint(config, path, data_dir=data_dir)
    close({name: found[name] for name in result}, result, rtol=1e-4)
    own = from_json(json.loads((path / "students" / "ti" / "config.json").read_text()))
    found = evaluate_checkpoint(own, path / "students" / "ti", data_dir=data_dir)
    assert found["loss"] == pytest.approx(result["ti"], rel=1e-4)
    # Features, fine-tuning and distillations that learn from one of them.
    found = find_teacher(f"{path}/students/ti", tmp_path / "converted")
    assert (found.path, found.record["encoder"]["embed_dim"]) == (str((path / "students" / "ti").resolve()), 32)
    assert load(str(path / "students" / "ti")).embed(IMAGES).shape == (4, 32)
    words = [f"init={path}/students/ti", "model.embed_dim=32", "model.depth=3", "train.duration=1 steps"]
    train(small_config("finetune", *words, "optim.warmup=0 steps"), tmp_path / "tuned", data_dir=data_dir)
    assert json.loads((tmp_path / "tuned" / "model.json").read_text())["lineage"][0]["licence"] == "licence of small"
    taught = task_of(small_config("distill", f"distill.teacher.path={path}/students/ti", "distill.heads=resplit"))
    assert same_bits(taught.load_frozen()["blocks_0"], ti["encoder"]["blocks_0"])


def test_students_start_from_checkpoints_of_their_own(run, folder):
    path, _ = run
    entries = {"ti": (MODEL, {"init": f"{path}/students/ti", "target": "vv + output"}), "new": (MODEL, {})}
    task = task_of(distill(folder, *students(**entries)))
    fresh = jax.device_get(task.init(KEY))
    assert task.start is not None
    params = task.start(fresh)
    assert same_bits(params["students"]["ti"], load_params(path / "students" / "ti")[1])
    params["students"]["ti"] = fresh["students"]["ti"]
    assert same_bits(params, fresh)
    model = {"depth": 3, "heads": 2}
    task = task_of(distill(folder, *students(ti=(model, {"init": f"{path}/students/ti"}))))
    words = r"student 'ti': distill\.students\.ti\.init=(?s:.)*add distill\.students\.ti\.model\.embed_dim=32"
    with pytest.raises(CheckpointError, match=words):
        task.start(jax.device_get(task.init(KEY)))


def test_names_that_are_no_students(run):
    path, _ = run
    with pytest.raises(
        CheckpointError, match=r"students/b is not a student of the run .*/students/ti, .*/students/twin"
    ):
        load_params(path / "students" / "b")
    with pytest.raises(CheckpointError, match=r"one of its further students: .*/students/ti"):
        load_record(path / "students" / "b")
    with pytest.raises(CheckpointError, match=r"one of its further students: .*/students/ti"):
        load_params(path / "students")


def test_a_run_resumes_to_the_same_bits_and_its_steps_can_be_replayed(run, folder, data_dir, tmp_path):
    path, config = run
    shutil.copytree(path, tmp_path / "again")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step), ignore_errors=True)
    (tmp_path / "again" / "result.json").unlink()
    train(config, tmp_path / "again", data_dir=data_dir)
    for name in ("", "students/ti", "students/twin"):
        assert same_bits(load_params(tmp_path / "again" / name)[1], load_params(path / name)[1])
    step = replay(str(path), 4, data_dir=data_dir)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    wanted = next(row for row in rows if row["step"] == 4 and "train/ti" in row)
    assert step.losses["ti"].mean() == pytest.approx(wanted["train/ti"], rel=1e-4)
    assert any(layer["name"].startswith("students/ti/encoder/blocks_2") for layer in step.layers)
    changed = distill(folder, *students(**FAMILY), "train.ema=0.5", "distill.students.ti.lr_scale=2")
    with pytest.raises(ValueError, match=r"distill\.students\.ti\.lr_scale: 1\.0 there, 2\.0 here"):
        check_same(path, changed)


@pytest.mark.parametrize(
    "words",
    [
        [
            *("distill.mask_ratio=0.5", "distill.mim_weight=0.5", "distill.teacher.masked=True"),
            *(f"distill.mim.decoder_{word}" for word in ("dim=8", "depth=1", "heads=2")),
            *(f"distill.teachers.more.{word}" for word in ("path=WIDE", "weight=0.5", "target=output")),
        ],
        [
            *("distill.target=output(hidden=0.5)", "distill.wide_last=True", "model.scan=True", "model.remat=dots"),
            *(f"distill.teacher.{word}" for word in ("int8=True", "jitter.contrast=0.4", "drop_path=0.3")),
        ],
    ],
)
def test_losses_and_gradients_with_the_options_of_distillation(folder, words):
    words = [word.replace("WIDE", str(folder / "wide")) for word in words]
    model = {"embed_dim": 24}
    more = (students(b=(model, {})), [], alone(model, {}))
    both, *apart = (task_of(distill(folder, *words, *own)) for own in more)
    frozen = jax.tree.map(jnp.asarray, both.load_frozen())
    assert same_bits(frozen, apart[0].load_frozen())

    def results(task, params):
        def loss(params):
            values = task.losses(params, frozen, BATCH, KEY, True)
            return values["loss"].mean(), values

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    params = jax.device_get(both.init(KEY))
    grads, values = results(both, params)
    assert set(values) == set(both.names)
    own = {"student": (params, grads), "b": (params.pop("students")["b"], grads.pop("students")["b"])}
    for task, (name, (initial, gradient)) in zip(apart, own.items(), strict=True):
        want, wanted = results(task, initial)
        close(gradient, want, atol=2e-5)
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want)) > 1e-3
        close(values[name], wanted.pop("loss"))
        close({each: values[f"{name}_{each}"] for each in wanted}, wanted)


def test_blocks_of_the_teacher_that_only_one_student_needs(folder):
    own = {"taps": "((1,2,1.0),(3,3,0.5))"}
    task = task_of(distill(folder, "distill.teacher.tap=1", *students(b=(MODEL, own))))
    first, second = task_of(distill(folder, "distill.teacher.tap=1")), task_of(distill(folder, *alone(MODEL, own)))
    assert set(first.load_frozen()) < set(task.load_frozen()) == set(second.load_frozen())
    assert set(task.names) >= {"student_qk", "b_qk_1_2", "b_vv_3_3"}

    def losses(task, function):
        return jax.jit(function, static_argnums=4)(task.init(KEY), task.load_frozen(), BATCH, KEY, False)

    values, *apart = (losses(each, each.losses) for each in (task, first, second))
    close([values["student"], values["b"]], [found["loss"] for found in apart])
    moving = ["distill.teacher.tap=(('0 steps', 1), ('2 steps', 3))", *students(b=(MODEL, {"student_tap": 1}))]
    task = task_of(distill(folder, *moving))
    assert [phase.label for phase in task.phases] == [
        f"student_teacher_tap {block}, b_teacher_tap {block}" for block in (1, 3)
    ]
    close([losses(task, task.phases[0].losses)["student"]], [apart[0]["loss"]])


def test_a_family_is_planned_and_chained(folder, data_dir, tmp_path):
    planned = plan_experiment(distill(folder, *students(ti=(MODEL, {"init": "nowhere"}))), data_dir=data_dir)
    assert any("nowhere" in note for note in planned.notes)
    assert planned.experiment.task.start is not None

    def stage(name, config, *words):
        return Stage(name, config, {key: parse(value) for key, value in (word.split("=", 1) for word in words)})

    words = ["distill.teacher.tap=None", *SMALL, f"distill.teacher.path={folder / 'small'}", *FIRST]
    family = stage("family", "configs/digits.py:distill", *words, *students(ti=(MODEL, {})))
    words = [*SMALL, "model.embed_dim=32", "model.depth=3", "init={family}/students/ti"]
    tuned = stage("tuned", "configs/digits.py:finetune", *words)
    runs = make_runs([family, tuned], tmp_path)
    assert f"init={tmp_path}/family/students/ti" in runs[1].overrides
    check_points([Point("", 0, None, {}, {}, runs)], data_dir=data_dir)
    wrong = dataclasses.replace(tuned, overrides={**tuned.overrides, "init": "{family}/students/b"})
    with pytest.raises(ValueError, match=r"stage tuned: .*students/b does not exist"):
        check_points([Point("", 0, None, {}, {}, make_runs([family, wrong], tmp_path))], data_dir=data_dir)


def test_a_size_of_its_own_is_not_mixed_with_that_of_the_first():
    config = load_config("configs/distill_s.py", ["distill.students.b.model.variant=B"])
    own = student_settings(config)["b"].model
    assert (own.variant, own.heads, own.embed_dim) == ("B", None, None)  # the first one has 6 heads
    apply_overrides(config, ["distill.students.b.model.heads=(6,12)", "distill.students.c.model.drop_path=0"])
    assert student_settings(config)["b"].model.heads == (6, 12)
    assert (student_settings(config)["c"].model.heads, student_settings(config)["c"].model.drop_path) == (6, 0.0)
    assert list(config.distill.students) == ["b", "c"]
    old = json.loads(json.dumps(config.to_dict()))
    del old["distill"]["students"]["b"]["lr_scale"], old["distill"]["students"]["b"]["model"]["stem"]
    read = from_json(old).distill.students.b
    assert (read.lr_scale, read.model.stem) == (1.0, None)
    del old["distill"]["students"]
    assert list(from_json(old).distill.students) == []
    with pytest.raises(ValueError, match=r"did you mean 'distill\.students\.b\.model\.variant'"):
        load_config("configs/distill_s.py", ["distill.students.b.model.varint=B"])


def test_what_tracing_finds_is_named_with_the_students_keys(folder):
    task = task_of(distill(folder, "distill.mask_ratio=0.5", *students(b=({"stem": "conv"}, {}))))
    with pytest.raises(ValueError, match=r"student 'b': distill\.students\.b\.model\.stem='conv': neighboring patches"):
        step_flops(task, task.load_frozen(), BATCH)


@pytest.mark.parametrize(
    ("model", "own", "words", "message"),
    [
        ({"variant": "Tiny"}, {}, [], r"student 'b': distill\.students\.b\.model\.variant='Tiny' is unknown"),
        ({}, {"target": "fnn"}, [], r"student 'b': distill\.students\.b\.target='fnn' is unknown; did you mean 'ffn'"),
        ({}, {"student_tap": 3}, [], r"student 'b': distill\.students\.b\.student_tap: the student has no block 3"),
        ({}, {"taps": "((3,1,1.0),)"}, [], r"student 'b': distill\.students\.b\.taps: the student has no block 3"),
        ({}, {"lr_scale": 0}, [], r"distill\.students\.b\.lr_scale=0\.0 must be positive"),
        (
            {"stem": "conv"},
            {},
            ["distill.target=output(hidden=0.5)"],
            r"student 'b': distill\.students\.b\.target: hidden=.* set distill\.students\.b\.model\.stem='linear'",
        ),
        (
            {},
            {},
            ["distill.teacher.drop_patches=0.5"],
            r"drop_patches=0\.5 of the teacher: the attention of one student chooses .* set it to 0",
        ),
        ({}, {}, ["distill.students.teacher.target=qk"], r"a student cannot be called 'teacher'"),
        ({}, {}, ["distill.students.b_vv.target=vv"], r"the losses b_vv are those of two students: rename one"),
    ],
)
def test_what_does_not_fit_is_named_with_the_students_keys(folder, model, own, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(distill(folder, *words, *students(b=(model, own)), "distill.students.b.init="))
