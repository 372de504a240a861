"""Scores of predictions, against closed forms and loops over the images."""

import numpy as np
import pytest

from tinymim_jax.evaluation.suites.scores import Answers, confusions, expected_calibration_error, reliability, score


def answers(seed: int, count: int = 400, classes: int = 7) -> Answers:
    """Random predictions whose top-1 accuracy is about one half."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    best = np.stack([rng.permutation(classes)[:5] for _ in range(count)])
    for row in np.flatnonzero(rng.random(count) < 0.5):
        rest = [each for each in best[row] if each != label[row]]
        best[row] = [label[row], *rest][:5]
    return Answers(label, best, rng.uniform(0.1, 1.0, count).astype(np.float32))


NAMES = [f"class {letter}" for letter in "abcdefg"]


def test_calibration_error_of_known_cases():
    # Four images of confidence 0.9 of which three are right, six of 0.5 of which none is: 0.4 * 0.15 + 0.6 * 0.5.
    confidence = np.array([0.9] * 4 + [0.5] * 6)
    right = np.array([1, 1, 1, 0] + [0] * 6, bool)
    assert expected_calibration_error(reliability(confidence, right)) == pytest.approx(0.36)
    assert expected_calibration_error(reliability(np.ones(5), np.ones(5, bool))) == 0
    assert expected_calibration_error(reliability(np.ones(5), np.zeros(5, bool))) == 1
    # In one bin over- and underconfidence cancel, in two they do not.
    confidence, right = np.array([0.61, 0.65, 0.68]), np.array([1, 0, 1], bool)
    assert expected_calibration_error(reliability(confidence, right, bins=1)) == pytest.approx(2 / 3 - 1.94 / 3)
    assert expected_calibration_error(reliability(confidence, right)) == pytest.approx((abs(1 - 1.26) + 0.32) / 3)


def test_bins_are_half_open_from_above():
    bins = reliability(np.array([0.0, 0.25, 0.5, 0.50001, 1.0]), np.array([1, 0, 1, 0, 1], bool), bins=4)
    assert [each["examples"] for each in bins] == [2, 1, 1, 1]
    assert [each["above"] for each in bins] == [0, 0.25, 0.5, 0.75]
    assert bins[0]["top1"] == 0.5
    assert bins[0]["confidence"] == 0.125
    empty = reliability(np.array([0.9]), np.array([True]))[0]
    assert empty == {"above": 0, "examples": 0, "confidence": None, "top1": None}


def test_calibration_error_is_the_mean_gap_of_the_bins():
    given = answers(1)
    right = given.best[:, 0] == given.label
    want = 0.0
    for i in range(15):
        inside = (given.confidence > i / 15) & (given.confidence <= (i + 1) / 15)
        if inside.any():
            want += inside.mean() * abs(right[inside].mean() - given.confidence[inside].astype(float).mean())
    assert score(given, NAMES)["ece"] == pytest.approx(want)


def test_accuracies_and_confusions_are_those_of_a_loop():
    given = answers(2)
    found = score(given, NAMES)
    top1 = [row[0] == label for label, row in zip(given.label, given.best)]
    assert found["examples"] == 400
    assert found["classes"] == 7
    assert found["not_finite"] == 0
    assert found["top1"] == pytest.approx(np.mean(top1))
    assert found["top5"] == pytest.approx(np.mean([label in row for label, row in zip(given.label, given.best)]))
    per_class = [np.mean([hit for hit, label in zip(top1, given.label) if label == c]) for c in range(7)]
    assert [each["top1"] for each in found["per_class"]] == pytest.approx(per_class)
    assert [each["name"] for each in found["per_class"]] == NAMES
    assert sum(each["examples"] for each in found["per_class"]) == 400
    assert found["mean_class_top1"] == pytest.approx(np.mean(per_class))
    matrix = np.zeros((7, 7), int)
    for label, row in zip(given.label, given.best):
        matrix[label, row[0]] += 1
    np.fill_diagonal(matrix, 0)
    counts = [pair["count"] for pair in found["confusions"]]
    assert counts == sorted(matrix[matrix > 0], reverse=True)[:20]
    for pair in found["confusions"]:
        true, predicted = NAMES.index(pair["true"]), NAMES.index(pair["predicted"])
        assert matrix[true, predicted] == pair["count"]
        assert pair["share"] == pytest.approx(pair["count"] / (given.label == true).sum())


def test_right_answers_are_no_confusions():
    label = np.array([0, 0, 1])
    assert confusions(label, label, np.ones(3, bool), NAMES) == []
    (pair,) = confusions(label, np.array([1, 1, 1]), np.array([False, False, True]), NAMES)
    assert pair == {"true": "class a", "predicted": "class b", "count": 2, "share": 1.0}


def test_classes_without_images_count_for_nothing():
    given = Answers(np.array([5, 5, 900]), np.array([[5], [1], [900]]), np.array([0.5, 0.5, 0.5]))
    found = score(given, NAMES)
    assert found["classes"] == 2
    assert found["mean_class_top1"] == 0.75
    assert found["top1"] == pytest.approx(2 / 3)
    assert [each["name"] for each in found["per_class"]] == ["class f", "900"]


def test_several_labels_may_be_right_and_images_without_any_are_left_out():
    given = Answers(
        label=np.array([0, 1, 2, 3]),
        best=np.array([[4, 0, 1, 2, 3], [6, 5, 4, 3, 2], [2, 0, 1, 3, 4], [3, 0, 1, 2, 4]]),
        confidence=np.full(4, 0.5),
    )
    found = score(given, NAMES, several=[(4, 0), (2,), (), (0, 1)])
    assert found["examples"] == 3
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == 1
    assert [each["class"] for each in found["per_class"]] == [0, 1, 3]


def test_what_is_not_finite_is_wrong():
    given = Answers(np.array([0, 1]), np.array([[0, 1], [-1, -1]]), np.array([1.0, 0.0]))
    found = score(given, NAMES)
    assert found["not_finite"] == 1
    assert found["top1"] == found["top5"] == 0.5
    assert found["confusions"] == []
