"""Accuracy, calibration and confusions of a classifier from its prediction for each image; numpy only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 15
CONFUSIONS = 20


class Answers(NamedTuple):
    """Predictions for `n` images.

    label: int `[n]`, the correct class.
    best: int `[n, k]`, the k most probable classes, best first; -1 if the logits are not finite, which is wrong.
    confidence: float `[n]`, the probability of the first of them.
    """

    label: Any  # numpy arrays; jax arrays inside a jitted step
    best: Any
    confidence: Any


def score(
    answers: Answers, class_names: Sequence[str], *, several: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """All figures as plain JSON; accuracies are fractions of 1.

    top1, top5: over all images. mean_class_top1: unweighted mean over the classes. ece: `expected_calibration_error`.
    calibration: `reliability`. per_class: for each class that has images. confusions: see `confusions`.

    Args:
      class_names: by class; further classes are called by their numbers.
      several: for each image the classes that count as correct (ImageNet ReaL); images without any are left out.
    """
    if several is not None:
        kept = np.array([len(classes) > 0 for classes in several], bool)
        answers = Answers(*(array[kept] for array in answers))
        right = [np.isin(best, classes) for best, classes in zip(answers.best, (c for c in several if len(c)))]
        hits = np.array(right, bool).reshape(answers.best.shape)
    else:
        hits = answers.best == answers.label[:, None]
    first = hits[:, 0]
    bins = reliability(answers.confidence, first)
    classes, members, counts = np.unique(answers.label, return_inverse=True, return_counts=True)
    per_class = np.bincount(members, first, len(classes)) / counts
    return {
        "examples": len(first),
        "classes": len(classes),
        "top1": float(first.mean()),
        "top5": float(hits[:, :5].any(axis=1).mean()),
        "mean_class_top1": float(per_class.mean()),
        "ece": expected_calibration_error(bins),
        "not_finite": int((answers.best[:, 0] < 0).sum()),
        "calibration": bins,
        "per_class": [
            {"class": int(c), "name": _name(class_names, c), "examples": int(n), "top1": float(accuracy)}
            for c, n, accuracy in zip(classes, counts, per_class)
        ],
        "confusions": confusions(answers.label, answers.best[:, 0], first, class_names),
    }


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Images grouped by confidence into `bins` intervals of equal width that exclude their lower end, given as "above".

    Of each: the number of images, their mean confidence and their top-1, both None if there are no images.
    """
    places = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    sure, hit = (np.bincount(places, np.asarray(x, np.float64), bins) for x in (confidence, right))
    return [
        {
            "above": place / bins,
            "examples": int(count),
            "confidence": float(sure[place] / count) if count else None,
            "top1": float(hit[place] / count) if count else None,
        }
        for place, count in enumerate(counts)
    ]


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean over the images of |accuracy - mean confidence| of their bin (Guo et al., arXiv 1706.04599, eq. 3)."""
    total = sum(each["examples"] for each in bins)
    return sum(each["examples"] * abs(each["top1"] - each["confidence"]) for each in bins if each["examples"]) / total


def confusions(
    label: np.ndarray, first: np.ndarray, right: np.ndarray, class_names: Sequence[str], most: int = CONFUSIONS
) -> list[dict[str, Any]]:
    """The `most` frequent pairs of a true class and a wrong prediction, with their share of the true class's images."""
    wrong = ~right & (first >= 0)
    pairs, counts = np.unique(np.stack([label[wrong], first[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        {
            "true": _name(class_names, pairs[0, i]),
            "predicted": _name(class_names, pairs[1, i]),
            "count": int(counts[i]),
            "share": float(counts[i] / (label == pairs[0, i]).sum()),
        }
        for i in order
    ]


def _name(class_names: Sequence[str], index: int) -> str:
    return class_names[index] if index < len(class_names) else str(index)
