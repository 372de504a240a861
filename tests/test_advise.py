"""`tinymim advise`: the forecast against curves of known form, and each answer."""

import numpy as np
import pytest

from tinymim_jax.starter.advise import as_text, judge, judge_teacher
from tinymim_jax.starter.forecast import Forecast, forecast

STEPS = np.array([50, 100, 150, 200, 250, 300, 350, 400])


def test_a_power_law_is_continued():
    """With many images there is hardly any noise, and the fitted form is the true one."""
    curve = 0.7 - 0.2 * (STEPS / 400) ** -0.5
    found = forecast(STEPS, curve, at=4000, examples=10**8, ceiling=0.9)
    assert found.value == pytest.approx(0.7 - 0.2 * 10**-0.5, abs=1e-3)
    assert found.low == pytest.approx(found.value, abs=0.01)
    assert found.high == pytest.approx(found.value, abs=0.01)


@pytest.mark.parametrize("examples", [100, 10_000])
def test_the_interval_holds_the_truth_as_often_as_it_says(examples):
    """90 % of the intervals should hold it; fewer than 70 % of 20 would be wrong with a probability below 1 %."""
    rng = np.random.default_rng(examples)
    truth = 0.6 - 0.12 * (STEPS / 400) ** -0.7
    at, held, widths = 1600, 0, []
    expected = 0.6 - 0.12 * (at / 400) ** -0.7
    for trial in range(20):
        curve = rng.binomial(examples, truth) / examples
        found = forecast(STEPS, curve, at=at, examples=examples, ceiling=0.65, seed=trial)
        held += found.low <= expected <= found.high
        widths.append(found.high - found.low)
    assert held >= 14
    # Noise shrinks with the square root of the images.
    assert np.mean(widths) < (0.35 if examples == 100 else 0.08)


def test_a_flat_curve_stays_flat_and_no_student_passes_the_ceiling():
    assert forecast(STEPS, np.full(8, 0.3), at=10_000, examples=10**8, ceiling=0.9).value == pytest.approx(
        0.3, abs=1e-3
    )
    rising = 0.1 + 0.001 * STEPS
    assert forecast(STEPS, rising, at=10_000, examples=10**8, ceiling=0.6).value <= 0.6
    with pytest.raises(ValueError, match="at least three accuracies"):
        forecast([1, 2], [0.1, 0.2], at=3, examples=10, ceiling=1)


@pytest.mark.parametrize(
    ("low", "high", "answer", "words"),
    [
        (0.15, 0.22, "no", "the student does not learn it"),
        (0.4, 0.6, "yes", "are expected"),
        (0.22, 0.6, "unclear", "more --hours"),
    ],
)
def test_answers(low, high, answer, words):
    """On 1000 images two standard errors of 20 % are 2.5 %."""
    found = judge(teacher=0.7, before=0.2, expected=Forecast((low + high) / 2, low, high), examples=1000)
    assert found.answer == answer
    assert words in found.why


@pytest.mark.parametrize(
    ("random", "before", "words"),
    [
        (0.1, 0.29, "than an untrained student (29.0%; differences below 2.9% are noise)"),
        (0.29, 0.1, "than the same network with random weights (29.0%; differences below 2.9% are noise)"),
        (0.1, 0.27, None),
        (0.27, 0.1, None),
    ],
)
def test_a_teacher_that_knows_nothing_of_the_images(random, before, words):
    """On 1000 images two standard errors of 29 % are 2.9 %, of 27 % 2.8 %."""
    found = judge_teacher(teacher=0.31, teacher_random=random, before=before, examples=1000)
    if words is None:
        assert found is None
    else:
        assert found.answer == "no"
        assert words in found.why


def test_the_text_shows_every_figure():
    found = {
        "teacher": 0.7, "teacher_random": 0.3, "before": 0.2, "examples": 50, "steps": 400,
        "curve": [[10, 0.25], [20, 0.3]],
        "seconds": 7300.0, "timed": "measured",
        "expected": {"value": 0.5, "low": 0.4, "high": 0.6}, "answer": "no", "why": "because",
        "plans": [
            {"topology": "h100x1", "hours": 0.5, "chip_hours": 0.5},
            {"topology": "v5e-8", "error": "no compiler"},
        ],
    }  # fmt: skip
    text = as_text(found)
    for part in ("70.0%", "30.0%", "20.0%", "after 20 steps", "50.0% (40.0% to 60.0%, 90 %)", "30m00s", "no compiler"):
        assert part in text
    assert "these devices, measured | 2h01m" in text
    assert "Will it help? NO: because" in text
