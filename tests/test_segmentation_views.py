"""Views of images and masks against the authors' library and OpenCV (golden files), and their laws in the pipeline."""

import numpy as np
import pytest
from pictures import encoded
from segmentation_files import segmentation_golden

from tinymim_jax.data.pipeline import eval_batches, train_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.decoding import Picture
from tinymim_jax.data.views.photometric import Distortion, distort, draw_distortion
from tinymim_jax.data.views.segmentation import SegmentationAugment, SegmentationView, scaled_size

GOLDEN, CASES = segmentation_golden("seg_augment.npz"), segmentation_golden("seg_small.json")
SIZES = segmentation_golden("seg_meta.json")["augment"]
GEOMETRY, CROP = CASES["geometry"], SIZES["crop"]


class Drawn:
    """Stands in for a generator of random numbers: returns what is given, by the kind of draw."""

    def __init__(self, *, uniform, integers, random):
        self._uniform, self._integers, self._random = list(uniform), list(integers), list(random)

    def uniform(self, low, high):
        value = self._uniform.pop(0)
        assert low <= value <= high
        return value

    def integers(self, high):
        value = self._integers.pop(0) if self._integers else 0
        assert 0 <= value < high
        return value

    def random(self):
        return self._random.pop(0)


@pytest.mark.parametrize("number", range(len(CASES["photometric"])))
def test_photometric_distortion_is_that_of_opencv(number):
    draws = CASES["photometric"][number]
    got = distort(GOLDEN["photometric/image"], Distortion(**draws | {"hue": draws["hue"] and int(draws["hue"])}))
    difference = np.abs(got.astype(int) - GOLDEN[f"photometric/{number}"])
    assert got.dtype == np.uint8
    assert difference.max() <= 4 and difference.mean() <= 0.5  # noqa: PT018  # float32 against fixed point


def test_colours_survive_the_way_to_hsv_and_back():
    pixels = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3, indexing="ij"), -1).reshape(-1, 6, 3).astype(np.uint8)
    got = distort(pixels, Distortion(hue=0))
    assert np.abs(got.astype(int) - pixels).max() <= 6  # hue in 2-degree steps: 255 / 60 a step and rounding
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert np.abs(distort(grey, Distortion(hue=7, saturation=1.4)).astype(int) - grey).max() <= 1
    np.testing.assert_array_equal(distort(pixels, Distortion()), pixels)


def test_draws_of_the_distortion():
    drawn = [draw_distortion(np.random.default_rng(seed)) for seed in range(2000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = [getattr(each, name) for each in drawn if getattr(each, name) is not None]
        assert 0.45 < len(values) / len(drawn) < 0.55
        span = high - low
        assert low <= min(values) <= low + 0.1 * span and high - 0.1 * span <= max(values) <= high  # noqa: PT018
    assert 0.45 < np.mean([each.contrast_first for each in drawn]) < 0.55


@pytest.mark.parametrize("number", range(len(GEOMETRY)))
def test_resizing_cropping_and_padding_are_those_of_the_authors_library(number):
    case = GEOMETRY[number]
    image, mask = (GOLDEN[f"geometry/{what}_{case['picture']}"] for what in ("image", "mask"))
    assert scaled_size(mask.shape, tuple(SIZES["img_scale"]), case["ratio"]) == tuple(case["resized"])
    view = SegmentationAugment(
        (CROP, CROP),
        classes=254,
        scale=tuple(SIZES["img_scale"]),
        scale_range=tuple(SIZES["ratio_range"]),
        max_class_share=SIZES["cat_max_ratio"],
        photometric=False,
        fill=(0, 0, 0),
    )
    offsets = [value for pair in case["offsets_drawn"] for value in pair]
    rng = Drawn(uniform=[case["ratio"]], integers=offsets, random=[0.0 if case["flip"] else 0.9])
    made = view.make(Picture.of(image), {"image": b"", "label": -1, "pixel_labels": mask}, rng)
    np.testing.assert_array_equal(made["pixel_labels"], GOLDEN[f"geometry/{number}/mask"])
    # The bilinear kernel differs from OpenCV's fixed-point one by up to two levels.
    difference = np.abs(made["image"].astype(int) - GOLDEN[f"geometry/{number}/image"])
    assert difference.max() <= 2 and difference.mean() <= 1  # noqa: PT018


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of 30 x 40 pixels whose left part is class 0, red, and whose right part is class 1, green."""
    labels = np.zeros((30, 40), np.uint8)
    labels[:, 12 + number :] = 1
    image = np.zeros((30, 40, 3), np.uint8)
    image[labels == 0, 0] = image[labels == 1, 1] = 200
    return image, labels


class Scenes(Source):
    name, split, class_names = "scenes", "train", ("a", "b")

    def __init__(self, damaged=(), turned=()):
        self._damaged, self._turned = frozenset(damaged), frozenset(turned)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image, labels = scene(index)
        data = encoded(image, "PNG")
        labels = labels.T if index in self._turned else labels
        return {"image": data[:50] if index in self._damaged else data, "label": -1, "pixel_labels": labels}


VIEW = SegmentationAugment((24, 24), 2, scale=(60, 30), photometric=False, fill=(1, 2, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_depend_on_seed_and_position_only(workers):
    options = {"augment": VIEW, "batch_size": 4, "seed": 3}
    with train_batches(Scenes(), **options) as batches:
        want = [next(batches) for _ in range(4)]
    with train_batches(Scenes(), **options, start_step=2, workers=workers) as batches:
        for batch in want[2:]:
            got = next(batches)
            for name in ("image", "pixel_labels"):
                np.testing.assert_array_equal(got[name], batch[name])
    with train_batches(Scenes(), **options, process_index=1, process_count=2) as batches:
        np.testing.assert_array_equal(next(batches)["pixel_labels"], want[0]["pixel_labels"][2:])
    assert len({batch["pixel_labels"].tobytes() for batch in want}) == 4


def test_labels_follow_their_pixels():
    with train_batches(Scenes(), augment=VIEW, batch_size=32, seed=0) as batches:
        batch = next(batches)
    labels, image = batch["pixel_labels"], batch["image"].astype(int)
    assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 255}  # noqa: PT018
    assert (image[labels == 255] == (1, 2, 3)).all()
    # Far from the border between the classes, colours tell the class.
    assert (image[(labels == 0) & (image[..., 1] == 0), 0] >= 199).all()
    wrong = [(image[..., 0] > 150) & (labels == 1), (image[..., 1] > 150) & (labels == 0)]
    assert sum(each.sum() for each in wrong) <= 0.02 * labels.size
    assert {tuple(np.flatnonzero(row[0] == 0)[:1]) == (0,) for row in labels} == {True, False}  # some are mirrored


def test_a_dominating_class_is_avoided():
    """Of a picture of which a sixteenth is class 1, most crops would show class 0 alone."""
    labels = np.zeros((64, 64), np.uint8)
    labels[:16, :16] = 1
    image = np.zeros((64, 64, 3), np.uint8)

    def shares(limit):
        view = SegmentationAugment(
            (16, 16), 2, scale=None, scale_range=(1, 1), max_class_share=limit, photometric=False
        )
        example = {"image": b"", "label": -1, "pixel_labels": labels}
        made = [view.make(Picture.of(image), example, np.random.default_rng(n))["pixel_labels"] for n in range(200)]
        return [max(np.mean(each == 0), np.mean(each == 1)) for each in made]

    free, limited = shares(1.0), shares(0.75)
    # One draw is right with probability p, so one of ten with 1 - (1 - p)^10.
    p = np.mean(np.array(free) < 0.75)
    assert abs(np.mean(np.array(limited) < 0.75) - (1 - (1 - p) ** 10)) < 0.12
    assert 0.02 < p < 0.15


def test_damaged_pairs_are_replaced_and_named(caplog):
    view = SegmentationView((32, 32), 2, fill=(1, 2, 3))
    with eval_batches(Scenes(damaged={1}), view=view, batch_size=10) as batches:
        batch = next(batches)
    assert "record 1 of scenes/train" in caplog.text
    np.testing.assert_array_equal(batch["pixel_labels"][1], batch["pixel_labels"][2])
    assert (batch["pixel_labels"][:, 24:] == 255).all() and (batch["pixel_labels"][:, :24] < 2).all()  # noqa: PT018
    with (
        eval_batches(Scenes(turned={4}), view=view, batch_size=10) as batches,
        pytest.raises(
            LabelError, match=r"record 4 of scenes/train: its mask has 30 x 40 pixels, but the image 40 x 30"
        ),
    ):
        next(batches)


def test_more_than_254_classes_need_16_bits():
    assert SegmentationAugment((8, 8), 300).arrays["pixel_labels"] == ((8, 8), np.uint16)
    labels = np.full((8, 8), 299, np.uint16)
    made = SegmentationView((16, 8), 300).make(
        Picture.of(np.zeros((8, 8, 3), np.uint8)), {"image": b"", "label": -1, "pixel_labels": labels}, None
    )
    np.testing.assert_array_equal(np.unique(made["pixel_labels"]), [299, 65535])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale_range": (2, 1)}, "scale_range"), ({"max_class_share": 0}, "share"), ({"scale": (0, 5)}, "data.scale=")],
)
def test_views_refuse_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationAugment((8, 8), 2, **options)
