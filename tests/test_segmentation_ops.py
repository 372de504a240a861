"""Confusion matrices and scores against the authors' library (golden files) and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmentation_files import segmentation_golden

from tinymim_jax.ops import segmentation
from tinymim_jax.ops.platform import compiling_for
from tinymim_jax.ops.segmentation import confusion_matrix, ignore_value, labels_dtype, resize_bilinear, scores

GOLDEN = segmentation_golden("seg_metrics.npz")


def numbers() -> list[int]:
    return sorted(int(name.split("_")[1]) for name in GOLDEN if name.startswith("stored_"))


def truth(number: int) -> np.ndarray:
    """Stored 0 is "other" and ignored, stored k is class k - 1."""
    stored = GOLDEN[f"stored_{number}"].astype(int)
    return np.where((stored == 0) | (stored == 255), 255, stored - 1).astype(np.uint8)


def counted(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    return np.asarray(confusion_matrix(jnp.asarray(true.ravel()), jnp.asarray(predicted.ravel()), classes))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # the forms for both; both run on this CPU
def test_scores_are_those_of_the_authors_library(platform):
    classes = len(GOLDEN["iou"])
    with compiling_for(platform):
        each = [counted(truth(n), GOLDEN[f"prediction_{n}"], classes) for n in numbers()]
    for number, confusion in zip(numbers(), map(np.asarray, each)):
        hits = np.diag(confusion)
        predicted, true = confusion.sum(0), confusion.sum(1)
        areas = [hits, predicted + true - hits, predicted, true]
        np.testing.assert_array_equal(areas, GOLDEN[f"areas_{number}"])
    got = scores(np.sum([np.asarray(one, np.int64) for one in each], axis=0))
    for name in ("iou", "acc", "mIoU", "mAcc", "aAcc"):
        np.testing.assert_allclose(got[name], GOLDEN[name], rtol=0, atol=1e-12)


def test_ignored_pixels_and_unknown_classes_are_not_counted():
    true, predicted = np.array([0, 1, 255, 2, 1, 7]), np.array([0, 1, 0, 0, 255, 1])
    want = np.zeros((3, 3), int)
    want[0, 0] = want[1, 1] = want[2, 0] = 1
    for platform in ("cpu", "tpu"):
        with compiling_for(platform):
            np.testing.assert_array_equal(counted(true, predicted, 3), want)


def test_nothing_to_score_is_not_a_number():
    got = scores(np.zeros((2, 2)))
    assert all(np.isnan(got[name]) for name in ("mIoU", "mAcc", "aAcc"))


def test_dtypes_of_labels():
    assert [ignore_value(labels_dtype(n)) for n in (1, 254, 255, 65534)] == [255, 255, 65535, 65535]
    for classes in (0, 65535):
        with pytest.raises(ValueError, match="a mask can hold 1 to 65,534"):
            labels_dtype(classes)


def test_resizing_is_linear_between_pixel_centres():
    # Of a linear ramp, inner values stay on the ramp, and the border repeats.
    ramp = np.arange(5, dtype=np.float32)[None, None, :, None] * np.ones((1, 3, 1, 1), np.float32)
    got = np.asarray(jax.jit(lambda x: resize_bilinear(x, (6, 15)))(jnp.asarray(ramp)))[0, 2, :, 0]
    np.testing.assert_allclose(got, np.clip((np.arange(15) + 0.5) / 3 - 0.5, 0, 4), atol=1e-6)
    # Reducing picks between neighbours; an antialiased filter would average more of them.
    spike = np.zeros((1, 8, 1, 1), np.float32)
    spike[0, 0] = 1
    np.testing.assert_array_equal(segmentation.resize_bilinear(jnp.asarray(spike), (2, 1)).ravel(), [0, 0])
