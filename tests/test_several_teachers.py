"""Several teachers in one step: values and gradients, what the run records of them, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, same_bits, small_config
from test_cnn import state_of

from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.config import apply_overrides, from_json, load_config
from tinymim_jax.convert.cnn import from_cnn
from tinymim_jax.evaluation.model_card import licence_of, lineage
from tinymim_jax.flops import matmul_flops, step_flops
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.token_grid import resize_images
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.resume import check_same
from tinymim_jax.sweeps.points import Stage, make_runs
from tinymim_jax.tasks import TASKS
from tinymim_jax.train import train

# Of another width, depth, patch size and number of heads, and of other pixels.
SIZES = {"small": (32, 3, 4, 4), "wide": (48, 2, 3, 8)}
PIXELS = {"small": ((0.5,) * 3, (0.5,) * 3), "wide": ((0.2, 0.3, 0.4), (0.3, 0.2, 0.1))}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.zeros(4, jnp.int32)}
KEY = jax.random.key(5)
CLEAN = tuple(f"distill.jitter.{name}=0.0" for name in ("brightness", "contrast", "saturation"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random teachers, with licences."""
    path = tmp_path_factory.mktemp("teachers")
    for name, (width, depth, heads, patch) in SIZES.items():
        vit = ViT(width, depth, heads, patch, (16, 16))
        params = jax.jit(vit.init)(jax.random.key(len(name)), np.zeros((1, 16, 16, 3), np.float32))["params"]
        record = {"encoder": vit.record(), "source": {"family": "vit", "licence": f"licence of {name}"}}
        record["preprocessing"] = dict(zip(("mean", "std"), map(list, PIXELS[name])))
        save_params(path / name, {"encoder": params}, record)
    return path


def distill(folder, *words, first="small", **more):
    """A student of 16 x 2 blocks; `more` are further teachers: NAME=(folder, its words)."""
    given = [f"distill.teacher.path={folder / first}", "model.patch_size=4", "distill.heads=resplit"]
    for name, (path, own) in more.items():
        given += [f"distill.teachers.{name}.{word}" for word in (f"path={folder / path}", *own)]
    return small_config("distill", *given, *words)


def task_of(config):
    return TASKS["distill"].build(config, DIGITS)


def gradients_of(task, params):
    """(values, gradients of the loss) of a training step."""

    def loss(params, frozen):
        values = task.losses(params, frozen, BATCH, KEY, True)
        return values["loss"].mean(), values

    (_, values), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, task.load_frozen())
    return values, grads


def close(got, want):
    """Float32, with sums in another order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), got, want)


def test_two_equal_teachers_of_half_the_weight_are_one(folder):
    noisy = ["distill.teacher.jitter.contrast=0.4", "model.drop_path=0.2", "distill.teacher.drop_path=0.2"]
    one = task_of(distill(folder, *noisy))
    own = ["weight=0.5", "jitter.contrast=0.4", "drop_path=0.2"]
    two = task_of(distill(folder, *noisy, "distill.teacher.weight=0.5", again=("small", own)))
    params = one.init(jax.random.key(2))
    assert same_bits(two.init(jax.random.key(2)), params)
    (values, grads), (both, both_grads) = gradients_of(one, params), gradients_of(two, params)
    close(both["loss"], values["loss"])
    close(both_grads, grads)
    assert set(both) == {"loss", *(f"{name}{part}" for name in ("teacher", "again") for part in ("", "_qk", "_vv"))}
    for name in ("teacher", "again"):
        close([both[name], both[f"{name}_qk"]], [values["loss"], values["qk"]])
    assert two.names[0] == "loss"
    assert set(two.names) == set(both)


def test_a_weight_of_0_leaves_the_other_alone(folder):
    one, params = task_of(distill(folder)), None
    two = task_of(distill(folder, other=("wide", ["weight=0", "target=output"])))
    params = two.init(jax.random.key(2))
    (values, grads), (both, both_grads) = gradients_of(one, params), gradients_of(two, params)
    close([both["loss"], both["teacher_vv"]], [values["loss"], values["vv"]])
    close(both_grads["encoder"], grads["encoder"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(both_grads["adapter"]))
    assert (np.asarray(both["other"]) > 0.01).all()  # it is recorded


# Each with a target, tap, image size and grid of its own.
OTHER = ["weight=2.5", "target='output(loss=mse, norm=fixed) + v(student=1)'", "tap=1", "image_size=(32,32)"]
ALONE = ["distill.target='output(loss=mse, norm=fixed) + v(student=1)'", "distill.teacher.tap=1"]


def test_the_loss_is_the_weighted_sum_of_the_teachers_own(folder):
    """Against the training with each teacher alone; the student's drop path is the same in all of them."""
    quoted = [word.replace("'", "") for word in OTHER]
    both = task_of(distill(folder, "distill.teacher.weight=0.25", "model.drop_path=0.3", other=("wide", quoted)))
    first = task_of(distill(folder, "model.drop_path=0.3"))
    words = [word.replace("'", "") for word in (*ALONE, "distill.teacher.image_size=(32,32)", "model.drop_path=0.3")]
    second = task_of(distill(folder, *words, first="wide"))
    params = both.init(jax.random.key(2))
    assert set(params["adapter"]) == set(params["statistics"]) == {"other"}
    values, grads = gradients_of(both, params)
    alone = [gradients_of(first, {"encoder": params["encoder"]})]
    own = {"encoder": params["encoder"]} | {part: params[part]["other"] for part in ("adapter", "statistics")}
    alone.append(gradients_of(second, own))
    close(values["loss"], 0.25 * alone[0][0]["loss"] + 2.5 * alone[1][0]["loss"])
    for name in ("output_2_1", "v_1_1"):
        close(values[f"other_{name}"], alone[1][0][name])
    close(values["running"]["statistics"]["other"], alone[1][0]["running"]["statistics"])
    want = jax.tree.map(lambda a, b: 0.25 * a + 2.5 * b, *(grads["encoder"] for _, grads in alone))
    close(grads["encoder"], want)
    close(grads["adapter"]["other"], jax.tree.map(lambda leaf: 2.5 * leaf, alone[1][1]["adapter"]))
    assert both.origin["teachers"]["other"]["blocks"] == [[2, 1], [1, 1]]
    assert both.origin["teachers"]["other"]["mean"] == list(PIXELS["wide"][0])
    assert both.origin["teachers"]["other"]["image_size"] == [32, 32]
    assert both.model["adapter"] == {"other": second.model["adapter"]}


def test_the_loss_of_two_features_in_numpy(folder):
    words = ["distill.target=output(loss=mse, norm=fixed)", "model.drop_path=0.0", "distill.teacher.weight=3", *CLEAN]
    task = task_of(distill(folder, *words, other=("wide", ["weight=0.5", "image_size=(32,32)"])))
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, BATCH, KEY, False)
    student = ViT.from_record(task.model["encoder"])

    def output(network, weights, size, pixels):
        view = normalize(resize_images(jnp.asarray(IMAGES, jnp.float32), size), *pixels)
        tap = network.apply({"params": weights}, view, tap=network.depth, method="encode")
        return np.asarray(tap.output, np.float64)

    own, total = output(student, params["encoder"], (16, 16), ((0.5,) * 3, (0.5,) * 3)), 0
    for name, key, size, weight in (("teacher", "small", (16, 16), 3), ("other", "wide", (32, 32), 0.5)):
        network = ViT.from_record(load_params(folder / key)[0]["encoder"], image_size=size)
        wanted = output(network, frozen[name], size, PIXELS[key]) / np.sqrt(1 + 1e-6)  # nothing was counted yet
        linear = params["adapter"][name]["taps_0"]["output"]
        distance = own @ np.asarray(linear["kernel"], np.float64) + np.asarray(linear["bias"]) - wanted
        loss = (distance**2).mean((1, 2))
        np.testing.assert_allclose(got[name], loss, rtol=1e-4)
        total = total + weight * loss
    np.testing.assert_allclose(got["loss"], total, rtol=1e-4)


def test_equal_inputs_give_zero(folder):
    """A student that is the teacher, twice; the gradient of KL is zero there too."""
    sizes = ["model.embed_dim=32", "model.depth=3", "model.heads=4", "model.drop_path=0.0", *CLEAN]
    task = task_of(distill(folder, *sizes, "distill.teacher.weight=3", twin=("small", ["target=qq_kk_vv_oo", "tap=2"])))
    task = task_of(distill(folder, *sizes, "distill.teacher.weight=3", twin=("small", ["target=qq_kk_vv_oo"])))
    params = {"encoder": load_params(folder / "small")[1]["encoder"]}
    values, grads = gradients_of(task, params)
    assert set(values) >= {"teacher_qk", "twin_oo", "twin_kk"}
    for name, value in values.items():
        np.testing.assert_allclose(value, 0, atol=1e-6, err_msg=name)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4


def test_a_convolutional_teacher_beside_a_vit(folder):
    model, params = from_cnn(state_of("resnet"), (64, 64))
    save_params(folder / "resnet", params, model)
    own = ["target=oo(loss=cka, patches=true)", "image_size=(64,64)"]
    task = task_of(distill(folder, cnn=("resnet", own)))
    words = ["distill.target=oo(loss=cka, patches=true)", "distill.teacher.image_size=(64,64)"]
    alone = task_of(distill(folder, *words, first="resnet"))
    params = task.init(jax.random.key(2))
    losses = [jax.jit(t.losses, static_argnums=4)(params, t.load_frozen(), BATCH, KEY, False) for t in (task, alone)]
    close(losses[0]["cnn"], losses[1]["loss"])
    close(losses[0]["loss"], losses[0]["teacher"] + losses[0]["cnn"])


def test_flops_of_a_further_teacher_are_counted(folder):
    words = ["distill.target=output(loss=mse)", "distill.teacher.tap=1"]
    one, two = (task_of(distill(folder, *words, **more)) for more in ({}, {"other": ("wide", ["tap=2"])}))
    flops = [step_flops(t, t.load_frozen(), BATCH) for t in (one, two)]
    network = ViT.from_record(load_params(folder / "wide")[0]["encoder"])
    image = jnp.zeros((4, 16, 16, 3))
    encode = matmul_flops(
        lambda p, x: network.apply({"params": p}, x, tap=2, method="encode").output, two.load_frozen()["other"], image
    )
    resized = 4 * 2 * (4 * 2 * 2 * 48 + 4 * 4 * 2 * 48)  # of its 2 x 2 tokens to 4 x 4, by rows, then by columns
    adapter = 3 * 2 * 4 * 17 * 16 * 48  # forward, and the gradients of values and kernel
    assert abs(flops[1] - flops[0] - encode - adapter) <= 2 * resized
    # `tinymim plan` has zeros of its shapes where it is missing, and an error that names its key without a size.
    words = ["distill.teachers.dino.path=nowhere", "distill.teachers.dino.name=dinov2_vit_small"]
    words.append("distill.teachers.dino.target=vv_oo(heads=1)")
    planned = plan_experiment(distill(folder, *words, "distill.teachers.dino.image_size=(56,56)"))
    assert "zeros of dinov2_vit_small's shapes" in " ".join(planned.notes)
    assert {"teacher", "dino"} == set(planned.frozen)
    with pytest.raises(ValueError, match=r"teacher 'dino': .*distill\.teachers\.dino\.name is empty"):
        plan_experiment(distill(folder, "distill.teachers.dino.path=nowhere"))


def test_a_run_records_all_teachers_and_refuses_others(folder, data_dir, tmp_path):
    for name in ("small", "wide"):
        shutil.copytree(folder / name, tmp_path / name)
    own = {"other": ("wide", ["weight=0.5", "target=output(norm=fixed)"])}
    config, run = distill(tmp_path, "train.duration=2 steps", **own), tmp_path / "run"
    train(config, run, data_dir=data_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/teacher", "train/other", "train/other_output", "train/teacher_qk"} <= set(lines[0])
    assert {"eval/other"} <= set(lines[-1])
    record = json.loads((run / "model.json").read_text())
    found = {(item["name"], item["licence"], item["role"]) for item in record["lineage"]}
    assert found == {(name, f"licence of {name}", "teacher") for name in ("small", "wide")}
    assert lineage(str(run))[0]["teacher other"] == "wide"
    assert licence_of(str(run)) == "licence of small"
    assert record["teachers"]["other"]["checkpoint"] == str(tmp_path / "wide")
    assert load_params(run)[1]["statistics"]["other"]["taps_0"]["output"]["images"] == 16
    # Its path may change while its content is the same.
    (run / "result.json").unlink()
    (tmp_path / "wide").rename(tmp_path / "moved")
    moved = distill(tmp_path, "train.duration=2 steps", other=("moved", own["other"][1]))
    assert set(check_same(run, moved)) == {"distill.teachers.other.path"}
    train(moved, run, data_dir=data_dir)
    model, params = load_params(tmp_path / "moved")
    params["encoder"]["cls_token"] = params["encoder"]["cls_token"] + 1
    save_params(tmp_path / "another", params, model)
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"digest of the frozen weights"):
        train(distill(tmp_path, "train.duration=2 steps", other=("another", own["other"][1])), run, data_dir=data_dir)
    with pytest.raises(ValueError, match=r"distill\.teachers\.other\.weight: 0\.5 there, 1\.0 here"):
        check_same(run, distill(tmp_path, "train.duration=2 steps", other=("moved", own["other"][1][1:])))


def test_config_files_and_overrides_add_teachers(tmp_path):
    config = load_config("configs/distill_s.py", ["distill.teachers.a.path=x", "distill.teachers.a.jitter.contrast=1"])
    assert config.distill.teachers.a.jitter.contrast == 1.0
    assert config.distill.teachers.a.weight == 1.0
    assert config.is_locked
    apply_overrides(config, ["distill.teachers.a.weight=2", "distill.teachers.b.path=y"])
    assert (config.distill.teachers.a.weight, config.distill.teachers.b.path) == (2.0, "y")
    # config.json of a version that had fewer keys, or no further teachers.
    old = json.loads(json.dumps(config.to_dict()))
    del old["distill"]["teachers"]["a"]["weight"], old["distill"]["teacher"]["weight"]
    read = from_json(old)
    assert (read.distill.teachers.a.weight, read.distill.teacher.weight, read.distill.teachers.b.path) == (
        1.0,
        1.0,
        "y",
    )
    del old["distill"]["teachers"]
    assert list(from_json(old).distill.teachers) == []
    # A sweep or chain sets them as other keys, in all stages or in one.
    stages = [Stage("s", "configs/digits.py:distill", {}), Stage("t", "configs/digits.py:finetune", {})]
    runs = make_runs(stages, tmp_path, {"distill.teachers.a.weight": 0.5}, {"s.distill.teachers.b.path": "z"})
    assert runs[0].overrides == ("distill.teachers.a.weight=0.5", "distill.teachers.b.path=z")
    assert runs[1].overrides == ()
    for word, message in (
        ("distill.teachers.a.pth=x", r"did you mean 'distill\.teachers\.a\.path'"),
        ("distill.teachers.path=x", r"override='distill\.teachers\.path' is unknown"),
        ("distill.teachers.a=x", r"override='distill\.teachers\.a' is unknown"),
        ("distill.teachers.new.jitter=1", r"override='distill\.teachers\.new\.jitter' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("configs/distill_s.py", [word])


@pytest.mark.parametrize(
    ("own", "words", "message"),
    [
        (["weight=-1"], [], r"distill\.teachers\.other\.weight=-1\.0 must not be negative"),
        (["tap=3"], [], r"teacher 'other': distill\.teachers\.other\.tap=3: \S+/wide has blocks 1 to 2"),
        (["target=fnn"], [], r"teacher 'other': distill\.teachers\.other\.target='fnn' is unknown; did you mean 'ffn'"),
        (["image_size=(20,20)"], [], r"distill\.teachers\.other\.image_size: images of 20x20 cannot be cut"),
        (["taps=((1,3,1.0),)"], [], r"distill\.teachers\.other\.taps: the teacher has no block 3"),
        (
            ["masked=True", "target=output"],
            [],
            r"distill\.teachers\.other\.masked=True hides the student's hidden patches",
        ),
        (
            ["drop_patches=0.5", "target=output"],
            [],
            r"distill\.teachers\.other\.drop_patches=0\.5 needs a student that sees all",
        ),
        (
            [],
            ["distill.heads=adaptive", "model.embed_dim=48"],
            r"block 2 the 3 heads .* and 4 of another: set it to 're",
        ),
        ([], ["distill.relation_heads=3"], r"3 relation heads do not divide.*student \(16\)"),
        ([], ["distill.teachers.student.path=x"], r"a teacher cannot be called 'student'"),
        (
            [],
            ["distill.teachers.other_vv.path=", "distill.teachers.other_vv.target=qk"],
            r"teacher 'other_vv': .*empty",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_teachers_keys(folder, own, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(distill(folder, *words, other=("wide", own)))


def test_two_teachers_whose_losses_have_one_name(folder):
    more = {"other": ("small", ["target=vv"]), "other_vv": ("small", ["target=qk"])}
    with pytest.raises(ValueError, match=r"the losses other_vv are those of two teachers: rename one"):
        task_of(distill(folder, **more))


def test_adaptive_heads_count_only_where_heads_are_compared(folder):
    words = ["distill.heads=adaptive", "model.embed_dim=48"]
    task = task_of(distill(folder, *words, other=("wide", ["target=output"])))
    assert task.model["encoder"]["heads"] == [2, 4]
    task = task_of(distill(folder, *words, other=("wide", ["taps=((1,2,1.0),)"])))
    assert task.model["encoder"]["heads"] == [3, 4]
