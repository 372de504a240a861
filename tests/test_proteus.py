"""Targets after the final norm and of hidden patches, and the three terms of Proteus, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, run_steps, same_bits, small_config

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.config import load_config, load_file
from tinymim_jax.convert import to_torch
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.distill.adapters import adapt, init_adapter
from tinymim_jax.tasks.distill.hidden import MASK_TOKEN, hidden_patches
from tinymim_jax.tasks.pretrained import Loaded

TEACHER = ViT(embed_dim=32, depth=3, heads=4, patch_size=4, image_size=(16, 16))
BATCH = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8))}
KEY = jax.random.key(5)
STILL = (
    *(f"distill.jitter.{name}=0.0" for name in ("brightness", "contrast", "saturation")),
    "model.drop_path=0.0",
    "model.dtype=float32",
)
PROTEUS = load_file("distill_proteus")[0].target(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher with noise in every parameter."""
    path = tmp_path_factory.mktemp("teachers")
    shapes = jax.eval_shape(TEACHER.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    for name, vit in (("teacher", TEACHER), ("no_norm", TEACHER.clone(final_norm=False))):
        used = {key: value for key, value in params.items() if vit.final_norm or key != "norm"}
        record = {"encoder": vit.record(), "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        save_params(path / name, {"encoder": used}, record)
    return path


def distill(folder, target: str, *words: str, teacher: str = "teacher"):
    more = ("model.patch_size=4", f"distill.teacher.path={folder / teacher}", "distill.heads=own")
    return small_config("distill", *more, f"distill.target={target}", *words)


def task_of(config):
    return TASKS[config.task].build(config, DIGITS)


def shaken(params, seed: int = 3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), jax.device_get(params))


def norm(x: np.ndarray, scale=1.0, bias=0.0, eps: float = 1e-6) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def head(params, x: np.ndarray) -> np.ndarray:
    """LayerNorm with torch's eps, and a Linear."""
    x = norm(x, np.float64(params["norm"]["scale"]), np.float64(params["norm"]["bias"]), eps=1e-5)
    return x @ np.float64(params["linear"]["kernel"]) + np.float64(params["linear"]["bias"])


def final_tokens(vit: ViT, params, **options) -> np.ndarray:
    """All tokens after the last block and the final norm, float64."""
    tap = vit.apply(
        {"params": params}, normalize(BATCH["image"], (0.5,) * 3, (0.5,) * 3), tap=vit.depth, method="encode", **options
    )
    return norm(
        np.asarray(tap.output, np.float64), np.float64(params["norm"]["scale"]), np.float64(params["norm"]["bias"])
    )


def test_the_three_terms_of_proteus(folder):
    """As in models_proteus_dinov2.py, where the feature term passes CLS through the head of the token term."""
    task = task_of(distill(folder, PROTEUS, *STILL))
    assert task.names == ("loss", "cls", "output", "output_hidden")
    params, frozen = shaken(task.init(jax.random.key(2))), task.load_frozen()
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, BATCH, KEY, True)

    student, heads = ViT.from_record(task.model["encoder"]), params["adapter"]
    teacher, own = final_tokens(TEACHER, frozen), final_tokens(student, params["encoder"])
    cls = head(heads["taps_0"]["cls"], own[:, :1])
    whole = np.concatenate([cls, head(heads["taps_1"]["output"], own[:, 1:])], axis=1)
    which, positions = hidden_patches(KEY, 4, (4, 4), 0.5)
    masked = final_tokens(student, params["encoder"], replaced=(which, jnp.asarray(params[MASK_TOKEN])))
    rows = np.arange(4)[:, None]
    predicted = head(heads["taps_2"]["output"], masked[rows, 1 + np.asarray(positions)])
    token = ((cls - teacher[:, :1]) ** 2).mean((1, 2))
    feature = ((whole - teacher) ** 2).mean((1, 2))
    patch = ((predicted - teacher[rows, 1 + np.asarray(positions)]) ** 2).mean((1, 2))
    np.testing.assert_allclose(got["cls"], token, rtol=2e-4)
    np.testing.assert_allclose(got["output_hidden"], patch, rtol=2e-4)
    np.testing.assert_allclose(got["loss"], token + feature + patch, rtol=2e-4)


def test_hidden_patches_are_not_seen_and_no_others_are_compared(folder):
    """Their pixels change the teacher's side alone; other patches' targets do not matter."""
    which, positions = hidden_patches(KEY, 6, (4, 4), 0.5)
    assert which.sum(1).tolist() == [8] * 6
    np.testing.assert_array_equal(np.sort(np.asarray(positions)), [np.flatnonzero(row) for row in np.asarray(which)])
    assert len({tuple(row) for row in np.asarray(which)}) > 1

    vit = ViT(embed_dim=16, depth=2, heads=2, patch_size=4, image_size=(16, 16))
    params = vit.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    token = jnp.full((1, 1, 16), 0.3)
    images = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)
    painted = images.reshape(6, 4, 4, 4, 4, 3).copy()  # rows, pixels, columns, pixels
    for image, row in zip(painted, np.asarray(which)):
        for patch in np.flatnonzero(row):
            image[patch // 4, :, patch % 4] = 7.0
    painted = painted.reshape(images.shape)
    outputs = [
        vit.apply({"params": params}, jnp.asarray(x), tap=2, method="encode", replaced=(which, token)).output
        for x in (images, painted)
    ]
    np.testing.assert_array_equal(*outputs)
    embedded = vit.apply({"params": params}, jnp.asarray(images), replaced=(which, token), method="embed")
    wanted = 0.3 + vit.fixed_table[0, 1:][np.asarray(positions)]
    np.testing.assert_allclose(
        np.asarray(embedded)[np.arange(6)[:, None], 1 + np.asarray(positions)], wanted, atol=1e-6
    )


def test_the_norm_linear_adapter():
    params = shaken(init_adapter("norm_linear", jax.random.key(0), 4, 6))
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        adapt("norm_linear", params, jnp.asarray(x)), head(params, np.float64(x)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_run_trains_every_part_and_starts_another(folder, data_dir):
    config = distill(folder, PROTEUS)
    state, losses, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 2)
    assert np.isfinite(losses).all()
    task = task_of(config)
    start = task.init(jax.random.key(config.seed))
    assert set(state.params) == {"encoder", "adapter", MASK_TOKEN} == set(task.model)
    assert not same_bits(state.params[MASK_TOKEN], start[MASK_TOKEN])
    assert not same_bits(state.params["encoder"]["norm"], start["encoder"]["norm"])
    # A plain encoder for PyTorch: what only this training needs is left out.
    assert MASK_TOKEN not in to_torch("vit", task.model, jax.device_get(state.params))
    loaded = Loaded("run", task.model, jax.device_get(state.params))
    from tinymim_jax.tasks.distill.task import fill_parts

    assert same_bits(fill_parts(start, loaded, task.model)[MASK_TOKEN], state.params[MASK_TOKEN])


def test_the_shipped_config():
    config = load_config("distill_proteus")
    assert config.distill.target.count("final=true") == 3
    from tinymim_jax.tasks.distill.parts import read_parts

    weights = [part.weight for part in read_parts(config.distill.target)]
    np.testing.assert_allclose(weights, [1 + 1 / 257, 256 / 257, 1], rtol=1e-12)


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("ffn(final=true)", (), r"ffn\(final=true\): only output and cls of the last block"),
        ("output(final=true, student=1)", (), r"final=true is after the last blocks, 2 and 3, and blocks 1 and 3"),
        (
            "output(adapter=none)",
            (),
            r"adapter=none compares the student's output of width 16 with the teacher's of 32",
        ),
        ("output(hidden=0.5) + ffn(hidden=0.25)", (), r"hidden=0\.25, 0\.5: one pass hides one share"),
        ("output(hidden=1.5)", (), r"hidden=1\.5 of 16 patches: choose a share between 0 and 1"),
        ("output(hidden=1)", (), r"between 0 and 1"),
        ("cls(hidden=0.5)", (), r"compares the CLS token, and only patches.*without hidden="),
        ("vv(hidden=0.5)", (), r"option of vv='hidden' is unknown"),
        (
            "output(hidden=0.5)",
            ("distill.mask_ratio=0.5",),
            r"hidden=0\.5 is compared with a teacher of all.*mask_ratio=0",
        ),
        ("output(hidden=0.5)", ("distill.teacher.drop_patches=0.5",), r"set teacher\.drop_patches=0"),
        ("output(hidden=0.5)", ("model.stem=conv", "model.image_size=(32,32)"), r"set model\.stem='linear'"),
    ],
)
def test_mistakes_name_the_remedy(folder, target, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(distill(folder, target, *words))


def test_a_teacher_without_a_final_norm(folder):
    with pytest.raises(ValueError, match="final=true: the teacher has no final norm"):
        task_of(distill(folder, "output(final=true)", teacher="no_norm"))
