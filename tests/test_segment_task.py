"""The segmentation task: its heads, what is trained, how it starts, and the same update on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import base
from tinymim_jax import optim
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.metrics import no_averages
from tinymim_jax.models.convolutions import STATISTICS
from tinymim_jax.models.taps import default_taps
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.pixel_loss import pixel_cross_entropy
from tinymim_jax.ops.pooling import adaptive_pool, max_pool
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.state import init_state, make_train_step, trained_paths
from tinymim_jax.tasks.segment.task import build
from tinymim_jax.tasks.task import RUNNING

CLASSES = ("sky", "road", "tree")
SIZE = 32


def small(*words: str):
    """A config of the task with a small network: 2 blocks of width 16 on 32 x 32 pixels."""
    from tinymim_jax.config import apply_overrides

    config = base.segment()
    own = ("model.embed_dim=16", "model.depth=2", "model.heads=2", f"model.image_size=({SIZE},{SIZE})")
    own += ("model.dtype=float32", "segment.channels=8", "segment.auxiliary_channels=4", "train.batch_size=8")
    apply_overrides(config, [*own, *words])
    return config.lock()


def fresh(task):
    return jax.device_get(jax.jit(task.init)(jax.random.key(3)))


def make_batch(images: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), (images, SIZE // 16, SIZE // 16)).astype(np.uint8)
    labels = labels.repeat(16, axis=1).repeat(16, axis=2)
    image = rng.integers(0, 60, (images, SIZE, SIZE, 3), dtype=np.uint8)
    image[..., 0] += 60 * labels
    labels[rng.random(labels.shape) < 0.1] = 255
    return {"image": image, "pixel_labels": labels, "label": np.zeros(images, np.int32), "valid": np.ones(images, bool)}


def test_the_loss_is_that_of_every_pixel_over_all_pixels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 4, 6)).astype(np.uint8)
    labels[0, :2] = 255
    loss, accuracy = pixel_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(2):
        known = labels[i] != 255
        picked = np.take_along_axis(log_p[i], np.minimum(labels[i], 2)[..., None], -1)[..., 0]
        assert float(loss[i]) == pytest.approx(-(picked * known).sum() / 24, rel=1e-5)
        assert float(accuracy[i]) == pytest.approx((logits[i].argmax(-1) == labels[i])[known].mean())


def test_an_image_without_labels_has_loss_zero():
    logits, labels = jnp.ones((1, 2, 2, 3)), jnp.full((1, 8, 8), 255, jnp.uint8)
    assert [float(x[0]) for x in pixel_cross_entropy(logits, labels)] == [0.0, 1.0]
    gradient = jax.grad(lambda x: pixel_cross_entropy(x, labels)[0].sum())(logits)
    np.testing.assert_array_equal(gradient, 0)


def test_pooling_by_bins_that_overlap():
    maps = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    got = np.asarray(adaptive_pool(jnp.asarray(maps), 3))
    for i, rows in enumerate([(0, 2), (1, 4), (3, 5)]):
        for j, columns in enumerate([(0, 3), (2, 5), (4, 7)]):
            want = maps[:, slice(*rows), slice(*columns)].mean((1, 2))
            np.testing.assert_allclose(got[:, i, j], want, rtol=1e-4, atol=1e-6)
    small = np.asarray(adaptive_pool(jnp.asarray(maps[:, :2, :2]), 6))  # a map smaller than its bins
    np.testing.assert_allclose(small[:, [0, 2], 5], maps[:, [0, 0], 1], rtol=1e-6)
    np.testing.assert_array_equal(max_pool(jnp.asarray(maps)), maps[:, :4, :6].reshape(2, 2, 2, 3, 2, 3).max((2, 4)))


def test_the_first_of_equal_values_gets_the_gradient_of_max_pooling():
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


@pytest.mark.parametrize(
    ("words", "stride"),
    [
        ((), 4),
        (("segment.head=light",), 4),
        (("segment.head=linear",), 16),
        (("segment.head=linear", "segment.taps=(1,2)"), 16),
        (("segment.pyramid=star", "segment.widen=12", "model.dist_token=True"), 4),
        (("segment.head=mask",), 16),
    ],
)
def test_every_head_trains_all_but_its_statistics(words, stride):
    task, batch = build(small(*words), CLASSES), make_batch()
    params = jax.eval_shape(task.init, jax.random.key(0))
    untrained = set(_flat(params)) - trained_paths(task, {}, batch)
    assert {path[0] for path in untrained} == ({STATISTICS} if "segment.head=mask" not in words else set())
    values = jax.eval_shape(lambda p, b: task.losses(p, {}, b, jax.random.key(0), False), params, batch)
    assert {name: x.shape for name, x in values.items()} == dict.fromkeys(task.names, (8,))
    assert task.segmenter is not None
    logits = jax.eval_shape(task.segmenter.logits, params, {}, batch["image"])
    assert (logits.shape, logits.dtype) == ((8, SIZE // stride, SIZE // stride, 3), np.float32)


@pytest.mark.parametrize(
    "words",
    [
        ("segment.head=light",),
        ("segment.head=linear", "segment.taps=(1,2)"),
        ("segment.head=mask", "segment.taps=(1,2)"),
    ],
)
def test_a_head_learns(words):
    task = build(small(*words), CLASSES)
    batch = {name: jnp.asarray(x) for name, x in make_batch().items()}
    params = jax.jit(task.init)(jax.random.key(0))
    trained, fixed = optim.split(params, trained_paths(task, {}, batch))
    optimizer = optim.make_optimizer("adamw", lambda step: 1e-2, trained, weight_decay=0.0)

    @jax.jit
    def step(trained, fixed, moments, key):
        def mean(trained):
            values = task.losses(optim.join(trained, fixed), {}, batch, key, True)
            return values["loss"].mean(), values.get(RUNNING, {})

        (loss, fixed), gradient = jax.value_and_grad(mean, has_aux=True)(trained)
        updates, moments = optimizer.update(gradient, moments, trained, step=jnp.asarray(0))
        return jax.tree.map(jnp.add, trained, updates), fixed, moments, loss

    moments, losses = optimizer.init(trained), []
    for i in range(15):
        trained, fixed, moments, loss = step(trained, fixed, moments, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(fixed))  # running means
    assert bool(fixed) == (words[0] != "segment.head=mask")


def _flat(params):
    import flax.traverse_util as traverse

    return traverse.flatten_dict(params)


def encoder_checkpoint(path, **changes) -> str:
    """A pre-trained encoder for images of 16 x 16, as distillation leaves it."""
    fields = {"embed_dim": 16, "depth": 2, "heads": (2, 4), "image_size": (16, 16)} | changes
    encoder = ViT(**fields)
    shapes = jax.eval_shape(encoder.init, jax.random.key(7), jnp.zeros((1, *encoder.image_size, 3)))["params"]
    noise = np.random.default_rng(1)
    params = jax.tree.map(lambda x: noise.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    save_params(path, {"encoder": params}, {"encoder": encoder.record()})
    return str(path)


def test_the_published_additions_change_nothing_at_the_start(tmp_path, close):
    checkpoint = encoder_checkpoint(tmp_path / "e")
    words = (f"init={checkpoint}", "segment.head=linear")
    task = build(small(*words), CLASSES)
    plain = build(small(*words, "segment.relative_bias=False", "segment.layer_scale=False"), CLASSES)
    assert task.model["encoder"]["heads"] == [2, 4]  # as pre-trained
    images = jnp.asarray(make_batch(2)["image"])
    assert task.start is not None
    assert plain.start is not None
    params, others = (jax.device_put(each.start(fresh(each))) for each in (task, plain))
    assert float(np.abs(params["encoder"]["blocks_0"]["attn"]["relative_bias"]).max()) == 0
    assert float(params["encoder"]["blocks_0"]["scale1"].min()) == 1
    close(task.segmenter.logits(params, {}, images), plain.segmenter.logits(others, {}, images), 1e-6)
    # The position table was made larger by torch's bicubic interpolation: from 1 x 1 patches to 2 x 2.
    assert params["encoder"]["pos_embed"].shape == (1, 5, 16)


def test_heads_of_every_block_as_published_or_an_error(tmp_path):
    checkpoint = encoder_checkpoint(tmp_path / "e", embed_dim=192, heads=(6, 12))
    words = (f"init={checkpoint}", "model.embed_dim=192", "segment.head=linear")
    task = build(small(*words, "segment.heads=official", "model.heads=None"), CLASSES)
    assert task.model["encoder"]["heads"] == [3, 3]
    task.start(fresh(task))
    with pytest.raises(ValueError, match=r"model.heads=3, but .* was trained with \[6, 12\]"):
        build(small(*words, "model.heads=3"), CLASSES)


def test_a_frozen_encoder_is_neither_trained_nor_changed(tmp_path):
    checkpoint = encoder_checkpoint(tmp_path / "e")
    task = build(small(f"init={checkpoint}", "segment.head=linear", "segment.frozen_encoder=True"), CLASSES)
    paths = trained_paths(task, {}, make_batch())
    assert {path[0] for path in paths} == {"decode_head"}
    assert len(paths) == 4  # scale and bias of the norm, kernel and bias of the classifier


def test_classes_of_a_mask_transformer_are_put_in_order(tmp_path):
    task = build(small("segment.head=mask"), CLASSES)
    params = fresh(task)
    save_params(tmp_path / "run", params, task.model | {"preprocessing": {"class_names": ["tree", "sky", "road"]}})
    again = build(small("segment.head=mask", f"init={tmp_path / 'run'}"), CLASSES)
    filled = jax.device_put(again.start(fresh(again)))
    images = jnp.asarray(make_batch(2)["image"])
    want = np.asarray(task.segmenter.logits(jax.device_put(params), {}, images))[..., [1, 2, 0]]
    # The norm over nearly equal cosines of three classes enlarges rounding.
    np.testing.assert_allclose(again.segmenter.logits(filled, {}, images), want, atol=1e-3)


def test_a_run_starts_from_another_ones_heads(tmp_path, caplog):
    task = build(small("segment.head=light"), CLASSES)
    params = fresh(task)
    record = task.model | {"preprocessing": {"class_names": ["tree", "sky", "road"]}}
    save_params(tmp_path / "run", params, record)
    words = ("segment.head=light", f"init={tmp_path / 'run'}")
    again = build(small(*words), CLASSES)
    filled = again.start(fresh(again))
    bias = params["decode_head"]["classifier"]["conv"]["kernel"]
    np.testing.assert_array_equal(filled["decode_head"]["classifier"]["conv"]["kernel"], bias[..., [1, 2, 0]])
    np.testing.assert_array_equal(filled[STATISTICS]["decode_head"]["mix"]["norm"]["mean"], 0)
    other = build(small(*words, "segment.channels=12"), CLASSES)
    caplog.clear()
    other.start(fresh(other))
    assert "does not fit and is initialized anew" in caplog.text


def test_bias_tables_follow_the_grid(tmp_path):
    task = build(small("segment.head=light"), CLASSES)
    save_params(tmp_path / "run", fresh(task), task.model)
    words = ("segment.head=light", f"init={tmp_path / 'run'}", "model.image_size=(96,64)")
    other = build(small(*words), CLASSES)
    filled = other.start(fresh(other))
    assert filled["encoder"]["blocks_0"]["attn"]["relative_bias"].shape == (11 * 7 + 3, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("segment.head=unet",), "segment.head='unet' is unknown"),
        (("segment.taps=(1,2)",), "takes the outputs of four blocks"),
        (("segment.taps=(0,1,2,3)",), "choose ascending blocks from 1 to 2"),
        (("segment.widen=8",), "belongs to head 'upernet' with pyramid 'star'"),
        (("segment.frozen_encoder=True",), "segment.frozen_encoder=True without init"),
        (("segment.num_classes=7",), "has 3 classes: set it to None"),
        (("train.accumulate=0",), "over how many images batch norm averages"),
        (("train.accumulate=8",), "at least two images at a time"),
        (("segment.heads=uniform",), "segment.heads='uniform' is unknown"),
        (("segment.heads=official",), "is published for widths"),
        (("segment.dropout=1.0",), "is a probability below 1"),
        (("segment.auxiliary_weight=-1.0",), "choose a positive number, or 0"),
        (("segment.head=mask", "segment.channels=200"), "choose a multiple of 64, such as 192"),
    ],
)
def test_what_cannot_be_trained_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        build(small(*words), CLASSES).init(jax.random.key(0))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="the softmax over classes needs at least two"):
        build(small(), ("crack",))


def test_micro_batches_say_what_batch_norm_sees(caplog):
    build(small("train.accumulate=4"), CLASSES)
    assert "batch norm averages over 2 images at a time and not over the batch of 8" in caplog.text
    caplog.clear()
    build(small("train.accumulate=8", "segment.head=mask"), CLASSES)  # it has no batch norm
    assert not caplog.text


def test_taps_in_proportion():
    assert default_taps("upernet", 12) == (4, 6, 8, 12)
    assert default_taps("upernet", 24) == (8, 12, 16, 24)
    assert default_taps("linear", 12) == default_taps("mask", 12) == (12,)


def one_step(mesh: Mesh):
    task = build(small("model.drop_path=0.0", "segment.dropout=0.0", "segment.head=linear"), CLASSES)
    batch = make_batch()
    paths = trained_paths(task, {}, batch)
    params = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = optim.make_optimizer("sgd", lambda step: 0.1, optim.split(params, paths)[0], weight_decay=0.0)
    _, start = init_state(task, optimizer, paths, mesh, jax.random.key(0), ema=0.0)
    step = make_train_step(task, optimizer, paths, mesh)
    averages = jax.device_put(no_averages((*task.names, "gradient_norm")))
    state, _, _ = step(start(), averages, {}, place_batch(mesh, batch), jax.random.key(0))
    return jax.device_get(state.params)


def test_batch_norm_is_over_the_global_batch(close):
    """Data x fsdp over 8 devices, against one device."""
    one, many = one_step(make_mesh(devices=jax.devices()[:1])), one_step(make_mesh(fsdp=2))
    for path, want in _flat(one).items():
        # Gradients of biases before a batch norm are rounding, so not compared relative to themselves.
        assert np.abs(_flat(many)[path] - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-2), path
