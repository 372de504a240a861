"""Semantic segmentation: the value of ignored pixels, confusion matrices, and the scores that follow from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from tinymim_jax.ops.platform import on_cpu
from tinymim_jax.ops.products import full_precision
from tinymim_jax.ops.token_grid import bilinear_matrix


def ignore_value(dtype: Any) -> int:
    """The class number of pixels that count neither in the loss nor in scores: the largest of the labels' dtype."""
    return int(np.iinfo(dtype).max)


def labels_dtype(classes: int) -> Any:
    """The dtype of labels for this many classes: uint8, or uint16 above 254. Its largest value marks ignored pixels."""
    if not 1 <= classes <= np.iinfo(np.uint16).max - 1:
        raise ValueError(f"{classes} classes: a mask can hold 1 to {np.iinfo(np.uint16).max - 1:,}")
    return np.uint8 if classes <= np.iinfo(np.uint8).max - 1 else np.uint16


def resize_bilinear(
    maps: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Maps resized to (height, width) as by torch's bilinear interpolation: align_corners False, no antialiasing.

    Computed and returned in the dtype of `maps`.
    """
    height, width = maps.shape[1:3]
    if (height, width) == size:
        return maps
    dtype, precision = maps.dtype, full_precision(maps.dtype)
    by_rows, by_columns = bilinear_matrix(height, size[0]), bilinear_matrix(width, size[1])
    maps = jnp.einsum("rh,bhwc->brwc", jnp.asarray(by_rows, dtype), maps, precision=precision)
    return jnp.einsum("sw,brwc->brsc", jnp.asarray(by_columns, dtype), maps, precision=precision)


def confusion_matrix(
    truth: Integer[Array, " pixels"], predicted: Integer[Array, " pixels"], classes: int
) -> Int[Array, "classes classes"]:
    """int32: the number of pixels of class `row` that were predicted as class `column`.

    Pixels whose true or predicted class is not 0 to classes - 1 are left out. Sums of up to 2**31 - 1 pixels are exact.
    """
    truth, predicted = truth.astype(jnp.int32), predicted.astype(jnp.int32)
    counted = (truth >= 0) & (truth < classes) & (predicted >= 0) & (predicted < classes)
    if on_cpu():
        place = jnp.where(counted, truth * classes + predicted, classes * classes)
        counts = jnp.zeros(classes * classes + 1, jnp.int32).at[place].add(1)
        return counts[:-1].reshape(classes, classes)
    # Accelerators add to scattered places one by one; a product of one-hot codes is exact in int8 with int32 sums.
    rows = jax.nn.one_hot(jnp.where(counted, truth, -1), classes, dtype=jnp.int8)
    columns = jax.nn.one_hot(predicted, classes, dtype=jnp.int8)
    return jnp.einsum("pt,pc->tc", rows, columns, preferred_element_type=jnp.int32)


def scores(confusion: np.ndarray) -> dict[str, Any]:
    """The figures of mmsegmentation from a confusion matrix [true class, predicted class] of whole numbers.

    "iou" and "acc": float64 [classes], NaN for a class without pixels (for iou: neither true nor predicted).
    "mIoU", "mAcc": their means without the NaN. "aAcc": the share of pixels that are right.
    """
    confusion = np.asarray(confusion, np.int64)
    hits, truth, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = truth + predicted - hits
    iou = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    accuracy = np.divide(hits, truth, out=np.full(len(hits), np.nan), where=truth > 0)
    total = int(truth.sum())
    return {
        "mIoU": _mean(iou),
        "mAcc": _mean(accuracy),
        "aAcc": float(hits.sum() / total) if total else float("nan"),
        "iou": iou,
        "acc": accuracy,
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
