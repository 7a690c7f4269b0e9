"""Means with their 95 % intervals; the same numbers give the same interval each time."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.errors import OptionError

CONFIDENCE = 0.95
N_RESAMPLE, SEED = 9999, 0
DIGITS = 12
MAX_DRAWN = 2_000_000  # values that are drawn at once
EQUAL = 1e-9  # values that differ by less are one value: scores are rounded long before


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval.

    n_item     over how many items
    low, high  NaN where there are too few items to tell: one in a task
    """

    value: float
    low: float
    high: float
    n_item: int

    def times(self, factor: float) -> Self:
        """The same in another unit; factor > 0."""
        return type(self)(factor * self.value, factor * self.low, factor * self.high, self.n_item)


def check_can_estimate() -> None:
    """Fail before the work, not after it. Raises OptionError where scipy is missing."""
    if importlib.util.find_spec("scipy") is None:
        raise OptionError(
            "Intervals need scipy, which is not installed. Install it with "
            "`pip install 'qaflora-edge[eval]'`."
        )


def mean(scores: F64) -> Estimate:
    """The mean of scores: a Wilson interval where all are 0 or 1, else by bootstrap.

    scores  [n_item], one or more
    """
    if not np.isin(scores, (0.0, 1.0)).all():
        return mean_of_means([scores])
    from scipy import stats

    n_item = len(scores)
    test = stats.binomtest(int(scores.sum()), n_item)
    ends = test.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(scores.mean()), float(ends.low), float(ends.high), n_item)


def difference(tasks: Sequence[F64], *, is_right: bool) -> Estimate:
    """The mean of paired differences, over tasks if there are several.

    tasks     [n_item of the task] each, one or more: differences of two scores of one item
    is_right  whether the scores are 1 or 0, for answers that are right or wrong

    Where they are and one task is asked, the interval is Bonett and Price's
    (2012): a bootstrap of a few items that differ claims a difference too often, and where none
    differs it would have no width. Else it is that of `mean_of_means`.
    """
    if len(tasks) > 1 or not is_right:
        return mean_of_means(tasks)
    n_item, n_more, n_less = len(tasks[0]), int((tasks[0] > 0).sum()), int((tasks[0] < 0).sum())
    more, less = ((n + 1) / (n_item + 2) for n in (n_more, n_less))
    spread = math.sqrt((more + less - (more - less) ** 2) / (n_item + 2))
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    low, high = max(-1.0, more - less - half), min(1.0, more - less + half)
    return Estimate((n_more - n_less) / n_item, low, high, n_item)


def mean_of_means(tasks: Sequence[F64]) -> Estimate:
    """The mean over tasks of the mean over each one's items: every task counts the same.

    The interval is a bootstrap's (bias-corrected and accelerated): items are drawn again within
    their tasks. Where all values of each task are equal it has no width.

    tasks  [n_item of the task] each, one or more
    """
    value = float(np.mean([values.mean() for values in tasks]))
    n_item = sum(map(len, tasks))
    if min(map(len, tasks)) < 2:
        return Estimate(value, float("nan"), float("nan"), n_item)
    if all(np.ptp(values) < EQUAL for values in tasks):
        return Estimate(value, value, value, n_item)
    from scipy import stats

    def statistic(*drawn: F64, axis: int) -> Any:
        # Rounded, so that equal means are equal in whatever order a machine adds.
        return np.round(np.mean([values.mean(axis=axis) for values in drawn], axis=0), DIGITS)

    found = stats.bootstrap(
        tuple(tasks),
        statistic,
        n_resamples=N_RESAMPLE,
        confidence_level=CONFIDENCE,
        vectorized=True,
        method="BCa",
        batch=max(1, MAX_DRAWN // n_item),
        rng=np.random.default_rng(SEED),
    )
    ends = found.confidence_interval
    return Estimate(value, float(ends.low), float(ends.high), n_item)
