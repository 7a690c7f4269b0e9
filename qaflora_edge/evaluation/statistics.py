"""Means with 95 % intervals."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from qaflora_edge.arrays import F64

Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % interval, over n_item items.

    low, high  NaN where a task has one item: too few to tell
    """

    value: float
    low: float
    high: float
    n_item: int


def mean(tasks: Sequence[F64]) -> Estimate:
    """Average scores, over tasks if there are several; NaN of none.

    tasks  [n_item of the task] each

    Scores of one task that are all 0 or 1 have a Wilson interval (1927), others a normal one.
    """
    n_item = len(tasks[0])
    if len(tasks) > 1 or not np.isin(tasks[0], (0.0, 1.0)).all():
        return mean_of_means(tasks)
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
    normal one claims a difference too often. Others have the interval of `mean_of_means`.
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

    The interval is normal: 1.96 standard errors, from the variance within each task.
    """
    value, n_item = float(np.mean([each.mean() for each in tasks])), sum(map(len, tasks))
    if min(map(len, tasks)) < 2:
        return Estimate(value, math.nan, math.nan, n_item)
    variance = sum(each.var(ddof=1) / len(each) for each in tasks) / len(tasks) ** 2
    half = Z * math.sqrt(variance)
    return Estimate(value, value - half, value + half, n_item)
