"""What is made of results: the table and the best by hand, intervals by closed formulas."""

import math
import statistics
from math import fsum, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from made_results import header, record

from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation import table
from qaflora_edge.evaluation.tasks import Results

Z = NormalDist().inv_cdf(0.975)
RIGHT = {  # strategy -> which of six items it answers rightly
    "base": "000001",
    "single:math": "111000",
    "single:es": "100001",
    "static": "110000",
    "qa-flora": "111100",
}
LOSS = {"static": [3.0, 2.0, 4.0], "single:math": [2.5, 2.5, 3.0], "qa-flora": [2.0, 2.0, 3.5]}


def scored(task: str, scores: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        record(task, item, strategy, score)
        for strategy, values in scores.items()
        for item, score in enumerate(values)
    ]


def points(task: str) -> list[dict[str, Any]]:
    return scored(task, {name: [float(c) for c in marks] for name, marks in RIGHT.items()})


def results(records: list[dict[str, Any]], **metrics: str) -> Results:
    return Results(header(metrics), records)


def one_cell(records: list[dict[str, Any]], metric: str = "number") -> table.Cell:
    [found] = table.cells(results(records, t=metric))
    return found


def over(cell: table.Cell, strategy: str, other: str) -> table.Estimate | None:
    return table.gain([cell], strategy, [other])


def bonett_price(n: int, n_more: int, n_less: int) -> tuple[float, float]:
    """D. G. Bonett and R. M. Price (2012), adjusted Wald interval of paired shares."""
    p, q = (n_more + 1) / (n + 2), (n_less + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return p - q - half, p - q + half


def test_points_over_static_and_over_the_best_single_adapter() -> None:
    cell = one_cell(points("t"))
    assert cell.best_single() == "single:math"
    score, over_static, over_best = table.rows([cell])["qa-flora"]
    assert score.value == pytest.approx(4 / 6)
    assert over_static == pytest.approx((2 / 6, *bonett_price(6, 2, 0), 6))
    assert over_best == pytest.approx((1 / 6, *bonett_price(6, 1, 0), 6))
    assert over(cell, "static", "static") is None
    assert over(cell, "qa-flora", "norm") is None


def test_of_losses_less_is_better() -> None:
    cell = one_cell(scored("t", LOSS), "loss")
    assert cell.best_single() == "single:math"
    assert table.rows([cell])["qa-flora"][0].value == pytest.approx(2.5)
    assert over(cell, "qa-flora", "single:math") == table.mean_of_means(
        [np.array([0.5, 0.5, -0.5])]
    )


def test_differences_are_of_the_items_that_both_have_a_score_for() -> None:
    records = [*points("t")[:-1], record("t", 5, "qa-flora", None, error="too long")]
    score, over_static, _ = table.rows([one_cell(records)])["qa-flora"]
    assert score.n_item == 5
    assert over_static == pytest.approx((0.4, *bonett_price(5, 2, 0), 5))
    failed = one_cell([*points("t"), record("t", 0, "norm", None, error="no projections")])
    assert [table.estimate(each, "points") for each in table.rows([failed])["norm"]] == [
        "-",
        "-",
        "-",
    ]


def test_single_adapters_are_compared_by_the_items_that_all_have() -> None:
    scores = {"single:es": [1.0], "single:math": [1.0, 1.0, 0.0, 0.0]}
    assert one_cell(scored("t", scores)).best_single() == "single:math"
    scores = {"single:es": [1.0, 1.0, 1.0], "single:math": [1.0, 1.0, 0.0, 0.0]}
    assert one_cell(scored("t", scores)).best_single() == "single:es"


def test_tables_have_a_row_for_each_strategy_and_count_tasks_alike() -> None:
    worse = {name: [1.0 - float(c) for c in marks] for name, marks in RIGHT.items()}
    made = results([*points("a"), *scored("b", worse)], a="number", b="exact")
    found = table.cells(made)
    assert table.heads(found[:1]) == ("score, points", "over static", "over single:math *")
    rows = table.rows(found[:1])
    assert list(rows) == list(RIGHT)
    # Wilson's interval of 2 in 6
    assert table.estimate(rows["static"][0], "points").startswith("33.3 (9.7 to 70.0)")
    gains = [np.array([0, 0, 1, 1, 0, 0.0]), -np.array([0, 0, 1, 1, 0, 0.0])]
    score, over_static, _ = table.rows(found)["qa-flora"]
    assert (score.value, over_static) == (0.5, table.mean_of_means(gains))
    assert table.heads(found)[2] == "over each best single *"


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("number", {"static": [0, 0], "qa-flora": [0, 1], "norm": [1, 1]}, "norm"),
        ("number", {"qa-flora": [1, 1], "norm": [1, 1], "static": [1, 1]}, "qa-flora"),
        ("number", {"static": [0, 1], "norm": [1, None]}, "static"),
        ("loss", {"static": [2, 3], "norm": [1, 3], "qa-flora": [4, 0.5]}, "norm"),
    ],
)
def test_the_best_strategy(metric, scores, best) -> None:
    made = results(scored("t", scores), t=metric)
    assert table.best_strategy(made) == best


def test_no_strategy_is_the_best_where_none_is_whole() -> None:
    with pytest.raises(ResultsFileError, match="No strategy can be saved: none has a score"):
        table.best_strategy(results([record("t", 0, "base", None)], t="number"))


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """E. B. Wilson (1927), solved for the two ends."""
    share = n_right / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("n_right", "n"), [(0, 1), (1, 1), (3, 10), (0, 24), (60, 250)])
def test_share_of_right_answers_has_a_wilson_interval(n_right, n) -> None:
    found = table.mean([np.repeat([1.0, 0.0], [n_right, n - n_right])])
    assert (found.value, found.n_item) == (n_right / n, n)
    assert (found.low, found.high) == pytest.approx(wilson(n_right, n), abs=1e-12)


@pytest.mark.parametrize(
    "tasks", [[[0.3, 2.5, 0.7, 0.1, 1.9, 0.2]], [[0.2, 1.1, 0.4], [3.0, 0.5, 2.2, 0.1]]]
)
def test_other_means_have_a_normal_interval(tasks) -> None:
    """The variance of a mean of independent means, by the standard library."""
    found = table.mean_of_means([np.array(values) for values in tasks])
    variance = fsum(statistics.variance(v) / len(v) for v in tasks) / len(tasks) ** 2
    middle = statistics.mean(map(statistics.mean, tasks))
    error = NormalDist(middle, sqrt(variance))
    assert (found.value, found.n_item) == (pytest.approx(middle), sum(map(len, tasks)))
    assert (found.low, found.high) == pytest.approx((error.inv_cdf(0.025), error.inv_cdf(0.975)))


def test_equal_values_have_no_width_and_one_item_no_interval() -> None:
    found = table.mean_of_means([np.full(5, -0.25), np.full(3, 0.75)])
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
    alone = table.mean_of_means([np.array([0.5]), np.array([1.0, 2.0])])
    assert (alone.value, alone.n_item) == (1.0, 3)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
