"""Numbers that judge a distilled set: summaries over student runs, and DD-Ranking's robust scores.

Accuracies are fractions between 0 and 1. Source of the scores: Li et al., "DD-Ranking" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of `runs` values; `sd` is None for a single run, where it is not defined."""

    mean: float
    sd: float | None
    runs: int


def summary(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation (n - 1) and count of at least one value. Raises `ValueError` if there is none."""
    if not values:
        raise ValueError("a summary needs at least one value")
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), sd, len(values))


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the `window` - 1 before it; fewer at the start, so the length stays."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(mean) for mean in (sums[ends] - sums[starts]) / (ends - starts)]


def hard_label_recovery(distilled: float, full: float) -> float:
    """HLR: what a student on the distilled set with hard labels still lacks to one on all real data; smaller is better."""
    return full - distilled


def improvement_over_random(distilled: float, random: float) -> float:
    """IOR: what the distilled set gains over as many random real images, trained the same way."""
    return distilled - random


def label_robust_score(distilled: float, random: float, full: float, w: float = 0.5) -> float:
    """LRS times 100: alpha = w IOR - (1 - w) HLR, mapped to 0..100 by `_normalised`. Say with it whether labels were hard or soft."""
    return _normalised(w * improvement_over_random(distilled, random) - (1 - w) * hard_label_recovery(distilled, full))


def augmentation_robust_score(
    distilled_augmented: float, random_augmented: float, distilled_plain: float, random_plain: float, gamma: float = 0.5
) -> float:
    """ARS times 100: the gain over random real with augmentation (weight gamma) and without (1 - gamma), mapped to 0..100."""
    with_augmentation = improvement_over_random(distilled_augmented, random_augmented)
    without = improvement_over_random(distilled_plain, random_plain)
    return _normalised(gamma * with_augmentation + (1 - gamma) * without)


def _normalised(alpha: float) -> float:
    """100 (exp(alpha) - exp(-1)) / (e - exp(-1)): -1 to 0, 1 to 100."""
    return 100 * (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
