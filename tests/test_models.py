"""Networks: exact sizes, the cost of a tap, scan and remat, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tinymim_jax.models.blocks import Block
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.mae_decoder import MaeDecoder, MaskedAutoencoder
from tinymim_jax.models.vit import PRESETS, ViT
from tinymim_jax.ops.masking import random_masking

TINY = ViT(embed_dim=16, depth=3, heads=(2, 2, 4), patch_size=4, image_size=(8, 12), drop_path=0.5)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 12, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def params():
    return jax.jit(TINY.init)(jax.random.key(0), IMAGES)["params"]


def encoder_size(dim: int, depth: int, patch_size: int) -> int:
    """Parameters of an encoder at 224 px with its position table, written out by hand."""
    block = (
        2 * 2 * dim + (dim * 3 * dim + 3 * dim) + (dim * dim + dim) + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    )
    tokens = (224 // patch_size) ** 2 + 1
    return depth * block + (3 * patch_size**2 * dim + dim) + dim + tokens * dim + 2 * dim


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_exactly_the_published_parameters(name):
    preset = PRESETS[name]
    patch_size = 14 if name == "H" else 16
    encoder = ViT(**preset, patch_size=patch_size, pos_embed="learned")
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == encoder_size(preset["embed_dim"], preset["depth"], patch_size)
    published = {"B": 85.8, "L": 303.3, "H": 630.8}
    if name in published:
        assert round(count / 1e6, 1) == published[name]
    fixed = jax.eval_shape(encoder.clone(pos_embed="sincos").init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert "pos_embed" not in fixed["params"]


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="heads names 2 blocks but depth=3"):
        TINY.clone(heads=(2, 2)).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="heads=3 does not divide the width 16"):
        TINY.clone(heads=3).init(jax.random.key(0), IMAGES)


def test_images_of_another_size_are_refused(params):
    with pytest.raises(ValueError, match="got images of 12x12, but this encoder was built for 8x12"):
        TINY.apply({"params": params}, jnp.zeros((1, 12, 12, 3)))


def test_tap_is_the_block_it_names(params):
    """Block k's tap, computed by hand from the residual stream after block k - 1."""
    stream = TINY.apply({"params": params}, IMAGES, method="embed")
    for k, heads in enumerate(TINY.block_heads, start=1):
        tap = TINY.apply({"params": params}, IMAGES, tap=k, method="encode")
        block = params[f"blocks_{k - 1}"]
        normed = (stream - stream.mean(-1, keepdims=True)) / jnp.sqrt(stream.var(-1, keepdims=True) + 1e-6)
        qkv = normed @ block["attn"]["qkv"]["kernel"]
        q, key, v = (x.reshape(3, 7, heads, 16 // heads) for x in jnp.split(qkv, 3, axis=-1))
        np.testing.assert_allclose(tap.q, q, atol=1e-5)
        np.testing.assert_allclose(tap.k, key, atol=1e-5)
        np.testing.assert_allclose(tap.v, v, atol=1e-5)
        np.testing.assert_allclose(tap.middle, stream + tap.attention, atol=1e-6)
        np.testing.assert_allclose(tap.output, tap.middle + tap.ffn, atol=1e-6)
        stream = tap.output


@pytest.mark.parametrize("scan", [False, True])
def test_several_taps_are_the_single_ones_of_one_pass(params, scan):
    encoder, key = TINY.clone(scan=scan), jax.random.key(3)

    def encode(tap):
        return encoder.apply({"params": params}, IMAGES, tap=tap, drop_key=key, method="encode")

    for tap, got in zip((3, 1, 3), jax.jit(lambda: encode((3, 1, 3)))()):
        want = jax.jit(lambda tap=tap: encode(tap))()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tap", [0, 4, (1, 4)])
def test_tap_outside_is_refused(params, tap):
    with pytest.raises(ValueError, match="choose 1 to 3"):
        TINY.apply({"params": params}, IMAGES, tap=tap, method="encode")


def flops(function, *args) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_a_tap_costs_nothing_beyond_itself():
    """Q, K, V of block 1 cost the embedding, one norm and one projection: no attention, no MLP, no block 2."""
    encoder = ViT(embed_dim=64, depth=3, heads=4, patch_size=4, image_size=(32, 32))
    images = jnp.zeros((2, 32, 32, 3))
    params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]

    def qkv(params, images):
        tap = encoder.apply({"params": params}, images, tap=1, method="encode")
        return tap.q, tap.k, tap.v

    tokens = 2 * 65
    needed = 2 * (2 * 64) * 48 * 64 + 2 * tokens * 64 * 3 * 64  # patch projection and qkv, in multiply-adds
    assert needed <= flops(qkv, params, images) < 1.2 * needed


def test_several_taps_cost_what_the_last_one_does():
    encoder = ViT(embed_dim=64, depth=4, heads=4, patch_size=4, image_size=(32, 32))
    images = jnp.zeros((2, 32, 32, 3))
    params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]
    one, two = (
        flops(
            lambda p, x, t=t: [tap.q for tap in encoder.apply({"params": p}, x, tap=t, method="encode")], params, images
        )
        for t in ((3,), (1, 3))
    )
    assert one <= two < 1.01 * one


def test_scan_and_remat_change_nothing_but_the_program(params):
    key = jax.random.key(7)

    def value_and_grad(encoder):
        def loss(params):
            return jnp.sum(encoder.apply({"params": params}, IMAGES, drop_key=key) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    want, want_grads = value_and_grad(TINY)
    for options in ({"scan": True}, {"remat": "dots"}, {"scan": True, "remat": "full"}):
        got, grads = value_and_grad(TINY.clone(**options))
        np.testing.assert_allclose(got, want, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, want_grads)
    with pytest.raises(ValueError, match="'none', 'dots', 'full'"):
        value_and_grad(TINY.clone(remat="all"))


def test_scan_compiles_one_body():
    encoder = ViT(embed_dim=16, depth=6, heads=2, patch_size=4, image_size=(8, 8))
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]
    text = {
        scan: jax.jit(encoder.clone(scan=scan).apply).lower({"params": params}, images).as_text()
        for scan in (False, True)
    }
    assert text[False].count("dot_general") == 6 * 6 + 1
    assert text[True].count("dot_general") == 6 + 1


def test_drop_path_leaves_out_whole_branches(params):
    """With every branch dropped, or kept and doubled, the output is one of the sums that can occur."""
    block = Block(16, 2)
    tokens = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32))
    variables = jax.jit(block.init)(jax.random.key(0), tokens)
    dropped = block.apply(variables, tokens, jnp.zeros((2, 2)))
    np.testing.assert_array_equal(dropped.output, tokens)
    whole, doubled = (
        block.apply(variables, tokens),
        block.apply(variables, tokens, jnp.array([[2.0, 1.0], [0.0, 1.0]])),
    )
    np.testing.assert_allclose(doubled.output[0], tokens[0] + 2 * whole.attention[0], atol=1e-5)
    np.testing.assert_allclose(doubled.output[1], whole.output[1], atol=1e-6)


def test_masked_encoder_sees_the_kept_patches_only(params):
    masking = random_masking(jax.random.key(3), 3, 6, 0.5)
    seen = TINY.apply({"params": params}, IMAGES, keep=masking.keep)
    assert seen.shape == (3, 4, 16)
    hidden = np.repeat(np.repeat(np.asarray(masking.hidden).reshape(3, 2, 3), 4, axis=1), 4, axis=2)
    changed = jnp.where(hidden[..., None], IMAGES + 5.0, IMAGES)
    np.testing.assert_array_equal(TINY.apply({"params": params}, changed, keep=masking.keep), seen)


def test_mae_decoder_puts_patches_back_in_place():
    """The prediction of a visible patch changes with its pixels; with every patch kept, order is the image's."""
    encoder = TINY.clone(drop_path=0.0)
    network = MaskedAutoencoder(encoder, MaeDecoder(encoder.grid, 4, embed_dim=8, depth=1, heads=2))
    masking = random_masking(jax.random.key(0), 3, 6, 0.5)
    variables = jax.jit(network.init)(jax.random.key(1), IMAGES, masking)
    assert network.apply(variables, IMAGES, masking).shape == (3, 6, 48)
    # Relabelling which patch is processed first must not change anything.
    order = jnp.array([2, 0, 1])
    shuffled = masking._replace(keep=masking.keep[:, order], restore=_relabel(masking.restore, order))
    np.testing.assert_allclose(
        network.apply(variables, IMAGES, shuffled), network.apply(variables, IMAGES, masking), atol=1e-5
    )


def _relabel(restore, order):
    position = jnp.concatenate([jnp.argsort(order), jnp.arange(3, 6)])
    return position[restore]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_classifier_pools_as_it_says(pool):
    encoder = TINY.clone(final_norm=pool == "cls")
    network = Classifier(encoder, classes=5, pool=pool, head_std=0.02)
    variables = jax.jit(network.init)(jax.random.key(0), IMAGES)
    assert ("fc_norm" in variables["params"]) == (pool == "mean")
    assert ("norm" in variables["params"]["encoder"]) == (pool == "cls")
    tokens = encoder.apply({"params": variables["params"]["encoder"]}, IMAGES)
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    if pool == "mean":
        pooled = (pooled - pooled.mean(-1, keepdims=True)) / jnp.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    want = pooled @ variables["params"]["head"]["kernel"]
    np.testing.assert_allclose(network.apply(variables, IMAGES), want, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_classifier_traces_with_a_symbolic_batch(scan):
    """One traced program for every batch size, with and without a DIST token."""
    encoder = TINY.clone(final_norm=False, dist_token=True, scan=scan)
    network = Classifier(encoder, classes=5, head_std=0.02)
    variables = jax.jit(network.init)(jax.random.key(0), IMAGES)
    (batch,) = export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *IMAGES.shape[1:]), jnp.float32)
    program = export.export(jax.jit(lambda images: network.apply(variables, images)))(shape)
    for images in (IMAGES[:1], IMAGES):
        np.testing.assert_allclose(program.call(images), jax.jit(network.apply)(variables, images), atol=1e-6)


def test_classifier_refuses_the_wrong_norm():
    with pytest.raises(ValueError, match="final_norm=True"):
        Classifier(TINY.clone(final_norm=False), classes=5, pool="cls").init(jax.random.key(0), IMAGES)


def test_bfloat16_computation_keeps_float32_parameters_and_logits():
    network = Classifier(TINY.clone(final_norm=False, dtype=jnp.bfloat16), classes=5)
    variables = jax.jit(network.init)(jax.random.key(0), IMAGES)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert network.apply(variables, IMAGES).dtype == jnp.float32
    tap = TINY.clone(dtype=jnp.bfloat16).apply(TINY.init(jax.random.key(0), IMAGES), IMAGES, tap=2, method="encode")
    assert tap.q.dtype == jnp.bfloat16
