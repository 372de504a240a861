"""Mixup, cutmix and random erasing against numpy, their distributions, and timm.

data/mixup.npz was written down with timm 1.0.31 and torch (`made_with` in the file; seeds 3 of numpy, torch, `random`):
- targets/S: mixup_target of `labels` for each of `lams` with smoothing S.
- mixup/, cutmix/: Mixup in mode 'batch' on `images` with smoothing 0.1, and the lambda and box that it drew.
- boxes: lambda, centre (row, column), and rand_bbox of a 7 x 9 image; box_area_*: of 20000 boxes, Beta(1, 1), 224 px.
- erased/: histograms of 20000 boxes of RandomErasing(1.0, mode='pixel') on 32 x 48 pixels.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import run_steps, small_config
from scipy import stats

from tinymim_jax.experiment import build_experiment, training_batches
from tinymim_jax.ops import erasing, losses, mixup
from tinymim_jax.ops.mixup import Mix
from tinymim_jax.sharding import batch_sharding, make_mesh
from tinymim_jax.tasks.classify import task as classify

BOTH = {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5}
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


def timm() -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parent / "data" / "mixup.npz") as file:
        return {key: file[key] for key in file.files}


TIMM = timm()


def mix_of(cut: bool, lam: float, box=(0, 0, 0, 0)) -> Mix:
    return Mix(jnp.asarray(cut), jnp.float32(lam), jnp.asarray(box, jnp.int32))


def draws(count: int, size=(224, 224), **changed) -> Mix:
    keys = jax.random.split(jax.random.key(0), count)
    return jax.device_get(jax.jit(jax.vmap(lambda key: mixup.draw_mix(key, size, **(BOTH | changed))))(keys))


# ------------------------------------------------------------------------------------- pixels and targets


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_batch_is_timms(kind):
    mix = mix_of(kind == "cutmix", float(TIMM[f"{kind}/lam"]), TIMM[f"{kind}/box"])
    images = jax.jit(mixup.mix_images)(jnp.asarray(TIMM["images"]), mix)
    targets = mixup.mix_targets(losses.soft_targets(jnp.asarray(TIMM["labels"]), 5, smoothing=0.1), mix.lam)
    np.testing.assert_allclose(images, TIMM[f"{kind}/images"], atol=1e-6)  # two roundings of numbers near 1
    np.testing.assert_allclose(targets, TIMM[f"{kind}/targets"], atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timms_and_sum_to_one(smoothing):
    for lam, want in zip(TIMM["lams"], TIMM[f"targets/{smoothing}"]):
        plain = losses.soft_targets(jnp.asarray(TIMM["labels"]), 5, smoothing=smoothing)
        got = mixup.mix_targets(plain, jnp.float32(lam))
        np.testing.assert_allclose(got, want, atol=1e-7)
        np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)


def test_mixup_by_definition():
    images = np.random.default_rng(0).normal(size=(5, 4, 6, 3)).astype(np.float32)
    got = mixup.mix_images(jnp.asarray(images), mix_of(False, 0.3))
    np.testing.assert_allclose(got, 0.3 * images + 0.7 * images[::-1], atol=1e-6)


def test_cutmix_by_definition_changes_no_bit_outside_the_box():
    images = np.random.default_rng(0).normal(size=(5, 4, 6, 3)).astype(np.float32)
    want = images.copy()
    want[:, 1:3, 2:6] = images[::-1, 1:3, 2:6]
    got = mixup.mix_images(jnp.asarray(images), mix_of(True, 1 - 8 / 24, (1, 3, 2, 6)))
    np.testing.assert_array_equal(got, want)


def test_no_mixing_changes_no_bit():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 6, 3)), jnp.float32)
    mix = mixup.draw_mix(jax.random.key(0), (4, 6), **(BOTH | {"prob": 0.0}))
    assert mix.lam == 1
    np.testing.assert_array_equal(mixup.mix_images(images, mix), images)


def test_soft_cross_entropy_in_closed_form():
    logits, targets = np.float32([[2.0, 0.0, -1.0]]), np.float32([[0.5, 0.2, 0.3]])
    log_p = logits[0] - np.log(np.exp(logits[0]).sum())
    got = losses.soft_cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(targets))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [-(targets[0] * log_p).sum()], rtol=1e-6)


# ---------------------------------------------------------------------------------------------- draws


def test_boxes_are_timms_for_the_same_centre(monkeypatch):
    for lam, row, column, *want in TIMM["boxes"]:
        centre = jnp.array([row, column], jnp.int32)
        monkeypatch.setattr(jax.random, "randint", lambda *_, centre=centre: centre)
        got = mixup.draw_box(jax.random.key(0), jnp.float32(lam), (7, 9))
        np.testing.assert_array_equal(got, want, f"lambda {lam}, centre {row}, {column}")


def test_lambda_of_mixup_is_beta():
    mix = draws(4000, cutmix=0.0)
    assert not mix.cut.any()
    assert stats.kstest(mix.lam, stats.beta(0.8, 0.8).cdf).pvalue > 0.001


def test_lambda_of_cutmix_is_the_share_that_is_left():
    mix = draws(4000, mixup=0.0)
    assert mix.cut.all()
    top, bottom, left, right = mix.box.T
    assert ((top >= 0) & (left >= 0) & (bottom <= 224) & (right <= 224) & (top <= bottom) & (left <= right)).all()
    area = (bottom - top) * (right - left) / 224**2
    np.testing.assert_allclose(mix.lam, 1 - area, atol=1e-6)
    # timm's 20000 boxes, written down as 101 quantiles: two-sample Kolmogorov-Smirnov at p = 0.001.
    positions = np.interp(np.sort(area), TIMM["box_area_quantiles"], np.linspace(0, 1, 101))
    distance = np.abs(positions - (np.arange(4000) + 0.5) / 4000).max()
    assert (
        distance < 1.95 * np.sqrt(1 / 4000 + 1 / 20000) + 0.01
    )  # the last term is for interpolating between the quantiles
    assert abs(area.mean() - TIMM["box_area_mean"]) < 4 * area.std() * np.sqrt(1 / 4000 + 1 / 20000)


@pytest.mark.parametrize(("prob", "switch"), [(1.0, 0.5), (0.6, 0.25), (1.0, 0.0), (0.0, 0.5), (1.0, 1.0)])
def test_how_often_batches_are_mixed_and_switched(prob, switch):
    mix = draws(4000, prob=prob, switch_prob=switch)
    observed = [(~mix.cut & (mix.lam == 1)).sum(), (~mix.cut & (mix.lam < 1)).sum(), mix.cut.sum()]
    for count, share in zip(observed, (1 - prob, prob * (1 - switch), prob * switch)):
        assert abs(count - 4000 * share) <= 4 * np.sqrt(4000 * share * (1 - share))
    assert (mix.box[~mix.cut] == 0).all()


def test_beta_of_either_kind_is_its_own():
    mix = draws(6000, mixup=4.0, size=(1000, 1000))
    assert stats.kstest(mix.lam[~mix.cut], stats.beta(4.0, 4.0).cdf).pvalue > 0.001


@pytest.mark.parametrize(("mix_a", "cut_a"), [(0.0, 0.0), (-0.1, 1.0)])
def test_alphas_are_checked(mix_a, cut_a):
    with pytest.raises(ValueError, match="one of them positive"):
        mixup.draw_mix(jax.random.key(0), (8, 8), mixup=mix_a, cutmix=cut_a, prob=1.0, switch_prob=0.5)


# --------------------------------------------------------------------------------------------- erasing


def erased_boxes(count: int, size=(32, 48), prob: float = 1.0, area=AREA, aspect=ASPECT) -> np.ndarray:
    draw = functools.partial(erasing.draw_boxes, shape=(count, *size), prob=prob, area=area, aspect=aspect)
    return np.asarray(jax.jit(draw)(jax.random.key(1)))


def numpy_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """Height and width of an erased box, by the definition."""
    for _ in range(10):
        pixels = rng.uniform(*AREA) * height * width
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        sides = round(np.sqrt(pixels * aspect)), round(np.sqrt(pixels / aspect))
        if sides[0] < height and sides[1] < width:
            return sides
    return 0, 0


def same_law(first: np.ndarray, second: np.ndarray) -> float:
    """p of the chi-square test that two histograms have the same distribution; sparse bins are joined."""
    order = np.argsort(first + second)
    first, second = first[order], second[order]
    few = np.cumsum(first + second) < 40
    tables = [np.append(h[~few], h[few].sum()) for h in (first, second)]
    tables = np.array([column for column in zip(*tables) if sum(column) > 0]).T
    return stats.chi2_contingency(tables).pvalue


def test_erased_boxes_follow_timms_law():
    top, bottom, left, right = erased_boxes(20000).T
    got = {"heights": (bottom - top, 33), "widths": (right - left, 49), "tops": (top, 33), "lefts": (left, 49)}
    for name, (values, bins) in got.items():
        assert same_law(np.bincount(values, minlength=bins), TIMM[f"erased/{name}"]) > 0.001, name


@pytest.mark.parametrize("size", [(32, 32), (224, 160)])
def test_areas_and_aspects_follow_numpys(size):
    top, bottom, left, right = erased_boxes(4000, size).T
    rng = np.random.default_rng(5)
    want = np.array([numpy_box(rng, *size) for _ in range(4000)])
    heights, widths = bottom - top, right - left
    for got, other in ((heights * widths, want.prod(axis=1)), (heights / widths, want[:, 0] / want[:, 1])):
        assert stats.ks_2samp(got, other).pvalue > 0.001
    assert (bottom <= size[0]).all()
    assert (right <= size[1]).all()


def test_a_box_that_never_fits_erases_nothing():
    assert (erased_boxes(50, (8, 8), area=(2.0, 3.0), aspect=(0.9, 1.1)) == 0).all()


def test_the_first_of_ten_boxes_that_fits_is_taken():
    # A box as high or wide as the image does not fit; of areas 0.94 to 1.1 few do.
    bounds = {"area": (0.94, 1.1), "aspect": (0.95, 1.05)}
    boxes = erased_boxes(4000, (64, 64), **bounds)
    rng = np.random.default_rng(8)
    pixels = rng.uniform(*bounds["area"], 100000) * 64 * 64
    aspect = np.exp(rng.uniform(*np.log(bounds["aspect"]), 100000))
    single = ((np.sqrt(pixels * aspect).round() < 64) & (np.sqrt(pixels / aspect).round() < 64)).mean()
    want = 1 - (1 - single) ** 10
    assert 0.2 < want < 0.95
    # Four standard errors of the share found; a tenth more for those of `single`.
    assert abs((boxes[:, 1] > 0).mean() - want) < 4.4 * np.sqrt(want * (1 - want) / 4000)


def test_a_quarter_of_the_images_is_erased_by_noise_and_the_rest_untouched():
    images = np.random.default_rng(2).normal(size=(2000, 16, 12, 3)).astype(np.float32)
    erase = jax.jit(functools.partial(erasing.random_erasing, prob=0.25))
    got = np.asarray(erase(jax.random.key(3), jnp.asarray(images)))
    changed = (got != images).any(axis=-1)  # [batch, height, width]
    erased = changed.any(axis=(1, 2))
    assert abs(erased.sum() - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)
    noise = []
    for image, mask in zip(got[erased], changed[erased]):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()  # one box, all of it
        noise.append(image[mask])
    noise = np.concatenate(noise).reshape(-1)
    assert stats.kstest(noise[:20000], "norm").pvalue > 0.001
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_erasing_by_definition():
    images, noise = np.random.default_rng(4).normal(size=(2, 3, 8, 9, 3)).astype(np.float32)
    boxes = np.array([[0, 0, 0, 0], [2, 5, 1, 9], [7, 8, 0, 1]], np.int32)
    want = images.copy()
    for image, fresh, (top, bottom, left, right) in zip(want, noise, boxes):
        image[top:bottom, left:right] = fresh[top:bottom, left:right]
    got = erasing.erase(jnp.asarray(images), jnp.asarray(boxes), jnp.asarray(noise))
    np.testing.assert_array_equal(got, want)


def test_a_probability_of_erasing_is_checked():
    with pytest.raises(ValueError, match=r"prob=1\.5 is a probability"):
        erased_boxes(1, prob=1.5)


# ------------------------------------------------------------------------------------- devices and the task


@pytest.mark.parametrize(("mix_a", "cut_a"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_eight_devices_give_what_one_gives(mix_a, cut_a):
    images = np.random.default_rng(6).normal(size=(16, 12, 10, 3)).astype(np.float32)
    labels = np.arange(16, dtype=np.int32) % 5

    def augment(key, images, labels):
        images = erasing.random_erasing(key, images, prob=0.5)
        mix = mixup.draw_mix(key, (12, 10), mixup=mix_a, cutmix=cut_a, prob=1.0, switch_prob=0.5)
        targets = losses.soft_targets(labels, 5, smoothing=0.1)
        return mixup.mix_images(images, mix), mixup.mix_targets(targets, mix.lam)

    mesh = make_mesh()
    assert mesh.size == 8
    split, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(augment, in_shardings=(whole, split, split), out_shardings=split)
    for seed in range(4):
        key = jax.random.key(seed)
        for got, want in zip(sharded(key, images, labels), jax.jit(augment)(key, images, labels)):
            assert len(got.sharding.device_set) == 8
            np.testing.assert_allclose(got, want, atol=1e-6)


PUBLISHED = ("classify.mixup=0.8", "classify.cutmix=1.0", "classify.erase=0.25", "model.drop_path=0.0")


@pytest.mark.slow
def test_a_step_is_the_same_on_eight_devices(data_dir):
    config = small_config("finetune", *PUBLISHED)
    one, first, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 3)
    eight, second, *_ = run_steps(config, data_dir, make_mesh(), 3)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    # Adam divides by the size of the gradient, so rounding errors show where that is tiny.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, eight.params)


def one_batch(rows: int) -> dict:
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(rows) % 10, "valid": jnp.ones(rows, bool)}


@pytest.mark.slow
def test_accumulated_parts_are_mixed_each_with_itself(data_dir):
    """Micro-batches are strided slices with their own keys: the step's losses are those of each computed alone."""
    config = small_config("finetune", *PUBLISHED, "train.accumulate=2")
    experiment = build_experiment(config, data_dir=data_dir)
    state, got, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 1)
    params = experiment.task.init(jax.random.key(config.seed))
    with training_batches(experiment, start_step=0, workers=0) as batches:
        batch = jax.tree.map(jnp.asarray, next(batches))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    losses_of = jax.jit(experiment.task.losses, static_argnums=4)
    slices = [{name: rows[i::2] for name, rows in batch.items()} for i in range(2)]
    parts = [losses_of(params, {}, part, jax.random.fold_in(key, i), True)["loss"] for i, part in enumerate(slices)]
    np.testing.assert_allclose(got, [np.mean(parts)], rtol=1e-5)
    assert state.step == 1


def test_the_task_erases_then_mixes_only_in_training(data_dir, monkeypatch):
    plain = build_experiment(small_config("finetune", "model.drop_path=0.0"), data_dir=data_dir).task
    task = build_experiment(small_config("finetune", *PUBLISHED), data_dir=data_dir).task
    params, batch, key = plain.init(jax.random.key(0)), one_batch(8), jax.random.key(1)
    # A fresh head is nearly zero: make the logits depend on the image.
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), params)
    before, after = (jax.jit(one.losses, static_argnums=4) for one in (plain, task))
    jax.tree.map(
        np.testing.assert_array_equal, after(params, {}, batch, key, False), before(params, {}, batch, key, False)
    )
    changed = ~np.isclose(after(params, {}, batch, key, True)["loss"], before(params, {}, batch, key, True)["loss"])
    assert changed.all()
    order = []
    for name in ("random_erasing", "mix_images"):
        real = getattr(classify, name)
        monkeypatch.setattr(classify, name, lambda *a, _real=real, _n=name, **k: (order.append(_n), _real(*a, **k))[1])
    jax.eval_shape(lambda: task.losses(params, {}, batch, key, True))
    assert order == ["random_erasing", "mix_images"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("classify.mixup=-1.0", r"classify\.mixup=-1\.0.*Beta"),
        ("classify.cutmix=-0.5", r"classify\.cutmix=-0\.5.*Beta"),
        ("classify.erase=1.5", r"classify\.erase=1\.5 is a probability"),
        ("classify.switch_prob=-1.0", r"classify\.switch_prob"),
        ("classify.mixup_prob=2.0", r"classify\.mixup_prob"),
    ],
)
def test_mistaken_numbers_are_named(word, message, data_dir):
    with pytest.raises(ValueError, match=message):
        build_experiment(small_config("finetune", word), data_dir=data_dir)
