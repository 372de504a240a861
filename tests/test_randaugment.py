"""RandAugment against timm's own pixels, arguments and policies, and its draws against the definition.

data/randaugment.npz was written down with timm 1.0.31 and Pillow 13.0.0 (`made_with` in the file):
- small, large, flat: pictures of gradients and noise (numpy seed 7); flat has channels of one value and of gaps.
- argument/KIND/NAME [sign, grid]: timm's LEVEL_TO_ARG, KIND "inc" for the sets that timm calls increasing. NaN: none.
- pixels/KIND/NAME/PICTURE [sampler, sign, magnitude, ...]: timm's AugmentOp at prob 1, bilinear and bicubic.
- policy/N: timm's rand_augment_transform on `large` (numpy seed 11, `random` seed 5), every number that it drew written
  down by a stand-in for `random`: operation, to skip, magnitude, sign, sampler.
Pillow 13's own posterize refuses to keep 0 bits, and timm with it; there the file has what versions before it give,
black.
"""

import pathlib

import numpy as np
import pytest
from PIL import Image
from runs import small_config
from scipy import stats

from tinymim_jax.data.views import randaugment
from tinymim_jax.data.views.randaugment import OPERATIONS, Operation, RandAugment
from tinymim_jax.data.views.transforms import Augment
from tinymim_jax.experiment import build_experiment, training_batches

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
PUBLISHED = "rand-m9-mstd0.5-inc1"
SAMPLERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def timm() -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parent / "data" / "randaugment.npz") as file:
        return {key: file[key] for key in file.files}


TIMM = timm()


# ------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("key", [key for key in TIMM if key.startswith("argument/")])
def test_arguments_are_timms(key):
    _, kind, name = key.split("/")
    for sign, wanted in zip((1, -1), TIMM[key]):
        got = [OPERATIONS[name].argument(float(m), sign, kind == "inc") for m in TIMM["grid"]]
        if np.isnan(wanted).all():
            continue
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("key", [key for key in TIMM if key.startswith("pixels/")])
def test_pixels_are_timms(key):
    _, kind, name, picture = key.split("/")
    image, wanted = Image.fromarray(TIMM[picture]), TIMM[key]
    operation = OPERATIONS[name]
    for sampler, sign, m in np.ndindex(wanted.shape[:3]):
        argument = operation.argument(float(TIMM["magnitudes"][m]), (1, -1)[sign], kind == "inc")
        used = SAMPLERS[sampler] if wanted.shape[0] == 2 else SAMPLERS[1]
        got = np.asarray(operation.apply(image, argument, used, FILL))
        np.testing.assert_array_equal(got, wanted[sampler, sign, m], f"{used}, sign {sign}, magnitude {m}")


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 7, 8])
def test_posterizing_keeps_the_high_bits(bits):
    pixels = np.random.default_rng(bits).integers(0, 256, (9, 7, 3), np.uint8)
    got = OPERATIONS["Posterize"].apply(Image.fromarray(pixels), bits, Image.Resampling.BICUBIC, (0, 0, 0))
    np.testing.assert_array_equal(np.asarray(got), pixels & (0xFF00 >> bits & 0xFF))


@pytest.mark.parametrize("seed", range(4))
def test_tables_of_levels_written_out(seed):
    """Narrow, flat and full histograms: what autocontrast and equalize compute, with whole numbers in numpy."""
    rng = np.random.default_rng(seed)
    low, high = ((0, 256), (40, 90), (7, 8), (250, 256))[seed]
    pixels = rng.integers(low, high, (40, 30, 3), np.uint8)
    levels = np.arange(256)

    def applied(name, argument=0.0):
        operation = OPERATIONS[name]
        return np.asarray(operation.apply(Image.fromarray(pixels), argument, Image.Resampling.BICUBIC, (0, 0, 0)))

    for channel in range(3):
        seen = pixels[..., channel]
        first, last = int(seen.min()), int(seen.max())
        scale = 255.0 / max(last - first, 1)
        stretched = np.clip((levels * scale + -first * scale).astype(np.int64), 0, 255)
        table = stretched if last > first else levels
        np.testing.assert_array_equal(applied("AutoContrast")[..., channel], table[seen])
        counts = np.bincount(seen.ravel(), minlength=256)
        used = counts[counts > 0]
        step = (used.sum() - used[-1]) // 255
        table = (step // 2 + np.cumsum(counts) - counts) // step if step else levels
        np.testing.assert_array_equal(applied("Equalize")[..., channel], np.minimum(table, 255)[seen])
    np.testing.assert_array_equal(applied("Invert"), 255 - pixels)
    np.testing.assert_array_equal(applied("Solarize", 100), np.where(pixels < 100, pixels, 255 - pixels))
    want = np.where(pixels < 128, np.minimum(pixels.astype(int) + 30, 255), pixels)
    np.testing.assert_array_equal(applied("SolarizeAdd", 30), want)


def test_the_file_covers_every_operation():
    names = {key.split("/")[2] for key in TIMM if key.startswith("pixels/inc/")}
    assert names == set(OPERATIONS)
    assert len(names) == 15


class Replayed:
    """A generator that gives the numbers that timm drew."""

    def __init__(self, draws: np.ndarray, skips: bool):
        self.draws, self.skips, self.layer, self.uniforms = draws, skips, -1, 0

    def integers(self, count, size=None):
        if size is not None:
            assert (count, size) == (15, len(self.draws))
            return self.draws[:, 0].astype(int)
        assert count == 2
        return int(np.nan_to_num(self._of(4)))

    def _of(self, column: int) -> float:
        return float(self.draws[self.layer, column])

    def random(self):
        # Two for each layer, or one where nothing can be skipped: to skip, then for the sign.
        turn, self.uniforms = self.uniforms, self.uniforms + 1
        per_layer = 2 if self.skips else 1
        if turn % per_layer == 0:
            self.layer += 1
            if self.skips:
                return self._of(1)
        return float(np.nan_to_num(self._of(3)))

    def normal(self, mean, deviation):
        # Before the layer's sign, which without skipping is its first uniform number.
        row = self.layer + (0 if self.skips else 1)
        return float(np.nan_to_num(self.draws[row, 2], nan=mean))

    def uniform(self, low, high):
        assert low == 0
        return self.normal(high / 2, None)


@pytest.mark.parametrize("case", range(sum(key.endswith("/draws") for key in TIMM)))
def test_whole_policies_are_timms(case):
    text, interpolation = TIMM[f"policy/{case}/text"]
    policy = RandAugment.parse(str(text), mean=MEAN, interpolation=str(interpolation))
    replayed = Replayed(TIMM[f"policy/{case}/draws"], skips=policy.prob < 1)
    np.testing.assert_array_equal(policy(TIMM["large"], replayed), TIMM[f"policy/{case}/pixels"])
    assert replayed.layer == policy.layers - 1


# ---------------------------------------------------------------------------------------------- strings


def test_the_published_string():
    got = RandAugment.parse(PUBLISHED, mean=MEAN)
    assert got == RandAugment(magnitude=9, deviation=0.5, increasing=True, fill=FILL)
    assert (got.layers, got.prob, got.max_magnitude, got.interpolation) == (2, 0.5, 10, "bicubic")


def test_every_section():
    got = RandAugment.parse("rand-inc0-n3-p0.25-mmax30-mstd101-m15", mean=(1.0, 0.0, 0.5), interpolation="random")
    want = RandAugment(15, 3, 0.25, float("inf"), 30, False, (255, 0, 128), "random")
    assert got == want
    assert RandAugment.parse("rand", mean=MEAN).magnitude == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-p0.5-inc2", "-inc is '2'"),
        ("augmix-m3", "does not start with 'rand'"),
        ("rand-m9-tweights", "section of rand_augment='rand-m9-tweights'='tweights' is unknown.*'m'.*'inc'"),
        ("rand-m9-mst0.5", "did you mean 'mstd'"),
        ("rand-m", "-m is ''. Write it like rand-m9-mstd0.5-inc1"),
        ("rand-m9-m8", "-m twice"),
        ("rand-m9.5", "-m is '9.5'.*whole numbers m"),
        ("rand-mstd-0.5", "-mstd is ''"),
        ("rand-mstdnan", "'mstdnan' is unknown"),
        ("rand-n0", "n=0 layers"),
        ("rand-p2", "p=2.0 is a probability"),
        ("rand-mmax0", "mmax=0 must be positive"),
    ],
)
def test_other_strings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        RandAugment.parse(text, mean=MEAN)


def test_unknown_interpolation():
    with pytest.raises(ValueError, match="did you mean 'bicubic'"):
        RandAugment.parse(PUBLISHED, mean=MEAN, interpolation="cubic")


# ------------------------------------------------------------------------------------------------ draws


@pytest.fixture
def recorded(monkeypatch):
    """(name, magnitude, sign, sampler) of every operation done, and nothing done."""
    done = []

    def row(name: str) -> Operation:
        return Operation(
            lambda magnitude, sign, increasing: (magnitude, sign),
            lambda picture, argument, sampler, fill: (done.append((name, *argument, sampler)), picture)[1],
        )

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: row(name) for name in OPERATIONS})
    return done


def test_operations_are_equally_likely_and_half_are_done(recorded):
    policy, rng = RandAugment.parse(PUBLISHED, mean=MEAN, interpolation="random"), np.random.default_rng(0)
    done = []
    for _ in range(6000):
        policy(TIMM["small"], rng)
        done.append(len(recorded))
    each = np.diff([0, *done])
    # Binomial(2, 1/2): none, one, two operations; chi-square of 2 degrees of freedom.
    assert stats.chisquare(np.bincount(each), [1500, 3000, 1500]).pvalue > 0.001
    names, signs, samplers = ([row[i] for row in recorded] for i in (0, 2, 3))
    assert stats.chisquare([names.count(name) for name in OPERATIONS]).pvalue > 0.001
    assert stats.chisquare([signs.count(1), signs.count(-1)]).pvalue > 0.001
    assert stats.chisquare([samplers.count(s) for s in SAMPLERS]).pvalue > 0.001


def test_magnitudes_are_a_clipped_normal(recorded):
    policy, rng = RandAugment.parse("rand-m9-mstd0.5-inc1-p1.0-n4", mean=MEAN), np.random.default_rng(1)
    for _ in range(1500):
        policy(TIMM["small"], rng)
    magnitudes = np.array([row[1] for row in recorded])
    assert len(magnitudes) == 6000
    # Two standard deviations above 9 is 10, where it is cut off: 2.3 %, 136 of 6000.
    assert 90 < (magnitudes == 10).sum() < 185
    edges = np.linspace(7.5, 9.9, 13)
    counts = np.histogram(magnitudes, edges)[0]
    expected = np.diff(stats.norm.cdf(edges, 9, 0.5)) * 6000
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 0.001


@pytest.mark.parametrize(("text", "high"), [("rand-m8-mstd101-p1.0", 8), ("rand-m20-mmax20-mstd500-p1.0", 20)])
def test_magnitudes_are_uniform_if_so_asked(recorded, text, high):
    policy, rng = RandAugment.parse(text, mean=MEAN), np.random.default_rng(2)
    for _ in range(1000):
        policy(TIMM["small"], rng)
    assert stats.kstest([row[1] / high for row in recorded], "uniform").pvalue > 0.001


@pytest.mark.parametrize(("text", "want"), [("rand-m9-p1.0", 9), ("rand-m14-p1.0", 10), ("rand-m14-mmax12-p1.0", 12)])
def test_magnitudes_without_noise(recorded, text, want):
    RandAugment.parse(text, mean=MEAN)(TIMM["small"], np.random.default_rng(2))
    assert [row[1] for row in recorded] == [want] * 2


def test_same_generator_same_pixels():
    policy = RandAugment.parse(PUBLISHED, mean=MEAN, interpolation="random")
    before = TIMM["large"].copy()
    first, again = ([policy(TIMM["large"], np.random.default_rng(seed)) for seed in range(12)] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({image.tobytes() for image in first}) > 6
    np.testing.assert_array_equal(TIMM["large"], before)
    assert all(image.dtype == np.uint8 and image.shape == before.shape for image in first)


# ---------------------------------------------------------------------------------------------- the view


def test_the_view_augments_after_crop_and_flip():
    plain = Augment(24)
    view = Augment(24, rand_augment="rand-m9-n3-p1.0-inc1", mean=(0.5, 0.5, 0.5))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cropped = plain(TIMM["large"], rng)  # leaves the generator where RandAugment takes over
        policy = RandAugment.parse("rand-m9-n3-p1.0-inc1", mean=(0.5, 0.5, 0.5))
        np.testing.assert_array_equal(view(TIMM["large"], np.random.default_rng(seed)), policy(cropped, rng))


def test_the_view_refuses_a_mistaken_string_at_once():
    with pytest.raises(ValueError, match="section of rand_augment"):
        Augment(24, rand_augment="rand-x9")


def test_training_batches_are_augmented_as_the_config_says(data_dir):
    words = ["data.rand_augment=rand-m9-n2-p1.0-inc1", "data.mean=(0.0,0.0,1.0)"]
    batches = []
    for overrides in ([], words, words):
        experiment = build_experiment(small_config("finetune", *overrides), data_dir=data_dir)
        with training_batches(experiment, start_step=3, workers=0) as made:
            batches.append(next(made))
    plain, one, same = batches
    np.testing.assert_array_equal(one["image"], same["image"])
    np.testing.assert_array_equal(one["label"], plain["label"])
    assert not np.array_equal(one["image"], plain["image"])
    # Digits are grey: blue can only be the fill.
    assert (one["image"] == [0, 0, 255]).all(axis=-1).any()
