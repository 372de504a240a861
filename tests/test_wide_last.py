"""WideLast: a last block as wide as the teacher, from distillation to fine-tuning and exports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from runs import DIGITS, probe_config, run_steps, same_bits, small_config

from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.config import load_config
from tinymim_jax.convert import ConvertError, to_torch
from tinymim_jax.convert.formats.hub import write as write_hub
from tinymim_jax.convert.formats.network import Network
from tinymim_jax.models.blocks import Block
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT
from tinymim_jax.optim import layer_scales
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.pretrained import Loaded

TEACHER = ViT(embed_dim=32, depth=3, heads=4, patch_size=4, image_size=(16, 16))
WIDE = ViT(16, 2, (2, 4), 4, (16, 16), switches=Switches(last_dim=32))
TARGET = "distill.target=output(final=true, loss=mse, norm=none, adapter=none)"
BATCH = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8))}
KEY = jax.random.key(5)
CLEAN = tuple(f"distill.jitter.{name}=0.0" for name in ("brightness", "contrast", "saturation"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random teacher, and a wide student."""
    path = tmp_path_factory.mktemp("wide")
    for name, vit in (("teacher", TEACHER), ("wide", WIDE)):
        params = jax.jit(vit.init)(jax.random.key(1), np.zeros((1, 16, 16, 3), np.float32))["params"]
        record = {"encoder": vit.record(), "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        save_params(path / name, {"encoder": params}, record)
    return path


def distill(folder, *words: str):
    more = ("model.patch_size=4", f"distill.teacher.path={folder / 'teacher'}", "distill.wide_last=True")
    return small_config("distill", *more, *words)


def task_of(config):
    return TASKS[config.task].build(config, DIGITS)


def sizes(params) -> dict[str, tuple[int, ...]]:
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}


def test_a_wide_encoder_is_narrow_blocks_a_linear_and_a_wide_block():
    """Written out with the blocks themselves; and its parameters, counted by hand."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = WIDE.init(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: np.float32(leaf + rng.normal(0, 0.1, leaf.shape)), params)
    x = WIDE.apply({"params": params}, images, method="embed")
    x = Block(16, 2).apply({"params": params["blocks_0"]}, x).output
    middle = x
    x = np.asarray(x) @ params["widen"]["kernel"] + params["widen"]["bias"]
    tap = Block(32, 4).apply({"params": params["blocks_1"]}, jnp.asarray(x))
    mean, spread = (f(np.asarray(tap.output), -1, keepdims=True) for f in (np.mean, np.var))
    final = (np.asarray(tap.output) - mean) / np.sqrt(spread + 1e-6) * params["norm"]["scale"] + params["norm"]["bias"]
    for vit in (WIDE, WIDE.clone(scan=True, remat="dots")):
        np.testing.assert_allclose(vit.apply({"params": params}, images), final, rtol=1e-4, atol=1e-5)
        taps = vit.apply({"params": params}, images, tap=(1, 2), method="encode")
        np.testing.assert_allclose(taps[0].output, middle, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(taps[1].q, tap.q, rtol=1e-4, atol=1e-5)
    assert WIDE.widths == (16, 32)

    def block(d):  # qkv, projection, two layers of the MLP, two norms
        return (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + 4 * d

    wanted = (48 * 16 + 16) + 16 + block(16) + (16 * 32 + 32) + block(32) + 64
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == wanted


def test_the_record_and_the_rates_of_layers():
    assert ViT.from_record(WIDE.record()) == WIDE.clone(heads=(2, 4))
    assert WIDE.record()["switches"] == {"last_dim": 32}
    assert "switches" not in TEACHER.record()
    params = jax.eval_shape(WIDE.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    scales = layer_scales({"encoder": params["params"]}, 0.5, 2)["encoder"]
    assert {scales["blocks_0"]["norm1"]["scale"]} == {0.25}
    assert set(jax.tree.leaves((scales["widen"], scales["blocks_1"]))) == {0.5}


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        (("distill.target=qk_vv",), [2, 4]),  # the teacher's, 8 wide each
        (("distill.heads=own",), [2, 4]),  # as wide as the student's own
        (("distill.heads=own", "model.heads=4"), [4, 8]),
        (("distill.heads=own", "model.heads=(4,2)"), [4, 2]),
        (("distill.student_tap=1", "model.heads=1"), [4, 2]),  # block 1 has the teacher's
    ],
)
def test_heads_of_the_wide_block(folder, words, heads):
    task = task_of(distill(folder, TARGET if words[0] == "distill.heads=own" else "distill.target=qk_vv", *words))
    assert task.model["encoder"]["heads"] == heads
    assert task.model["encoder"]["switches"] == {"last_dim": 32}


def test_features_of_the_teachers_width_need_no_adapter(folder):
    task = task_of(distill(folder, TARGET, *CLEAN, "model.drop_path=0.0", "model.dtype=float32"))
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    assert set(params) == {"encoder"} == set(task.model)
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, BATCH, KEY, True)
    pixels = (jnp.asarray(BATCH["image"], jnp.float32) / 255 - 0.5) / 0.5
    own = ViT.from_record(task.model["encoder"]).apply({"params": params["encoder"]}, pixels)
    other = TEACHER.apply({"params": jax.device_get(load_params(folder / "teacher")[1]["encoder"])}, pixels)
    np.testing.assert_allclose(got["loss"], ((np.asarray(own) - np.asarray(other)) ** 2).mean((1, 2)), rtol=1e-4)
    adapted = task_of(distill(folder, "distill.target=output + output(student=1, loss=mse)"))
    kernels = sizes(adapted.init(jax.random.key(0))["adapter"])
    assert (kernels["taps_0/output/kernel"], kernels["taps_1/output/kernel"]) == ((32, 32), (16, 32))


@pytest.mark.slow
def test_a_wide_student_is_trained_and_starts_a_classifier_a_probe_and_a_teacher(folder, data_dir):
    mesh = make_mesh(devices=jax.devices()[:1])
    state, losses, *_ = run_steps(distill(folder, TARGET), data_dir, mesh, 2)
    assert np.isfinite(losses).all()
    assert not same_bits(state.params["encoder"]["widen"]["kernel"], jnp.zeros((16, 32)))
    words = ("model.patch_size=4", "model.pos_embed=sincos", f"init={folder / 'wide'}")
    finetune = small_config("finetune", *words)
    state, losses, *_ = run_steps(finetune, data_dir, mesh, 2)
    assert np.isfinite(losses).all()
    assert state.params["head"]["kernel"].shape == (32, 10)
    start = task_of(finetune)
    filled = start.start(jax.device_get(start.init(jax.random.key(0))))
    saved = load_params(folder / "wide")[1]["encoder"]
    assert same_bits({k: v for k, v in saved.items() if k != "norm"}, filled["encoder"])
    probe = task_of(probe_config(f"init={folder / 'wide'}"))
    assert probe.init(jax.random.key(0))["head"]["kernel"].shape == (32, 10)
    dropped = task_of(small_config("finetune", *words, "classify.last_block=drop"))
    assert "switches" not in dropped.model["encoder"]
    assert "widen" not in dropped.start(jax.device_get(dropped.init(jax.random.key(0))))["encoder"]
    teacher = small_config(
        "distill", "model.patch_size=4", f"distill.teacher.path={folder / 'wide'}", "distill.target=output"
    )
    losses = jax.jit(task_of(teacher).losses, static_argnums=4)
    task = task_of(teacher)
    assert np.isfinite(losses(task.init(jax.random.key(0)), task.load_frozen(), BATCH, KEY, True)["loss"]).all()


def test_what_a_wide_encoder_cannot_be(folder, tmp_path):
    with pytest.raises(ValueError, match=r"wide_last=True: the student is 32 wide and the teacher 32: set it to False"):
        task_of(distill(folder, "model.embed_dim=32"))
    with pytest.raises(ValueError, match=r"'copy_previous'.* is 32 wide and the one before it 16"):
        task_of(
            small_config(
                "finetune", "model.patch_size=4", f"init={folder / 'wide'}", "classify.last_block=copy_previous"
            )
        ).start({})
    model, params = load_params(folder / "wide")
    with pytest.raises(ConvertError, match=r"unexpected: encoder/widen/bias"):
        to_torch("vit", model, params)
    network = Network(model, params, {"mean": [0.5] * 3, "std": [0.5] * 3, "class_names": []}, "mean")
    with pytest.raises(ConvertError, match="last_dim"):
        write_hub(tmp_path / "hub", network)
    segment = load_config("segment_t", [f"init={folder / 'wide'}", "data.source=digits"])
    from tinymim_jax.tasks.segment.encoder import segmentation_encoder

    with pytest.raises(ValueError, match=r"its last block is 32 wide and the others \d+ \(distill\.wide_last\)"):
        segmentation_encoder(segment, Loaded("x", model, params))
