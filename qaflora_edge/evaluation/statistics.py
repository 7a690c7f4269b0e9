"""Means with 95 % intervals. The same numbers give the same interval each time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np

from qaflora_edge.arrays import F64

CONFIDENCE = 0.95
N_RESAMPLE, SEED = 9999, 0
DIGITS = 12
MAX_DRAWN = 2_000_000  # values that are drawn at once
EQUAL = 1e-9  # values that differ by less are one value: scores are rounded long before
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


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
    share = float(tasks[0].mean())
    middle = (share + Z * Z / (2 * n_item)) / (1 + Z * Z / n_item)
    spread = math.sqrt(share * (1 - share) / n_item + Z * Z / (4 * n_item**2))
    half = Z / (1 + Z * Z / n_item) * spread
    low = 0.0 if share == 0 else middle - half
    return Estimate(share, low, 1.0 if share == 1 else middle + half, n_item)


def difference(tasks: Sequence[F64], *, is_right: bool) -> Estimate:
    """Average paired differences, over tasks if there are several.

    tasks     [n_item of the task] each, one or more: differences of two scores of one item
    is_right  whether scores are 1 or 0, for answers that are right or wrong

    One task of such answers has Bonett and Price's interval (2012). There a bootstrap claims a
    difference too often where few items differ, and has no width where none does. Otherwise the
    interval is that of `mean_of_means`.
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
    bias = NormalDist().inv_cdf(min(max(share, 1 / N_RESAMPLE), 1 - 1 / N_RESAMPLE))
    acceleration = _acceleration(tasks)
    low, high = (
        float(np.quantile(drawn, NormalDist().cdf(bias + at / (1 - acceleration * at))))
        for at in (bias - Z, bias + Z)
    )
    return Estimate(value, low, high, n_item)


def _resampled(tasks: Sequence[F64]) -> F64:
    """Draw items again within their tasks: means of means, float64 [N_RESAMPLE]."""
    rng = np.random.default_rng(SEED)
    n_batch = max(1, MAX_DRAWN // sum(map(len, tasks)))
    found = []
    for start in range(0, N_RESAMPLE, n_batch):
        n_row = min(n_batch, N_RESAMPLE - start)
        means = [
            values[rng.integers(0, len(values), (n_row, len(values)))].mean(axis=1)
            for values in tasks
        ]
        # Rounded, so that equal means are equal in whatever order a machine adds.
        found.append(np.round(np.mean(means, axis=0), DIGITS))
    return np.concatenate(found)


def _acceleration(tasks: Sequence[F64]) -> float:
    """Measure how the spread changes with the mean, by leaving out one item at a time."""
    cubes = squares = 0.0
    for values in tasks:
        # (n - 1) times the change of the mean of means without an item
        moves = (values - values.mean()) / len(tasks)
        cubes += float((moves**3).sum()) / len(values) ** 3
        squares += float((moves**2).sum()) / len(values) ** 2
    return cubes / (6 * math.sqrt(squares) ** 3)
