"""A teacher of 8 bits: its products against integers in numpy, its cost on golden weights, and a run with it."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from runs import DIGITS, small_config
from test_cnn import state_of

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.convert import convert_file
from tinymim_jax.convert.cnn import from_cnn
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.layers import Dense
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.int8 import in_int8, int8_product, quantized_kernel
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.distill.eight_bit import check_eight_bit, eight_bit, relation_cost
from tinymim_jax.train import train

RNG = np.random.default_rng(0)


def test_a_product_is_one_of_integers():
    """By numpy's integers, with the same rounding; a channel of zeros and a row of zeros stay zero."""
    x, kernel = RNG.normal(size=(5, 24)).astype(np.float32), RNG.normal(size=(24, 7)).astype(np.float32)
    x[2], kernel[:, 3] = 0, 0
    whole, scale = quantized_kernel(kernel)
    step = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / np.float32(127)
    integers = np.rint(x / step).astype(np.int64) @ np.rint(kernel / scale).astype(np.int64)
    got = np.asarray(int8_product(jnp.asarray(x), jnp.asarray(whole), jnp.asarray(scale)))
    np.testing.assert_allclose(got, integers * step.astype(np.float64) * scale, rtol=1e-5, atol=1e-6)
    assert not got[2].any()
    assert not got[:, 3].any()
    # Each factor is off by half a step at most.
    limit = 24 * (step * np.abs(kernel).max(0) + np.abs(x).max(-1, keepdims=True) * scale)
    assert (np.abs(got - x @ kernel) <= limit).all()
    assert relative_error(got, x @ kernel) <= 0.02


def test_a_linear_layer_of_8_bits_is_told_by_its_parameters():
    x = jnp.asarray(RNG.normal(size=(3, 5, 32)), jnp.float32)
    exact = {"kernel": RNG.normal(size=(32, 16)).astype(np.float32), "bias": RNG.normal(size=16).astype(np.float32)}
    small = in_int8(exact, np.float32)
    assert small["kernel"].dtype == np.int8
    np.testing.assert_array_equal(small["bias"], exact["bias"])
    wanted = Dense(16).apply({"params": exact}, x)
    got = Dense(16).apply({"params": jax.tree.map(jnp.asarray, small)}, x)
    assert 1e-5 < relative_error(got, wanted) <= 0.02


def test_the_cost_on_golden_weights(golden):
    """KL of the relations to the float32 teacher: a small number, and none with float weights."""
    model, params = convert_file("mae", golden.path("teacher.pth"), heads=golden.meta["teacher"]["heads"])
    teacher, tap = ViT.from_record(model["encoder"]), golden.meta["teacher"]["tap"]
    view = jnp.asarray(golden.arrays("tinymim.npz")["teacher_images"][0])
    costs = relation_cost(teacher, (tap,), params["encoder"], view)
    assert set(costs) == {"8 bits", "float32"}
    for name in ("qk", "vv"):
        assert abs(costs["float32"][name]) <= 1e-6
        assert 1e-7 < costs["8 bits"][name] <= 2e-3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    vit = ViT(embed_dim=32, depth=3, heads=4, patch_size=4, image_size=(16, 16))
    params = jax.jit(vit.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]
    path = tmp_path_factory.mktemp("teachers") / "teacher"
    save_params(path, {"encoder": params}, {"encoder": vit.record()})
    return path


def test_distillation_with_it(teacher):
    """Its losses are those of the float teacher up to rounding; the line for the log names what it costs."""
    batch = {"image": jnp.asarray(RNG.integers(0, 256, (4, 16, 16, 3), np.uint8)), "label": jnp.zeros(4, jnp.int32)}
    words = ("model.patch_size=4", f"distill.teacher.path={teacher}", "model.dtype=float32")
    losses, tasks = {}, {}
    for int8 in (False, True):
        config = small_config("distill", *words, f"distill.teacher.int8={int8}")
        task = tasks[int8] = TASKS["distill"].build(config, DIGITS)
        frozen = task.load_frozen()
        assert (frozen["blocks_0"]["attn"]["qkv"]["kernel"].dtype == np.int8) == int8
        assert frozen["patch_embed"]["kernel"].dtype == np.float32
        params = jax.jit(task.init)(jax.random.key(0))
        found = jax.jit(lambda p, f, task=task: task.losses(p, f, batch, jax.random.key(2), False))(params, frozen)
        losses[int8] = np.asarray(found["loss"])
    assert 0 < relative_error(losses[True], losses[False]) <= 0.05
    assert tasks[False].remark is None
    line = tasks[True].remark(batch)
    assert re.match(
        r"distill.teacher.int8: KL of .* on 4 images: qk \S+, vv \S+ with 8 bits; qk \S+, vv \S+ with float32", line
    )


def test_each_of_several_teachers_has_its_own(teacher):
    """Only the weights of the further teacher are of 8 bits; its loss is the one that it has alone."""
    batch = {"image": jnp.asarray(RNG.integers(0, 256, (4, 16, 16, 3), np.uint8)), "label": jnp.zeros(4, jnp.int32)}
    words = ("model.patch_size=4", f"distill.teacher.path={teacher}", "model.dtype=float32")
    own = (f"distill.teachers.other.path={teacher}", "distill.teachers.other.int8=True")
    both = TASKS["distill"].build(small_config("distill", *words, *own), DIGITS)
    alone = TASKS["distill"].build(small_config("distill", *words, "distill.teacher.int8=True"), DIGITS)
    frozen = both.load_frozen()
    kernels = {name: weights["blocks_2"]["mlp"]["fc1"]["kernel"].dtype for name, weights in frozen.items()}
    assert kernels == {"teacher": np.float32, "other": np.int8}
    params = jax.jit(both.init)(jax.random.key(0))
    found, wanted = (
        jax.jit(lambda p, f, task=task: task.losses(p, f, batch, jax.random.key(2), False))(params, task.load_frozen())
        for task in (both, alone)
    )
    np.testing.assert_allclose(found["other"], wanted["loss"], rtol=2e-5)
    assert relative_error(np.asarray(found["teacher"]), np.asarray(wanted["loss"])) > 1e-5
    (line,) = both.remark(batch).splitlines()
    assert line == alone.remark(batch).replace("distill.teacher.int8", "distill.teachers.other.int8")
    rounded = small_config("distill", *words, *own, "distill.teacher.int8=True")
    lines = TASKS["distill"].build(rounded, DIGITS).remark(batch).splitlines()
    assert [each.split(":")[0] for each in lines] == ["distill.teacher.int8", "distill.teachers.other.int8"]


def test_the_log_of_a_run_states_the_cost_once(teacher, data_dir, tmp_path, caplog):
    words = ("model.patch_size=4", "distill.teacher.int8=True", f"distill.teacher.path={teacher}")
    with caplog.at_level(logging.INFO, logger="tinymim_jax"):
        train(small_config("distill", *words, "train.duration=2 steps"), tmp_path / "run", data_dir=data_dir)
    lines = [record.getMessage() for record in caplog.records if "distill.teacher.int8" in record.getMessage()]
    assert len(lines) == 1
    (qk,) = re.findall(r"qk (\S+), vv \S+ with 8 bits", lines[0])
    assert 0 < float(qk) < 1e-2


def test_a_teacher_of_convolutions_has_no_8_bit_form():
    with pytest.raises(ValueError, match="the teacher is a resnet: set it to False"):
        check_eight_bit(ConvNet("resnet", (4,), (1,), (16, 16)))


def test_the_error_for_a_further_teacher_names_its_key(teacher, tmp_path):
    model, params = from_cnn(state_of("resnet"), (64, 64))
    save_params(tmp_path / "resnet", params, model)
    own = ["int8=True", f"path={tmp_path / 'resnet'}", "target=oo(loss=cka, patches=true)", "image_size=(64,64)"]
    words = ["model.patch_size=4", f"distill.teacher.path={teacher}", *(f"distill.teachers.cnn.{each}" for each in own)]
    with pytest.raises(ValueError, match=r"distill\.teachers\.cnn\.int8=True is for .* the teacher is a resnet"):
        TASKS["distill"].build(small_config("distill", *words), DIGITS)


def test_only_the_blocks_are_of_8_bits():
    vit = ViT(embed_dim=16, depth=1, heads=2, patch_size=8, image_size=(16, 16))
    params = jax.device_get(vit.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
        for path, leaf in jax.tree.leaves_with_path(eight_bit(params, jnp.bfloat16))
    }
    whole = {name for name, dtype in dtypes.items() if dtype == np.int8}
    layers = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    assert whole == {f"blocks_0/{layer}/kernel" for layer in layers}
    assert all(dtypes[f"blocks_0/{layer}/kernel_scale"] == np.float32 for layer in layers)
    assert dtypes["patch_embed/kernel"] == jnp.bfloat16
