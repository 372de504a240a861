"""Encoders of other authors in tasks and evaluation: any number of CLS tokens, registers, rotary positions, biases."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, probe_config, run_steps, small_config

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.linear_probes import probed_params
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.evaluation.predictor import load as load_model
from tinymim_jax.models.heads import Classifier, pool_tokens
from tinymim_jax.models.mae_decoder import MaskedAutoencoder
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.masking import random_masking
from tinymim_jax.ops.relative_bias import resize_bias_table
from tinymim_jax.ops.rope import Rope
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.decoder import build_decoder
from tinymim_jax.tasks.pretrained import Loaded, fit_positions

PLAIN = ViT(embed_dim=16, depth=2, heads=2, patch_size=4, image_size=(16, 16), pos_embed="learned")
KINDS = {
    "registers": Switches(registers=2, layer_scale=True, layer_scale_start=1.0),
    "no_cls": Switches(cls_tokens=0, positions="patches", eps=1e-5),
    "no_cls_registers": Switches(cls_tokens=0, registers=3, positions="patches"),
    "three_cls": Switches(cls_tokens=3, registers=1, positions="patches"),
    "rotary": Switches(registers=1, positions="none", rope=Rope(centred=True, layout="halves", theta=100.0)),
    "biases": Switches(positions="none", relative_bias=True, qkv_bias="qv"),
}
MEAN = STD = (0.5, 0.5, 0.5)  # of configs/digits.py
STILL = (
    *(f"distill.jitter.{name}=0.0" for name in ("brightness", "contrast", "saturation")),
    "model.drop_path=0.0",
    "model.dtype=float32",
)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.zeros(4, jnp.int32)}
KEY = jax.random.key(5)
FRESH = {}  # by model.json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each kind, and a plain one, with noise in every parameter."""
    path = tmp_path_factory.mktemp("foreign")
    for name, switches in (KINDS | {"plain": Switches()}).items():
        vit = PLAIN.clone(switches=switches)
        shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
        rng = np.random.default_rng(len(name))
        params = jax.tree.map(lambda leaf, rng=rng: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
        record = {"encoder": vit.record(), "preprocessing": {"mean": list(MEAN), "std": list(STD)}}
        save_params(path / name, {"encoder": params}, record)
    return path


def config_of(experiment: str, *words: str):
    return small_config(experiment, "model.patch_size=4", "model.pos_embed=learned", *words)


def distill(folder, teacher: str, *words: str):
    return config_of("distill", f"distill.teacher.path={folder / teacher}", *STILL, *words)


def task_of(config):
    return TASKS[config.task].build(config, DIGITS)


def started(task):
    """The parameters that training begins with; the fresh ones are drawn once for each architecture."""
    model = json.dumps(task.model, sort_keys=True)
    if model not in FRESH:
        FRESH[model] = jax.device_get(task.init(jax.random.key(0)))
    return task.start(FRESH[model])


@functools.cache
def last_tap(path, switches: Switches):
    """(tokens before the patches, q, k and v of the last block for BATCH) of a checkpoint of `folder`."""
    vit = PLAIN.clone(switches=switches)
    pixels = normalize(BATCH["image"], MEAN, STD)
    tap = vit.apply({"params": load_params(path)[1]["encoder"]}, pixels, tap=2, method="encode")
    return vit.prefix, {letter: np.asarray(getattr(tap, letter)) for letter in "qkv"}


def losses_of(task, params, train=False):
    return jax.jit(task.losses, static_argnums=4)(params, task.load_frozen(), BATCH, KEY, train)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl_by_hand(student: dict, teacher: dict, name: str) -> np.ndarray:
    """KL(teacher || student) of the softmaxes, a mean over heads and queries; arrays [batch, tokens, heads, width]."""
    own, other = (
        softmax(np.einsum("bqhd,bkhd->bhqk", x[name[0]], x[name[1]], dtype=np.float64) / x["q"].shape[-1] ** 0.5)
        for x in (student, teacher)
    )
    return (other * (np.log(other) - np.log(own))).sum(-1).mean((1, 2))


@pytest.mark.parametrize("student", ["plain", "no_cls_registers", "three_cls"])
@pytest.mark.parametrize("teacher", [*KINDS, "plain"])
def test_relations_are_of_the_tokens_that_both_have(folder, teacher, student):
    """Registers, DIST and further CLS tokens are dropped before the softmax; CLS where one of the two has none."""
    task = task_of(distill(folder, teacher, f"init={folder / student}"))
    params = started(task)
    got = losses_of(task, params)
    kinds = [(KINDS | {"plain": Switches()})[name] for name in (student, teacher)]
    cls = min(1, *(kind.cls_tokens for kind in kinds))
    own, other = (
        {letter: np.delete(x, range(cls, prefix), axis=1) for letter, x in arrays.items()}
        for prefix, arrays in (last_tap(folder / name, kind) for name, kind in zip((student, teacher), kinds))
    )
    assert own["q"].shape == other["q"].shape == (4, 16 + cls, 2, 8)
    for name in ("qk", "vv"):
        np.testing.assert_allclose(got[name], kl_by_hand(own, other, name), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", ["three_cls", "no_cls"])
def test_masked_and_resized_tokens_of_such_a_teacher(folder, teacher):
    """A constant image without positions has equal patch tokens: its grid and its visible patches do not matter."""
    model, params = load_params(folder / teacher)
    flat = params["encoder"] | {"pos_embed": np.zeros_like(params["encoder"]["pos_embed"])}
    path = folder / f"{teacher}_flat"
    if not path.exists():
        save_params(path, {"encoder": flat}, {"encoder": model["encoder"]})
    plain = {"image": jnp.full((2, 16, 16, 3), 90, jnp.uint8)}
    found = []
    for words in ((), ("distill.teacher.image_size=(24,8)",), ("distill.mask_ratio=0.5",)):
        blocks = ("distill.target=v", "distill.student_tap=1", "distill.teacher.tap=1")
        task = task_of(distill(folder, f"{teacher}_flat", f"init={path}", *blocks, *words))
        params = started(task)
        found.append(jax.jit(task.losses, static_argnums=4)(params, task.load_frozen(), plain, KEY, False)["loss"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    patches = "no_cls" in teacher  # with a CLS token the mean over visible tokens has another share of it
    assert np.isfinite(found[2]).all()
    if patches:
        np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["registers", "no_cls_registers", "three_cls", "rotary"])
def test_a_pixel_decoder_sees_cls_and_patches(folder, kind):
    """Its prediction is that for the encoder's output without registers and without further CLS tokens."""
    encoder = PLAIN.clone(switches=KINDS[kind])
    config = config_of("mae_teacher", f"init={folder / kind}", *STILL[3:])
    task = task_of(config)
    params = started(task)
    assert task.model["encoder"]["switches"] == encoder.switches.record()
    assert task.model["decoder"].get("cls", True) == (encoder.switches.cls_tokens > 0)
    assert np.isfinite(losses_of(task, params, train=True)["loss"]).all()
    decoder = build_decoder(config.mae, encoder)
    masking = random_masking(KEY, 4, 16, 0.5)
    pixels = normalize(BATCH["image"], MEAN, STD)
    whole = jax.jit(MaskedAutoencoder(encoder, decoder).apply)({"params": params}, pixels, masking)
    latent = jax.jit(encoder.apply)({"params": params["encoder"]}, pixels, keep=masking.keep)
    cls = min(1, encoder.switches.cls_tokens)
    assert latent.shape[1] == encoder.prefix + 8
    seen = jnp.concatenate([latent[:, :cls], latent[:, encoder.prefix :]], axis=1)
    by_hand = jax.jit(decoder.apply)({"params": params["decoder"]}, seen, masking.restore)
    np.testing.assert_allclose(whole, by_hand, atol=1e-5)
    both = distill(
        folder, kind, f"init={folder / kind}", "distill.mask_ratio=0.5", "distill.mim_weight=1.0",
        *(f"distill.mim.{key}" for key in ("decoder_dim=8", "decoder_depth=1", "decoder_heads=2")),
    )  # fmt: skip
    task = task_of(both)
    assert np.isfinite(losses_of(task, started(task), train=True)["mae"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_pooling(kind):
    encoder = PLAIN.clone(switches=KINDS[kind])
    tokens = np.random.default_rng(0).normal(size=(2, encoder.prefix + 16, 3)).astype(np.float32)
    np.testing.assert_allclose(
        pool_tokens(jnp.asarray(tokens), "mean", encoder), tokens[:, -16:].mean(1), rtol=1e-5, atol=1e-6
    )
    if encoder.switches.cls_tokens:
        np.testing.assert_array_equal(pool_tokens(jnp.asarray(tokens), "cls", encoder), tokens[:, 0])
        return
    with pytest.raises(ValueError, match=r"no CLS token: choose 'mean'"):
        pool_tokens(jnp.asarray(tokens), "cls", encoder)
    with pytest.raises(ValueError, match=r"no CLS token: choose 'mean'"):
        Classifier(encoder, 3, "cls").init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_a_second_head_reads_the_dist_token_after_all_cls_tokens():
    encoder = PLAIN.clone(switches=KINDS["three_cls"], dist_token=True, final_norm=False)
    network = Classifier(encoder, 3)
    pixels = normalize(BATCH["image"], MEAN, STD)
    params = jax.jit(network.init)(jax.random.key(0), pixels)["params"]
    _, second = jax.jit(functools.partial(network.apply, method="logits"))({"params": params}, pixels)
    token = np.asarray(jax.jit(encoder.apply)({"params": params["encoder"]}, pixels))[:, 3]
    normed = (token - token.mean(-1, keepdims=True)) / np.sqrt(token.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(second, normed @ params["head_dist"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_starts_from_the_encoder_as_it_is(folder, kind, tmp_path):
    """The classifier's features are those of the checkpoint; model.json has its switches, and commands read it."""
    task = task_of(config_of("finetune", f"init={folder / kind}", *STILL[3:]))
    params = started(task)
    assert task.model["encoder"]["switches"] == KINDS[kind].record()
    encoder = PLAIN.clone(switches=KINDS[kind], final_norm=False)
    weights = {k: v for k, v in load_params(folder / kind)[1]["encoder"].items() if k != "norm"}
    pixels = normalize(BATCH["image"], MEAN, STD)
    tokens = np.asarray(encoder.apply({"params": weights}, pixels))
    network = Classifier(ViT.from_record(task.model["encoder"]), **task.model["classifier"])
    pooled = tokens[:, -16:].mean(1)
    want = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(network.apply({"params": params}, pixels, method="features"), want, atol=1e-4)
    assert np.isfinite(losses_of(task, params, train=True)["loss"]).all()
    record = json.loads(json.dumps(task.model | {"preprocessing": {"mean": MEAN, "std": STD, "resize": 16}}))
    save_params(tmp_path / "run", params, record)
    model = load_model(tmp_path / "run")
    np.testing.assert_allclose(model.embed(IMAGES), pooled, atol=1e-4)
    assert model.logits(IMAGES[0]).shape == (10,)


@pytest.mark.parametrize("kind", ["registers", "biases"])
def test_training_steps_from_such_a_start(folder, data_dir, kind):
    config = config_of("finetune", f"init={folder / kind}", "model.scan=True")
    state, losses, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 2)
    assert np.isfinite(losses).all()
    assert int(state.skipped) == 0


def test_a_plain_student_of_such_a_teacher_stays_plain(folder):
    task = task_of(distill(folder, "registers"))
    assert "switches" not in task.model["encoder"]
    assert task_of(config_of("finetune", "init=")).model["encoder"].get("switches") is None


def test_the_final_norm_that_a_checkpoint_lacks(folder, caplog):
    model, params = load_params(folder / "registers")
    encoder = {name: leaf for name, leaf in params["encoder"].items() if name != "norm"}
    if not (folder / "no_norm").exists():
        save_params(folder / "no_norm", {"encoder": encoder}, {"encoder": model["encoder"] | {"final_norm": False}})
    with caplog.at_level("INFO"):
        task = task_of(config_of("finetune", f"init={folder / 'no_norm'}", "classify.pool=cls"))
        params = started(task)
    assert "no final norm; it starts from its initialization" in caplog.text
    np.testing.assert_array_equal(params["encoder"]["norm"]["scale"], 1)


def test_sizes_that_differ_are_named(folder):
    task = task_of(config_of("finetune", f"init={folder / 'registers'}", "model.mlp_ratio=2.0", "model.patch_size=8"))
    with pytest.raises(CheckpointError, match=r"(?s)init=.*add model\.patch_size=4 model\.mlp_ratio=4\.0"):
        started(task)


def test_relative_biases_on_another_grid(folder):
    """As a teacher, a start, in k-NN and in a probe the biases are resized by BEiT's rule."""
    model, params = load_params(folder / "biases")
    encoder = ViT.from_record(model["encoder"], image_size=(24, 16))
    table = params["encoder"]["blocks_1"]["attn"]["relative_bias"]
    want = resize_bias_table(table, (4, 4), (6, 4))
    fitted = fit_positions(Loaded("x", model, params), encoder)
    np.testing.assert_array_equal(fitted["blocks_1"]["attn"]["relative_bias"], want)
    words = ("distill.target=vv", "distill.teacher.image_size=(24,16)")
    frozen = task_of(distill(folder, "biases", *words)).load_frozen()
    np.testing.assert_array_equal(frozen["blocks_1"]["attn"]["relative_bias"], want)
    probed = probed_params(model, params, image_size=(24, 16), pool="mean")
    np.testing.assert_array_equal(probed["encoder"]["blocks_1"]["attn"]["relative_bias"], want)
    task = task_of(config_of("finetune", f"init={folder / 'biases'}", "model.image_size=(24,16)"))
    np.testing.assert_array_equal(started(task)["encoder"]["blocks_1"]["attn"]["relative_bias"], want)


def test_a_probe_of_such_an_encoder(folder, data_dir):
    config = probe_config(f"init={folder / 'three_cls'}", "probe.pool=cls")
    _, losses, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 1)
    assert np.isfinite(losses).all()
    with pytest.raises(ValueError, match="no CLS token: choose 'mean'"):
        task_of(probe_config(f"init={folder / 'no_cls'}", "probe.pool=cls"))


@pytest.mark.parametrize(
    ("experiment", "words", "message"),
    [
        (
            "distill",
            ["distill.teacher.path={}/rotary", "distill.teacher.image_size=(24,24)"],
            r"qk of this teacher are rotated.*grid \(6, 6\) to the student's \(4, 4\).*image_size=\(16, 16\)",
        ),
        (
            "distill",
            ["distill.teacher.path={}/rotary", "model.patch_size=8", "distill.target=kk_vv"],
            r"kk of this teacher are rotated.*image_size=\(8, 8\)",
        ),
        (
            "distill",
            ["distill.teacher.path={}/no_cls", "distill.target=cls"],
            "'cls' compares the CLS token, and the teacher has none",
        ),
        (
            "distill",
            ["distill.teacher.path={}/plain", "init={}/no_cls", "distill.target=cls"],
            "and the student has none",
        ),
        (
            "distill",
            ["distill.teacher.path={}/plain", "init={}/biases", "distill.mask_ratio=0.5"],
            r"distill\.mask_ratio=0\.5 hides patches, but the encoder has relative position biases",
        ),
        (
            "distill",
            ["distill.teacher.path={}/biases", "distill.mask_ratio=0.5", "distill.teacher.masked=True"],
            r"distill\.teacher\.masked=True hides patches, but",
        ),
        (
            "mae_teacher",
            ["init={}/biases"],
            r"mae\.mask_ratio hides patches, but the encoder has relative position biases",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(folder, experiment, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(config_of(experiment, *(word.format(folder) for word in words)))


def test_unrotated_features_are_resized(folder):
    """v and the block's output are not rotated, so the teacher may have another grid."""
    for target in ("vv", "output"):
        words = (f"distill.target={target}", "distill.teacher.image_size=(24,24)")
        task = task_of(distill(folder, "rotary", *words))
        assert np.isfinite(losses_of(task, task.init(jax.random.key(0)))["loss"]).all()
