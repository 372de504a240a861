"""Array operations against numpy, Pillow and the golden files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tinymim_jax.ops import color, drop_path, losses, masking, patches, posembed, relations
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.platform import compiling_for
from tinymim_jax.ops.products import scaled_products


def test_patchify_cuts_rows_of_patches_and_back():
    images = np.random.default_rng(0).normal(size=(2, 6, 9, 3)).astype(np.float32)
    got = patches.patchify(jnp.asarray(images), 3)
    want = np.stack([images[:, y : y + 3, x : x + 3].reshape(2, -1) for y in (0, 3) for x in (0, 3, 6)], axis=1)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(patches.unpatchify(got, 3, (2, 3)), images)


def test_patchify_refuses_a_ragged_grid():
    with pytest.raises(ValueError, match="30x32 cannot be cut into patches of 8"):
        patches.patchify(jnp.zeros((1, 30, 32, 3)), 8)


def test_masking_follows_the_noise_image_by_image(golden):
    data = golden.arrays("mae.npz")
    got = masking.masking_from_noise(jnp.asarray(data["noise"]), golden.meta["mae"]["mask_ratio"])
    np.testing.assert_array_equal(got.hidden, data["mask"].astype(bool))
    np.testing.assert_array_equal(got.restore, data["ids_restore"])


def test_random_masking_differs_between_images_and_hides_the_ratio():
    got = masking.random_masking(jax.random.key(0), 64, 16, 0.75)
    hidden = np.asarray(got.hidden)
    np.testing.assert_array_equal(hidden.sum(axis=1), 12)
    assert len({row.tobytes() for row in hidden}) > 50
    # Every position is hidden about equally often: 48 of 64, four standard deviations of a binomial are 14.
    assert np.all(np.abs(hidden.sum(axis=0) - 48) < 14)


def test_masking_that_hides_everything_is_refused():
    with pytest.raises(ValueError, match="hides all of 4 patches"):
        masking.kept_patches(4, 0.9)


def test_sincos_table(golden, close):
    want = golden.arrays("pos_embed.npz")["sincos_192_14_cls"]
    close(posembed.sincos_table(192, (14, 14))[0], want, 1e-5)


def test_sincos_table_of_an_oblong_grid_is_width_first():
    table = posembed.sincos_table(8, (2, 3))[0, 1:].reshape(2, 3, 8)
    # Channels of the first half know the column only, those of the second half the row only.
    np.testing.assert_array_equal(table[0, :, :4], table[1, :, :4])
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])
    np.testing.assert_allclose(table[0, 2, 0], np.sin(2.0), rtol=1e-6)


@pytest.mark.parametrize("size", [7, 16, 24, 32])
def test_bicubic_resizing_is_torchs(golden, close, size):
    data = golden.arrays("pos_embed.npz")
    got = posembed.resize_table(jnp.asarray(data["pos_14"]), (14, 14), (size, size))
    close(got, data[f"pos_{size}"], 1e-5)


def test_relation_kl_is_the_mean_divergence():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 3, 4, 5, 5)).astype(np.float32)
    p = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    q = np.exp(student) / np.exp(student).sum(-1, keepdims=True)
    want = (p * np.log(p / q)).sum(-1).mean((1, 2))
    np.testing.assert_allclose(relations.relation_kl(jnp.asarray(student), jnp.asarray(teacher)), want, rtol=1e-5)


def test_relation_kl_survives_an_underflowing_softmax():
    student = jnp.asarray(np.float32([[[[0.0, 300.0]]]]))
    teacher = jnp.asarray(np.float32([[[[300.0, 0.0]]]]))
    # softmax(student)[0] is 0 in float32; its logarithm is still -300.
    np.testing.assert_allclose(relations.relation_kl(student, teacher), [300.0], rtol=1e-6)


def test_scaled_products_scale_by_the_own_head_dim():
    q, k = np.random.default_rng(2).normal(size=(2, 2, 5, 3, 16)).astype(np.float32)
    want = np.einsum("bqhd,bkhd->bhqk", q, k) / 4
    np.testing.assert_allclose(scaled_products(jnp.asarray(q), jnp.asarray(k)), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_pixel_loss_of_the_golden_run(golden, close, normalize):
    data = golden.arrays("mae.npz")
    target = patches.patchify(jnp.asarray(data["images"]), golden.meta["patch_size"])
    hidden = jnp.asarray(data["mask"].astype(bool))
    got = losses.masked_pixel_loss(jnp.asarray(data["pred"]), target, hidden, normalize=normalize)
    close(got.mean(), data[f"loss_norm_pix_{normalize}"], 1e-5)


def test_smoothed_cross_entropy_in_closed_form():
    logits = np.float32([[2.0, 0.0, -1.0]])
    log_p = logits[0] - np.log(np.exp(logits[0]).sum())
    want = -(0.9 * log_p[1] + 0.1 * log_p.mean())
    targets = losses.soft_targets(jnp.asarray([1]), 3, smoothing=0.1)
    got = losses.soft_cross_entropy(jnp.asarray(logits), targets)
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_normalize():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    want = (pixels / 255.0 - color.IMAGENET_MEAN) / color.IMAGENET_STD
    np.testing.assert_allclose(color.normalize(jnp.asarray(pixels)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_jitter_is_pillows(order):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
    factors = np.float32([[0.6, 1.4, 1.2], [1.3, 0.7, 0.6], [1.0, 1.1, 0.9]])
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    want = []
    for pixels, row in zip(images, factors):
        picture = Image.fromarray(pixels)
        for operation in order:
            picture = enhance[operation](picture).enhance(float(row[operation]))
        want.append(np.asarray(picture))
    got = color.apply_jitter(jnp.asarray(images), jnp.asarray(factors), jnp.tile(jnp.asarray(order), (3, 1)))
    # Pillow blends in float32 in another order of operations: a few pixels land on the other side of a whole number.
    difference = np.abs(np.asarray(got) - np.stack(want).astype(np.float32))
    assert (difference == 0).mean() > 0.999
    assert difference.max() <= 1


def test_jitter_draws_factors_in_range_for_each_image():
    images = jnp.full((512, 2, 2, 3), 100, jnp.uint8)
    got = color.color_jitter(jax.random.key(1), images, brightness=0.4, contrast=0.0, saturation=0.0)
    values = np.asarray(got)[:, 0, 0, 0]
    assert 59 <= values.min() < 65
    assert 135 < values.max() <= 140
    assert abs(values.mean() - 100) < 5
    assert len(np.unique(values)) > 50


def test_no_jitter_changes_nothing():
    images = jnp.asarray(np.random.default_rng(4).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    got = color.color_jitter(jax.random.key(1), images, brightness=0.0, contrast=0.0, saturation=0.0)
    np.testing.assert_array_equal(got, images.astype(jnp.float32))


def test_drop_path_rates():
    assert drop_path.drop_path_rates(0.1, 4, "constant") == (0.1, 0.1, 0.1, 0.0)
    np.testing.assert_allclose(drop_path.drop_path_rates(0.3, 4, "linear"), [0.0, 0.1, 0.2, 0.3], atol=1e-12)
    with pytest.raises(ValueError, match="'linear', 'constant'"):
        drop_path.drop_path_rates(0.1, 4, "cosine")


def test_drop_path_scales_keep_the_mean():
    scales = np.asarray(drop_path.drop_path_scales(jax.random.key(0), (0.0, 0.5), 4000))
    np.testing.assert_array_equal(scales[0], 1.0)
    assert set(np.unique(scales[1])) == {0.0, 2.0}
    np.testing.assert_allclose(scales[1].mean(axis=1), 1.0, atol=0.07)  # four standard errors


def test_keys_are_addressed_by_name():
    root = jax.random.key(0)
    draws = [float(jax.random.uniform(fold_in_name(root, name))) for name in ("jitter", "masking", "jitter")]
    assert draws[0] == draws[2] != draws[1]


def test_products_of_float32_ask_for_full_precision():
    """TPUs and GPUs multiply float32 operands in fewer bits by default; those of bfloat16 are left alone."""
    from tinymim_jax.models.heads import Classifier
    from tinymim_jax.models.vit import ViT
    from tinymim_jax.ops.neighbors import nearest

    def precisions(function, *arguments) -> set[str]:
        with compiling_for("tpu"):
            text = str(jax.make_jaxpr(function)(*arguments))
        products = re.findall(r"dot_general\[(.*?)\]\s", text, flags=re.DOTALL)
        assert products
        return {"HIGHEST" if "HIGHEST" in each else "default" for each in products}

    images = jnp.zeros((2, 16, 16, 3))
    for dtype, expected in ((jnp.float32, {"HIGHEST"}), (jnp.bfloat16, {"default"})):
        encoder = ViT(embed_dim=16, depth=1, heads=2, patch_size=8, image_size=(16, 16), dtype=dtype)
        params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]

        def loss(params, encoder=encoder):
            return encoder.apply({"params": params}, images).astype(jnp.float32).sum()

        assert precisions(jax.grad(loss), params) == expected
        network = Classifier(encoder, 3, pool="cls")
        variables = jax.jit(network.init)(jax.random.key(0), images)
        assert "HIGHEST" in precisions(network.apply, variables, images)
    features, labels = jnp.zeros((4, 8)), jnp.zeros(4, jnp.int32)
    assert precisions(lambda x: nearest(x, x, labels, labels == 0, 2), features) == {"HIGHEST"}
