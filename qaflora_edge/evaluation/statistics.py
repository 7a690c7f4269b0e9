"""Means with 95 % intervals. The same numbers give the same interval each time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np

from qaflora_edge.arrays import F64

N_RESAMPLE, SEED = 9999, 0
DIGITS = 12
MAX_DRAWN = 2_000_000  # values that are drawn at once
EQUAL = 1e-9  # values that differ by less are one value: scores are rounded long before
Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval.

    n_item     number of items
    low, high  NaN where a task has one item: too few to tell
    """

    value: float
    low: float
    high: float
    n_item: int

    def times(self, factor: float) -> Self:
        """Convert to another unit; factor > 0."""
        return type(self)(factor * self.value, factor * self.low, factor * self.high, self.n_item)


def mean(tasks: Sequence[F64]) -> Estimate:
    """Average scores, over tasks if there are several; NaN of none.

    tasks  [n_item of the task] each

    Scores of one task that are all 0 or 1 have a Wilson interval (1927), others a bootstrap's.
    """
    if len(tasks) > 1 or not np.isin(tasks[0], (0.0, 1.0)).all():
        return mean_of_means(tasks)
    n_item = len(tasks[0])
    if n_item == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share, square = float(tasks[0].mean()), Z * Z / n_item
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), n_item)


def difference(tasks: Sequence[F64], *, is_right: bool) -> Estimate:
    """Average paired differences, over tasks if there are several.

    tasks     [n_item of the task] each, one or more: differences of two scores of one item
    is_right  whether scores are 1 or 0, for answers that are right or wrong

    One task of such answers has Bonett and Price's interval (2012): where few items differ, a
    bootstrap claims a difference too often. Others have the interval of `mean_of_means`.
    """
    if len(tasks) > 1 or not is_right or not np.isin(tasks[0], (-1.0, 0.0, 1.0)).all():
        return mean_of_means(tasks)
    n_item, n_more, n_less = len(tasks[0]), int((tasks[0] > 0).sum()), int((tasks[0] < 0).sum())
    more, less = ((n + 1) / (n_item + 2) for n in (n_more, n_less))
    half = Z * math.sqrt((more + less - (more - less) ** 2) / (n_item + 2))
    low, high = max(-1.0, more - less - half), min(1.0, more - less + half)
    return Estimate((n_more - n_less) / n_item, low, high, n_item)


def mean_of_means(tasks: Sequence[F64]) -> Estimate:
    """Average the means of tasks: every task counts the same.

    tasks  [n_item of the task] each, one or more

    The interval is Efron's bias-corrected and accelerated bootstrap (1987). Items are drawn within
    their tasks. Where all values of each task are equal it has no width.
    """
    value = float(np.mean([values.mean() for values in tasks]))
    n_item = sum(map(len, tasks))
    if min(map(len, tasks)) < 2:
        return Estimate(value, math.nan, math.nan, n_item)
    if all(np.ptp(values) < EQUAL for values in tasks):
        return Estimate(value, value, value, n_item)
    drawn = _resampled(tasks)
    middle = round(value, DIGITS)
    share = ((drawn < middle).mean() + (drawn <= middle).mean()) / 2
    bias = NormalDist().inv_cdf(float(np.clip(share, 1 / N_RESAMPLE, 1 - 1 / N_RESAMPLE)))
    # How far the mean moves without one item, each within its task.
    moves = np.concatenate([(each - each.mean()) / len(each) for each in tasks])
    acceleration = float((moves**3).sum() / (6 * (moves**2).sum() ** 1.5))
    shares = [NormalDist().cdf(bias + at / (1 - acceleration * at)) for at in (bias - Z, bias + Z)]
    low, high = np.quantile(drawn, shares).tolist()
    return Estimate(value, low, high, n_item)


def _resampled(tasks: Sequence[F64]) -> F64:
    """Draw items again within their tasks: means of means, float64 [N_RESAMPLE]."""
    rng = np.random.default_rng(SEED)
    n_batch = max(1, MAX_DRAWN // sum(map(len, tasks)))
    drawn = []
    for start in range(0, N_RESAMPLE, n_batch):
        n_row = min(n_batch, N_RESAMPLE - start)
        indexes = (rng.integers(0, len(each), (n_row, len(each))) for each in tasks)
        means = [each[at].mean(axis=1) for each, at in zip(tasks, indexes, strict=True)]
        drawn.append(np.mean(means, axis=0))
    # Rounded, so that equal means are equal in whatever order a machine adds.
    return np.round(np.concatenate(drawn), DIGITS)
