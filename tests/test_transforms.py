"""Transforms against torchvision's own answers (written down below), Pillow and closed forms."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import psnr
from PIL import Image

from tinymim_jax.data.views import transforms
from tinymim_jax.data.views.resizers import RESIZERS
from tinymim_jax.data.views.transforms import Augment, EvalView

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------- cropping


class Draws:
    """A generator that gives the numbers torch drew, in the order in which torchvision drew them."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def uniform(self, low, high):
        assert low <= self.numbers[0] <= high
        return self.numbers.pop(0)

    def integers(self, count):
        assert 0 <= self.numbers[0] < count
        return self.numbers.pop(0)


RATIO = (3 / 4, 4 / 3)
# fmt: off
# (height, width, scale, ratio, the numbers torch drew, what torchvision 0.28's get_params returned): fits at
# once, at the second and fourth draw, never.
TORCHVISION_CROPS = [
    (375, 500, (0.2, 1), RATIO, [0.319233, -0.007737, 10, 193], (10, 193, 246, 244)),
    (375, 500, (0.2, 1), RATIO, [0.806105, -0.126977, 0.522455, 0.135029, 69, 147], (69, 147, 293, 335)),
    (8, 8, (0.6, 1), RATIO,
     [0.932101, -0.215122, 0.962988, 0.184075, 0.968041, -0.220569, 0.665757, 0.13689, 0, 0], (0, 0, 6, 7)),
    (300, 400, (0.9, 1), RATIO,
     [0.949626, 0.154325, 0.908848, -0.211716, 0.930742, 0.077144, 0.949009, 0.2281, 0.945563, 0.076124,
      0.934889, -0.056548, 0.902233, -0.190527, 0.929389, 0.010657, 0.969767, 0.172616, 0.916103, -0.125275],
     (0, 0, 300, 400)),
    (60, 400, (0.5, 1), RATIO,
     [0.502132, -0.226941, 0.642921, -0.272173, 0.735807, -0.253093, 0.885933, 0.140216, 0.797211, 0.223159,
      0.725516, 0.172316, 0.57492, -0.056691, 0.527088, -0.023357, 0.587803, 0.258444, 0.923659, 0.215679],
     (0, 160, 60, 80)),
    (401, 60, (0.5, 1), RATIO,
     [0.779819, 0.034, 0.545728, -0.166854, 0.503597, -0.265265, 0.996447, 0.237691, 0.80929, 0.272946,
      0.659456, -0.164078, 0.96313, -0.015237, 0.797473, 0.170067, 0.881742, -0.164725, 0.653316, -0.2655],
     (160, 0, 80, 60)),
    (200, 200, (1, 1), (0.5, 0.6),
     [1.0, -0.62368, 1.0, -0.606643, 1.0, -0.580283, 1.0, -0.675686, 1.0, -0.682695, 1.0, -0.595928, 1.0,
      -0.527444, 1.0, -0.564184, 1.0, -0.655765, 1.0, -0.514315],
     (0, 40, 200, 120)),
]
# fmt: on


@pytest.mark.parametrize(("height", "width", "scale", "ratio", "numbers", "want"), TORCHVISION_CROPS)
def test_crop_is_torchvisions(height, width, scale, ratio, numbers, want):
    draws = Draws(numbers)
    assert transforms.random_resized_crop_params(draws, height, width, scale, ratio) == want
    assert draws.numbers == []


def test_crops_are_uniform_in_area_and_place_and_log_uniform_in_ratio():
    rng = np.random.default_rng(1)
    crops = np.array([transforms.random_resized_crop_params(rng, 2000, 2000, (0.2, 0.5), RATIO) for _ in range(4000)])
    top, left, height, width = crops.T
    assert (top >= 0).all()
    assert (left + width <= 2000).all()
    area = height * width / 2000**2
    aspect = np.log(width / height) / np.log(4 / 3)
    place = left / (2000 - width)
    for name, unit in (("area", (area - 0.2) / 0.3), ("aspect", (aspect + 1) / 2), ("place", place)):
        # Kolmogorov's statistic against the uniform law: 4.4 sigma of 4000 draws is 0.035 at p = 1e-4.
        ranks = np.arange(1, 4001) / 4000
        assert np.max(np.abs(np.sort(unit) - ranks)) < 0.035, name


def test_augment_is_a_function_of_image_and_generator():
    augment = Augment(16)
    one, same, other = (augment(NOISE, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (16, 16, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_augment_flips_half_and_only_if_asked():
    whole = {"image_size": (60, 80), "crop_scale": (1.0, 1.0), "crop_ratio": (80 / 60, 80 / 60)}
    rng = np.random.default_rng(0)
    views = [Augment(**whole)(NOISE, rng) for _ in range(400)]
    flipped = sum(np.array_equal(view, NOISE[:, ::-1]) for view in views)
    assert flipped + sum(np.array_equal(view, NOISE) for view in views) == 400
    assert 160 < flipped < 240  # 4 sigma
    straight = Augment(**whole, flip=False)
    assert all(np.array_equal(straight(NOISE, rng), NOISE) for _ in range(20))


def test_augment_is_crop_then_resize_of_a_photo(photo):
    augment = Augment(64, flip=False)
    got = augment(photo, np.random.default_rng(5))
    top, left, height, width = transforms.random_resized_crop_params(
        np.random.default_rng(5), *photo.shape[:2], augment.crop_scale, augment.crop_ratio
    )
    crop = Image.fromarray(photo).crop((left, top, left + width, top + height))
    assert psnr(got, np.asarray(crop.resize((64, 64), Image.Resampling.BICUBIC))) > 50


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (32, -1)}, "image_size"),
        ({"image_size": 8, "crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"image_size": 8, "crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"image_size": 8, "crop_ratio": (2.0, 1.0)}, "crop_ratio"),
    ],
)
def test_augment_refuses(options, name):
    with pytest.raises(ValueError, match=name):
        Augment(**options)


# ---------------------------------------------------------------------------------------------- resizing


@pytest.fixture(params=RESIZERS)
def resizer(request):
    if request.param == "cykooz":
        pytest.importorskip("cykooz_resizer")  # optional
    return request.param


@pytest.mark.parametrize("size", [(224, 224), (112, 224), (320, 480), (427, 320), (64, 64)])
def test_fast_resize_is_close_to_pillow_on_a_photo(photo, size, resizer):
    want = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC))
    # 50 dB is an error of 0.8 grey levels; cv2, which does not filter, reaches 39 to 44.
    assert psnr(transforms.resize(photo, size, resizer), want) > 50


def test_a_resizer_gives_the_same_in_every_thread(photo, resizer):
    """And of a crop, whose rows do not lie one after another in memory, as of its copy."""
    crops = [photo[top : top + 200, left : left + 300] for top in (0, 100, 227) for left in (0, 33, 340)]
    want = [RESIZERS[resizer](np.ascontiguousarray(crop), (96, 128)) for crop in crops]
    assert all(each.shape == (96, 128, 3) and each.dtype == np.uint8 for each in want)
    with ThreadPoolExecutor(4) as pool:
        for got in (pool.map(lambda crop: RESIZERS[resizer](crop, (96, 128)), crops) for _ in range(3)):
            np.testing.assert_array_equal(list(got), want)


def test_the_view_uses_the_resizer_that_it_is_told(photo, resizer, monkeypatch):
    augment = Augment(64, resizer=resizer)  # some seeds flip, some do not
    before = [augment(photo, np.random.default_rng(seed)) for seed in range(4)]
    monkeypatch.setitem(RESIZERS, resizer, lambda image, size: np.full((*size, 3), 7, np.uint8))
    assert not any((view == 7).all() for view in before)
    assert all((augment(photo, np.random.default_rng(seed)) == 7).all() for seed in range(4))


def test_resizers_that_are_not_there_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"data\.resizer='cykoz' is unknown; did you mean 'cykooz'"):
        Augment(64, resizer="cykoz")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'tinymim-jax\[resize\]'.*or set data\.resizer='kornia'"):
        Augment(64, resizer="cykooz")


@pytest.mark.parametrize(("shape", "size"), [((8, 8), (32, 32)), ((8, 8), (5, 7)), ((60, 80), (90, 70))])
def test_enlarged_and_tiny_images_are_pillows(shape, size):
    image = NOISE[: shape[0], : shape[1]]
    want = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(transforms.resize(image, size), want)
    np.testing.assert_array_equal(transforms.resize_exact(image, size), want)


def test_flip_reverses_columns_of_any_layout():
    np.testing.assert_array_equal(transforms.flip_horizontally(NOISE), NOISE[:, ::-1])
    view = NOISE[5:40:2, 3:50]
    np.testing.assert_array_equal(transforms.flip_horizontally(view), view[:, ::-1])


# (size, short side, the size torchvision 0.28's Resize gives)
TORCHVISION_SIZES = [
    ((375, 500), 256, (256, 341)),
    ((500, 375), 256, (341, 256)),
    ((333, 500), 256, (256, 384)),
    ((8, 8), 32, (32, 32)),
    ((1, 9), 7, (7, 63)),
    ((601, 399), 224, (337, 224)),
    ((256, 300), 256, (256, 300)),
    ((97, 1001), 36, (36, 371)),
]


@pytest.mark.parametrize(("size", "short", "want"), TORCHVISION_SIZES)
def test_short_side_is_torchvisions(size, short, want):
    assert transforms.short_side_size(size, short) == want


# (size, crop, the top left pixel of torchvision 0.28's CenterCrop)
TORCHVISION_CENTERS = [
    ((256, 341), (224, 224), (16, 58)),
    ((257, 256), (224, 224), (16, 16)),
    ((259, 261), (224, 224), (18, 18)),
    ((7, 6), (4, 3), (2, 2)),
    ((5, 5), (5, 5), (0, 0)),
    ((33, 36), (32, 31), (0, 2)),
]


@pytest.mark.parametrize(("size", "crop", "corner"), TORCHVISION_CENTERS)
def test_center_crop_is_torchvisions(size, crop, corner):
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    got = transforms.center_crop(np.stack([rows, columns, rows], axis=-1), crop)
    assert got.shape == (*crop, 3)
    assert tuple(got[0, 0, :2]) == corner


@pytest.mark.parametrize(("image_size", "resize"), [(224, 256), (32, 32), ((100, 151), 160)])
def test_eval_view_is_pillows_resize_and_centre(photo, image_size, resize):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    long = int(resize * 640 / 427)
    whole = Image.fromarray(photo).resize((long, resize), Image.Resampling.BICUBIC)
    left, top = round((long - width) / 2), round((resize - height) / 2)
    want = np.asarray(whole.crop((left, top, left + width, top + height)))
    np.testing.assert_array_equal(EvalView(image_size, resize)(photo), want)


def test_eval_view_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match=r"resize=200 must be at least .* 224"):
        EvalView(image_size=224, resize=200)


def test_eval_view_with_the_interpolation_of_a_checkpoint(photo):
    whole = Image.fromarray(photo).resize((95, 64), Image.Resampling.BILINEAR)  # int(64 * 640 / 427) = 95
    left = round((95 - 48) / 2)
    want = np.asarray(whole.crop((left, 8, left + 48, 56)))
    got = EvalView(image_size=48, resize=64, interpolation="bilinear")(photo)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"interpolation='cubic' is unknown; did you mean 'bicubic'"):
        EvalView(image_size=48, resize=64, interpolation="cubic")
