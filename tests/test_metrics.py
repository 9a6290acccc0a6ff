import math

import pytest

from diffstill.metrics import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    moving_average,
    summary,
)


def test_summary_is_mean_and_sample_deviation():
    found = summary([0.2, 0.4, 0.9])
    assert found.mean == pytest.approx(0.5)
    assert found.sd == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert found.runs == 3


def test_summary_of_one_value_has_no_deviation():
    assert summary([0.3]).sd is None


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        summary([])


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_moving_average_equals_the_slow_reference(window):
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    slow = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        slow.append(sum(part) / len(part))
    assert moving_average(values, window) == pytest.approx(slow)


def test_recovery_and_improvement_are_plain_differences():
    assert hard_label_recovery(distilled=0.6, full=0.9) == pytest.approx(0.3)
    assert improvement_over_random(distilled=0.6, random=0.5) == pytest.approx(0.1)


def test_label_robust_score_of_no_gain_and_no_loss():
    even = 100 * (1 - math.exp(-1)) / (math.e - math.exp(-1))
    assert label_robust_score(0.5, 0.5, 0.5) == pytest.approx(even)
    assert label_robust_score(0.6, 0.5, 0.7) == pytest.approx(even), "a gain over random cancels an equal lack to full data"


def test_label_robust_score_closed_form():
    alpha = 0.25 * (0.6 - 0.5) - 0.75 * (0.9 - 0.6)
    assert label_robust_score(0.6, 0.5, 0.9, w=0.25) == pytest.approx(100 * (math.exp(alpha) - 1 / math.e) / (math.e - 1 / math.e))


def test_scores_span_zero_to_hundred():
    assert label_robust_score(1.0, 0.0, 1.0, w=1.0) == pytest.approx(100)
    assert label_robust_score(0.0, 0.0, 1.0, w=0.0) == pytest.approx(0)
    assert augmentation_robust_score(1, 0, 1, 0) == pytest.approx(100)
    assert augmentation_robust_score(0, 1, 0, 1) == pytest.approx(0)


def test_label_robust_score_rises_with_distilled_accuracy():
    scores = [label_robust_score(accuracy / 10, 0.4, 0.9) for accuracy in range(11)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


def test_augmentation_robust_score_weighs_by_gamma():
    alpha = 0.2 * 0.3 + 0.8 * -0.1
    found = augmentation_robust_score(0.7, 0.4, 0.5, 0.6, gamma=0.2)
    assert found == pytest.approx(100 * (math.exp(alpha) - 1 / math.e) / (math.e - 1 / math.e))
