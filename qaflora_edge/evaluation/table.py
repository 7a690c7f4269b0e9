"""What results say: scores with 95 % intervals, paired differences, and the best strategy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.results import Record, Results

POINTS, NATS = "points", "nats a token"
STATIC, SINGLE = "static", "single:"
NONE = "-"
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
    if (n_item := len(tasks[0])) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(tasks) > 1 or not np.isin(tasks[0], (0.0, 1.0)).all():
        return mean_of_means(tasks)
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
    value = float(np.mean([task.mean() for task in tasks]))
    n_item = sum(map(len, tasks))
    if min(map(len, tasks)) < 2:
        return Estimate(value, math.nan, math.nan, n_item)
    variance = sum(task.var(ddof=1) / len(task) for task in tasks) / len(tasks) ** 2
    half = Z * math.sqrt(variance)
    return Estimate(value, value - half, value + half, n_item)


@dataclass(frozen=True)
class Cell:
    """One task, answered with one set of adapters.

    task      its facts in the header
    adapters  names of those in use
    rows      strategy -> item -> record
    """

    task: Record
    adapters: Sequence[str]
    rows: dict[str, dict[int, Record]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Unit of scores: points of 100, where more is better, or nats a token, where less is."""
        return NATS if self.task["metric"] == "loss" else POINTS

    def scored(self, strategy: str | None) -> dict[int, float]:
        """Scores as they were written, 0 to 1 or nats, by item; without those that failed."""
        rows = self.rows.get(strategy or "", {})
        return {item: row["score"] for item, row in rows.items() if row["score"] is not None}

    def scores(self, strategy: str) -> F64:
        """Scores of the items that have one: float64 [n_item]."""
        return np.array([*self.scored(strategy).values()], np.float64)

    def gains(self, strategy: str, over: str | None) -> F64:
        """How much better a strategy is than another, above 0 where it is: float64 [n_item].

        Differences of scores as they were written, over the items that both have.
        """
        mine, theirs = self.scored(strategy), self.scored(over)
        shared = [item for item in mine if item in theirs]
        gains = np.array([mine[item] - theirs[item] for item in shared], np.float64)
        return -gains if self.unit == NATS else gains

    def best_single(self) -> str | None:
        """Find the single adapter with the best mean, in hindsight: on these items."""
        names = [f"{SINGLE}{name}" for name in self.adapters]
        return best([self], [name for name in names if self.scored(name)])


def cells(results: Results) -> list[Cell]:
    """Sort records by task and strategy, in the order asked for: answers end in another one."""
    adapters = [adapter["name"] for adapter in results.header["adapters"]]
    by_name = {task["name"]: Cell(task, adapters) for task in results.header["tasks"]}
    order = results.strategies.index
    for row in sorted(results.records.values(), key=lambda row: order(row["strategy"])):
        of_strategy = by_name[row["task"]].rows.setdefault(row["strategy"], {})
        of_strategy[row["item"]] = row
    return list(by_name.values())


def gain(tasks: Sequence[Cell], strategy: str, others: Sequence[str | None]) -> Estimate | None:
    """Average how much better a strategy is than another one of each task.

    None where a task lacks one of them, or they are the same. Every task counts the same.
    """
    gains = [cell.gains(strategy, over) for cell, over in zip(tasks, others, strict=True)]
    if {strategy} == {*others} or not all(map(len, gains)):
        return None
    return difference(gains, is_right=tasks[0].unit == POINTS)


def best(tasks: Sequence[Cell], names: Sequence[str]) -> str | None:
    """Find the strategy with the best mean over tasks; of equal ones the first.

    Strategies are compared by the items that all of them have, if there are such items.
    """
    if not names:
        return None
    shared = [set.intersection(*(set(cell.scored(name)) for name in names)) for cell in tasks]
    sign = -1 if tasks[0].unit == NATS else 1

    def value(name: str) -> float:
        means = []
        for cell, items in zip(tasks, shared, strict=True):
            scores = cell.scored(name)
            means.append(np.mean([scores[item] for item in items or scores]))
        return sign * round(math.fsum(means), 12)

    return max(names, key=value)


def best_strategy(results: Results) -> str:
    """Find the strategy with the best mean over the tasks.

    Losses count only where no task has points.

    Raises ResultsFileError where no strategy has a score for all items.
    """
    tasks = cells(results)
    tasks = [cell for cell in tasks if cell.unit == POINTS] or tasks
    whole = results.strategies
    for cell in tasks:
        items = set[int]().union(*map(cell.scored, cell.rows))
        whole = [name for name in whole if items and cell.scored(name).keys() == items]
    if not whole:
        raise ResultsFileError(
            "No strategy can be saved: none has a score for every item of every task. See what "
            "failed, or leave those items out."
        )
    return best(tasks, whole) or ""


def heads(tasks: Sequence[Cell]) -> tuple[str, str, str]:
    """Name the columns of `rows`."""
    name = tasks[0].best_single() or "the best single"
    if len(tasks) > 1:
        name = "each best single"
    return f"score, {tasks[0].unit}", "over static", f"over {name} *"


def rows(tasks: Sequence[Cell]) -> dict[str, tuple[Estimate, Estimate | None, Estimate | None]]:
    """Give the score of each strategy, and how much better than static and the best single it is.

    tasks  one, or several of one unit, each of which counts the same: then strategies that one
           of them lacks are left out
    """
    statics = [STATIC] * len(tasks)
    singles = [cell.best_single() for cell in tasks]
    table = {}
    for strategy in tasks[0].rows:
        scores = [cell.scores(strategy) for cell in tasks]
        if len(tasks) == 1 or all(map(len, scores)):
            over_static = gain(tasks, strategy, statics)
            over_best = gain(tasks, strategy, singles)
            table[strategy] = mean(scores), over_static, over_best
    return table


def number(value: float, unit: str, *, is_difference: bool = False) -> str:
    """Write a score or difference in its unit; `-` where there is none."""
    digits, factor = (3, 1.0) if unit == NATS else (1, 100.0)
    sign = "+" if is_difference else ""
    return NONE if math.isnan(value) else f"{factor * value:{sign}.{digits}f}"


def estimate(mean: Estimate | None, unit: str, *, is_difference: bool = False) -> str:
    """Write a mean and its interval, as in `12.0 (8.5 to 16.7)`."""
    if mean is None:
        return NONE
    value, low, high = (number(end, unit, is_difference=is_difference) for end in mean[:3])
    return value if low == NONE else f"{value} ({low} to {high})"
