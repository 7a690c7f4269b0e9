"""Intervals against closed formulas and coverage."""

import math
import statistics
from math import fsum, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from qaflora_edge.evaluation.table import difference, mean, mean_of_means

Z = NormalDist().inv_cdf(0.975)


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """E. B. Wilson (1927), solved for the two ends."""
    share = n_right / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("n_right", "n"), [(0, 1), (1, 1), (3, 10), (0, 24), (60, 250)])
def test_share_of_right_answers_has_a_wilson_interval(n_right: int, n: int) -> None:
    found = mean([np.repeat([1.0, 0.0], [n_right, n - n_right])])
    assert (found.value, found.n_item) == (n_right / n, n)
    assert (found.low, found.high) == pytest.approx(wilson(n_right, n), abs=1e-12)


@pytest.mark.parametrize(
    "tasks", [[[0.3, 2.5, 0.7, 0.1, 1.9, 0.2]], [[0.2, 1.1, 0.4], [3.0, 0.5, 2.2, 0.1]]]
)
def test_other_means_have_a_normal_interval(tasks: list[list[float]]) -> None:
    """The variance of a mean of independent means, by the standard library."""
    found = mean_of_means([np.array(values) for values in tasks])
    variance = fsum(statistics.variance(v) / len(v) for v in tasks) / len(tasks) ** 2
    middle = statistics.mean(map(statistics.mean, tasks))
    error = NormalDist(middle, sqrt(variance))
    assert (found.value, found.n_item) == (pytest.approx(middle), sum(map(len, tasks)))
    assert (found.low, found.high) == pytest.approx((error.inv_cdf(0.025), error.inv_cdf(0.975)))


def test_equal_values_have_no_width_and_one_item_no_interval() -> None:
    found = mean_of_means([np.full(5, -0.25), np.full(3, 0.75)])
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
    alone = mean_of_means([np.array([0.5]), np.array([1.0, 2.0])])
    assert (alone.value, alone.n_item) == (1.0, 3)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


@pytest.mark.parametrize(("less", "more"), [(0.0, 0.03), (0.02, 0.02), (0.05, 0.05), (0.05, 0.15)])
def test_difference_of_few_answers_holds_the_truth(less: float, more: float) -> None:
    """2000 draws: the share stays above 95 % less three standard deviations of 0.5 %."""
    rng = np.random.default_rng(6)
    n_held = 0
    for drawn in rng.choice([-1.0, 0.0, 1.0], (2000, 40), p=[less, 1 - less - more, more]):
        found = difference([drawn], is_right=True)
        n_held += found.low <= more - less <= found.high
    assert n_held / 2000 > 0.935
