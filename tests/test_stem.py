"""The convolutional stem: against numpy, in ONNX, and as a student of a distillation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import small_config

from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.convert.formats.onnx import read_file
from tinymim_jax.evaluation.exporting import export
from tinymim_jax.models.stem import ConvStem
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT
from tinymim_jax.optim import layer_scales
from tinymim_jax.train import train


def encoder(**changes) -> ViT:
    fields = {"embed_dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "image_size": (8, 12)} | changes
    return ViT(**fields, switches=Switches(stem="conv"))


def random_params(vit: ViT):
    """Parameters that are all different from their initial zeros and ones."""
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, *vit.image_size, 3), np.float32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.3).astype(np.float32), shapes)


def by_numpy(params, images):
    """The stem in float64, one output pixel at a time."""
    x = images.astype(np.float64)
    for i in range(2):
        kernel, bias = (np.asarray(params[f"conv_{i}"][name], np.float64) for name in ("kernel", "bias"))
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
        for r in range(rows):
            for c in range(columns):
                window = padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]
                y[:, r, c] = np.einsum("bijc,ijcd->bd", window, kernel) + bias
        mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
        y = (y - mean) / np.sqrt(variance + 1e-6) * params[f"norm_{i}"]["scale"] + params[f"norm_{i}"]["bias"]
        x = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return x.reshape(len(x), -1, x.shape[-1]) @ params["proj"]["kernel"] + params["proj"]["bias"]


def test_values(close):
    vit = encoder()
    params = random_params(vit)["stem"]
    images = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    found = ConvStem(16, 4).apply({"params": params}, jnp.asarray(images))
    assert found.shape == (2, 2 * 3, 16)
    close(found, by_numpy(params, images), 1e-5)  # float32 against float64


def test_record_and_learning_rates():
    vit = encoder()
    assert ViT.from_record(vit.record()).switches.stem == "conv"
    scales = layer_scales({"encoder": random_params(vit)}, 0.5, 2)
    # As the patch embedding: below both blocks, which have 0.5^2 and 0.5^1.
    assert scales["encoder"]["stem"]["conv_0"]["kernel"] == 0.5**3


def test_onnx_and_back(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    vit = encoder(image_size=(16, 16))
    params = random_params(vit)
    save_params(tmp_path / "vit", {"encoder": params}, {"encoder": vit.record()})
    # Raises where onnxruntime and jax differ by more than 2e-6 of the largest output.
    said = "\n".join(export(str(tmp_path / "vit"), "onnx", tmp_path / "vit.onnx", features="mean"))
    assert "onnxruntime" in said
    record, back = read_file(tmp_path / "vit.onnx")
    assert record["encoder"] == vit.record()
    for (path, first), second in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(back["encoder"]), strict=True):
        assert np.array_equal(first, second), path


def test_mistakes():
    images = jnp.zeros((1, 8, 12, 3))
    with pytest.raises(ValueError, match=r"model.stem='linear', or distill.mask_ratio=0"):
        encoder().init(jax.random.key(0), images, keep=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"choose model.patch_size among 2, 4, 8, 16"):
        encoder(patch_size=6, image_size=(12, 12)).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))


def test_as_a_student(data_dir, tmp_path):
    teacher = ViT(embed_dim=16, depth=2, heads=2, patch_size=8, image_size=(16, 16))
    params = jax.jit(teacher.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    save_params(tmp_path / "teacher", {"encoder": params}, {"encoder": teacher.record()})
    words = [f"distill.teacher.path={tmp_path / 'teacher'}", "model.stem=conv", "optim.base_lr=0.1"]
    train(small_config("distill", *words), tmp_path / "run", data_dir=data_dir)
    record, trained = load_params(tmp_path / "run")
    assert record["encoder"]["switches"] == {"stem": "conv"}
    assert np.abs(trained["encoder"]["stem"]["conv_0"]["bias"]).max() > 0  # zero before the first update
