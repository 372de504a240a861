"""Whole images through windows against a plain reading of mmsegmentation's inference, and the counting of pixels."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import encoded
from segmentation_files import segmentation_golden
from segmentation_networks import golden_network, golden_params

from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.whole import Scenes
from tinymim_jax.evaluation import windows
from tinymim_jax.evaluation.segmentation import PixelLabeller, Work, figures, score_split
from tinymim_jax.evaluation.windows import Shown
from tinymim_jax.models.segmentation import variables
from tinymim_jax.ops.segmentation import resize_bilinear
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks.segmenter import Segmenter, Windows

SIZE, CLASSES, STRIDE = (32, 48), 5, (20, 31)
KERNEL = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)


def network(params, frozen, pixels):
    """Logits at stride 4 that depend on the position in the window, so that overlapping windows differ."""
    x = pixels.astype(jnp.float32) / 255
    x = x.reshape(len(x), SIZE[0] // 4, 4, SIZE[1] // 4, 4, 3).mean((2, 4))
    ramp = jnp.linspace(-1, 1, SIZE[1] // 4)[:, None] * jnp.linspace(0, 1, SIZE[0] // 4)[:, None, None]
    return jnp.tanh(3 * (x @ params) + ramp * jnp.arange(CLASSES))


def segmenter(**how) -> Segmenter:
    return Segmenter(network, SIZE, CLASSES, (124, 116, 104), Windows(**{"stride": STRIDE, "resize": (96, 40)} | how))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3)).astype(np.float32)[None]
    return np.asarray(resize_bilinear(jnp.asarray(coarse), (height, width)))[0].astype(np.uint8)


def mmseg_logits(resized: np.ndarray, original: tuple[int, int], stride=STRIDE) -> np.ndarray:
    """slide_inference of mmsegmentation 0.11, for images of at least the size of a window: [*original, classes]."""
    height, width, _ = resized.shape
    rows = max(height - SIZE[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - SIZE[1] + stride[1] - 1, 0) // stride[1] + 1
    total, count = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + SIZE[0], height), min(column * stride[1] + SIZE[1], width)
            top, left = max(bottom - SIZE[0], 0), max(right - SIZE[1], 0)
            logits = network(KERNEL, {}, jnp.asarray(resized[None, top:bottom, left:right]))
            total[top:bottom, left:right] += np.asarray(resize_bilinear(logits, SIZE))[0]
            count[top:bottom, left:right] += 1
    return np.asarray(resize_bilinear(jnp.asarray(total / count, jnp.float32)[None], original))[0]


def softmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(x, axis=-1))


def labelled(how: Segmenter, images: list[np.ndarray], devices: int = 1, tile: int = 64) -> list[np.ndarray]:
    labeller = PixelLabeller(how, make_mesh(devices=jax.devices()[:devices]), tile=tile)
    works = [labeller.work(image) for image in images] + [None] * (devices - len(images))
    return labeller.label(KERNEL, {}, works, fetch=True)[1]


def agree(got: np.ndarray, scores: np.ndarray) -> None:
    """Labels are those of the scores, where the best is not within rounding of the second."""
    best, second = np.sort(scores, axis=-1)[..., -1], np.sort(scores, axis=-1)[..., -2]
    clear = best - second > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(got[clear], scores.argmax(-1)[clear])


@pytest.mark.parametrize(("height", "width"), [(90, 130), (61, 81), (200, 70), (40, 48)])
@pytest.mark.parametrize("tile", [64, 512])
def test_sliding_windows_are_those_of_mmsegmentation(height, width, tile):
    image = photo(height, width)
    how = segmenter(resize=(150, 64))
    (shown,) = windows.shown_images(image, how.windows, SIZE)
    assert min(shown.pixels.shape[:2]) >= SIZE[0]
    (got,) = labelled(how, [image], tile=tile)
    agree(got, mmseg_logits(shown.pixels, (height, width)))


def test_flips_and_scales_average_the_probabilities():
    image = photo(90, 130)
    how = segmenter(resize=(150, 64), flip=True, scales=(1.0, 1.25))
    total = 0
    for shown in windows.shown_images(image, how.windows, SIZE):
        logits = mmseg_logits(np.ascontiguousarray(shown.pixels), (90, 130))
        total = total + softmax(logits[:, ::-1] if shown.mirrored else logits)
    (got,) = labelled(how, [image])
    agree(got, total)
    assert (got != labelled(segmenter(resize=(150, 64)), [image])[0]).any()


def test_one_window_for_the_whole_image():
    image = photo(60, 100)
    (got,) = labelled(segmenter(mode="whole"), [image])
    assert got.shape == (60, 100)
    (shown,) = windows.shown_images(image, Windows(mode="whole"), SIZE)
    assert shown.pixels.shape == (29, 48, 3)  # 100 pixels to 48
    padded = np.full((1, *SIZE, 3), (124, 116, 104), np.uint8)
    padded[0, :29, :48] = shown.pixels
    logits = resize_bilinear(network(KERNEL, {}, jnp.asarray(padded)), SIZE)[:, :29, :48]
    agree(got, np.asarray(resize_bilinear(logits, (60, 100)))[0])


@pytest.mark.parametrize(("height", "width"), [(20, 30), (10, 200), (1, 1), (32, 48)])
def test_images_smaller_than_a_window_are_padded(height, width):
    image = photo(height, width)
    (got,) = labelled(segmenter(resize=None), [image])
    assert got.shape == (height, width)
    assert (got < CLASSES).all()


def test_windows_cover_every_pixel_with_a_total_weight_of_one():
    for side, window, stride in [(7, 4, 3), (4, 4, 1), (3, 4, 2), (100, 16, 11), (17, 4, 4)]:
        begins = windows.starts(side, window, stride)
        assert begins[-1] + window == max(side, window)
        weights = windows._matrices(begins, side, 13, window, 2).sum((0, 2))
        np.testing.assert_allclose(weights, 1, atol=1e-6)


class Pairs(Source):
    """Images of several sizes; the masks are what `truth` says of the image."""

    name, split, class_names = "pairs", "test", tuple("abcde")

    def __init__(self, sizes, truth, damaged=(), turned=()):
        self.sizes, self._truth, self._damaged, self._turned = sizes, truth, set(damaged), set(turned)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        image = photo(*self.sizes[index], index)
        data, labels = encoded(image, "PNG"), self._truth(image, index)
        data = data[:60] if index in self._damaged else data
        return {"image": data, "label": -1, "pixel_labels": labels.T if index in self._turned else labels}


SIZES = [
    (90, 130),
    (61, 81),
    (70, 70),
    (45, 100),
    (200, 64),
    (48, 48),
    (64, 64),
    (90, 130),
    (61, 99),
    (33, 47),
    (50, 60),
]


def noisy(image: np.ndarray, index: int) -> np.ndarray:
    """Classes of an image at random, and pixels to ignore."""
    rng = np.random.default_rng(index)
    return rng.choice([0, 1, 2, 3, 255], image.shape[:2]).astype(np.uint8)


@pytest.mark.parametrize("devices", [1, 8])
def test_every_pixel_counts_once_whatever_the_devices(devices):
    source = Pairs(SIZES, noisy)
    mesh = make_mesh(devices=jax.devices()[:devices])
    rounds = []
    got = score_split(
        PixelLabeller(segmenter(), mesh, tile=64), KERNEL, {}, source, mesh, on_image=lambda: rounds.append(1)
    )
    assert len(rounds) == -(-len(SIZES) // devices)
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for index in range(len(SIZES)):
        image = photo(*SIZES[index], index)
        (labels,), truth = labelled(segmenter(), [image]), noisy(image, index)
        np.add.at(confusion, (truth[truth != 255], labels[truth != 255]), 1)
    assert got["pixels"] == confusion.sum() == sum((noisy(photo(*s), i) != 255).sum() for i, s in enumerate(SIZES))
    want = figures(confusion, source.class_names)
    assert (got["examples"], got["substituted"]) == (11, 0)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-3), name  # a pixel within rounding may differ
    assert ("iou/e" in got) == bool(confusion[:, 4].any())  # class e is in no mask


def test_images_of_other_sizes_compile_nothing():
    mesh = make_mesh(devices=jax.devices()[:1])
    labeller, compiled = PixelLabeller(segmenter(), mesh, tile=64), []
    for index, size in enumerate(SIZES):
        photo(*size, index)  # programs of the test's own

    def note(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        score_split(labeller, KERNEL, {}, Pairs(SIZES[:2], noisy), mesh)
        first = len(compiled)
        score_split(labeller, KERNEL, {}, Pairs(SIZES[2:], noisy), mesh)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert 1 <= first <= 12
    assert len(compiled) == first


def test_a_network_that_is_right_everywhere_scores_one():
    def truth(image, index):
        return labelled(segmenter(), [image])[0]

    mesh = make_mesh(devices=jax.devices()[:1])
    source = Pairs(SIZES[:3], truth)
    got = score_split(PixelLabeller(segmenter(), mesh, tile=64), KERNEL, {}, source, mesh)
    assert (got["mIoU"], got["mAcc"], got["aAcc"]) == (1, 1, 1)


def test_damaged_and_wrong_pairs(caplog):
    mesh = make_mesh(devices=jax.devices()[:2])
    labeller = PixelLabeller(segmenter(), mesh, tile=64)
    with (
        pytest.raises(RuntimeError, match=r"1 of 11 images cannot be decoded, more than 0.1 %"),
        caplog.at_level(logging.WARNING),
    ):
        score_split(labeller, KERNEL, {}, Pairs(SIZES, noisy, damaged={3}), mesh)
    assert "cannot decode record 3 of pairs/test" in caplog.text
    with pytest.raises(
        LabelError, match=r"record 4 of pairs/test: its mask has 200 x 64 pixels, but the image 64 x 200"
    ):
        score_split(labeller, KERNEL, {}, Pairs(SIZES, noisy, turned={4}), mesh)
    with pytest.raises(ValueError, match="1 images for the 2 devices"):
        labeller.label(KERNEL, {}, [None])


def test_scenes_come_in_order_each_once():
    source = Pairs(SIZES, noisy, damaged={2})
    with Scenes(source, range(11), threads=3) as scenes:
        got = [scene.pixels.shape[:2] for scene in scenes]
    assert got == [*SIZES[:2], SIZES[3], *SIZES[3:]]
    assert scenes.substitutions == 1


GOLDEN, META = segmentation_golden("seg_slide.npz"), segmentation_golden("seg_meta.json")


@pytest.mark.parametrize("number", range(len(META["slide"]["images_hw_original_hw"])))
def test_golden_inference_of_the_authors_network(number):
    """Labels of their own classes, where the best logit is clear; with and without the mirrored image."""
    official, params = golden_network(), golden_params()
    side = META["slide"]["crop"]
    image = GOLDEN[f"{number}/image"].astype(np.float32)
    original = GOLDEN[f"{number}/labels"].shape
    clear = GOLDEN[f"{number}/margin"] > 1e-3
    assert clear.mean() > 0.9

    def logits(params, frozen, pixels):
        return official.apply(variables(params), pixels)

    how = Segmenter(logits, (side, side), official.classes, (0, 0, 0), Windows(stride=(META["slide"]["stride"],) * 2))
    labeller = PixelLabeller(how, make_mesh(devices=jax.devices()[:1]), tile=128)
    shown = [Shown(image, False), Shown(image[:, ::-1], True)]
    for images, name in ((shown[:1], "labels"), (shown, "labels_with_flip")):
        (got,) = labeller.label(params, {}, [Work(images, original, None)], fetch=True)[1]
        wrong = (got != GOLDEN[f"{number}/{name}"]) & clear
        # The margin is that of the image itself, so with the mirrored one a few near ties are left.
        assert wrong.sum() <= (0 if name == "labels" else 0.002 * wrong.size)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mode": "slides"}, "did you mean 'slide'"),
        ({"stride": (0, 1)}, "at least one pixel"),
        ({"resize": (5, 0)}, "resize="),
        ({"scales": ()}, "positive numbers"),
        ({"mode": "whole", "scales": (1.0, 2.0)}, "one scale"),
    ],
)
def test_windows_that_cannot_be(how, message):
    with pytest.raises(ValueError, match=message):
        Windows(**how)
