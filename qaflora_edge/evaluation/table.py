"""What results say: scores with 95 % intervals, paired differences, and the best strategy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.tasks import Record, Results

POINTS = "points"
NATS = "nats a token"
STATIC = "static"
SINGLE = "single:"
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


class Row(NamedTuple):
    """A line of a table: a strategy's score, and how much better it is than others.

    over_static, over_best  None where there is nothing to compare with
    """

    score: Estimate
    over_static: Estimate | None
    over_best: Estimate | None


def mean(tasks: Sequence[F64]) -> Estimate:
    """Average scores, over tasks if there are several; NaN of none.

    tasks  [n_item of the task] each

    Scores of one task that are all 0 or 1 have a Wilson interval (1927), others a normal one.
    """
    scores = tasks[0]
    n_item = len(scores)
    if n_item == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    is_right = np.isin(scores, (0.0, 1.0)).all()
    if len(tasks) > 1 or not is_right:
        return mean_of_means(tasks)
    share = float(scores.mean())
    square = Z * Z / n_item
    divisor = 1 + square
    middle = (share + square / 2) / divisor
    sampling = share * (1 - share) * square
    correction = square * square / 4
    variance = sampling + correction
    half = math.sqrt(variance) / divisor
    low = max(0.0, middle - half)
    high = min(1.0, middle + half)
    return Estimate(share, low, high, n_item)


def difference(tasks: Sequence[F64], *, is_right: bool) -> Estimate:
    """Average paired differences, over tasks if there are several.

    tasks     [n_item of the task] each, one or more: differences of two scores of one item
    is_right  whether scores are 1 or 0, for answers that are right or wrong

    One task of such answers has Bonett and Price's interval (2012): where few items differ, a
    normal one claims a difference too often. Others have the interval of `mean_of_means`.
    """
    gains = tasks[0]
    is_paired = is_right and np.isin(gains, (-1.0, 0.0, 1.0)).all()
    if len(tasks) > 1 or not is_paired:
        return mean_of_means(tasks)
    n_item = len(gains)
    n_more = int((gains > 0).sum())
    n_less = int((gains < 0).sum())
    n_padded = n_item + 2  # with one more item of either kind
    more = (n_more + 1) / n_padded
    less = (n_less + 1) / n_padded
    middle = more - less
    spread = more + less - middle**2
    variance = spread / n_padded
    half = Z * math.sqrt(variance)
    low = max(-1.0, middle - half)
    high = min(1.0, middle + half)
    value = (n_more - n_less) / n_item
    return Estimate(value, low, high, n_item)


def mean_of_means(tasks: Sequence[F64]) -> Estimate:
    """Average the means of tasks: every task counts the same.

    tasks  [n_item of the task] each, one or more

    The interval is normal: 1.96 standard errors, from the variance within each task.
    """
    means = [task.mean() for task in tasks]
    value = float(np.mean(means))
    sizes = [len(task) for task in tasks]
    n_item = sum(sizes)
    if min(sizes) < 2:
        return Estimate(value, math.nan, math.nan, n_item)
    squared_errors = [task.var(ddof=1) / len(task) for task in tasks]
    variance = sum(squared_errors) / len(tasks) ** 2
    half = Z * math.sqrt(variance)
    low = value - half
    high = value + half
    return Estimate(value, low, high, n_item)


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
        if self.task["metric"] == "loss":
            return NATS
        return POINTS

    def scored(self, strategy: str | None) -> dict[int, float]:
        """Scores as they were written, 0 to 1 or nats, by item; without those that failed."""
        records = self.rows.get(strategy or "", {})
        scores = {}
        for item, record in records.items():
            score = record["score"]
            if score is not None:
                scores[item] = score
        return scores

    def scores(self, strategy: str) -> F64:
        """Scores of the items that have one: float64 [n_item]."""
        by_item = self.scored(strategy)
        scores = list(by_item.values())
        return np.array(scores, np.float64)

    def gains(self, strategy: str, over: str | None) -> F64:
        """How much better a strategy is than another, above 0 where it is: float64 [n_item].

        Differences of scores as they were written, over the items that both have.
        """
        ours = self.scored(strategy)
        theirs = self.scored(over)
        differences = []
        for item, score in ours.items():
            if item in theirs:
                differences.append(score - theirs[item])
        gains = np.array(differences, np.float64)
        if self.unit == NATS:
            return -gains
        return gains

    def best_single(self) -> str | None:
        """Find the single adapter with the best mean, in hindsight: on these items."""
        names = []
        for adapter in self.adapters:
            name = f"{SINGLE}{adapter}"
            if self.scored(name):
                names.append(name)
        return best([self], names)


def cells(results: Results) -> list[Cell]:
    """Sort records by task and strategy, in the order asked for: answers end in another one."""
    adapters = [adapter["name"] for adapter in results.header["adapters"]]
    by_name = {task["name"]: Cell(task, adapters) for task in results.header["tasks"]}
    order = results.strategies

    def by_strategy(record: Record) -> int:
        return order.index(record["strategy"])

    for record in sorted(results.records.values(), key=by_strategy):
        cell = by_name[record["task"]]
        of_strategy = cell.rows.setdefault(record["strategy"], {})
        of_strategy[record["item"]] = record
    return list(by_name.values())


def gain(tasks: Sequence[Cell], strategy: str, others: Sequence[str | None]) -> Estimate | None:
    """Average how much better a strategy is than another one of each task.

    None where a task lacks one of them, or they are the same. Every task counts the same.
    """
    if all(other == strategy for other in others):
        return None
    gains = []
    for cell, other in zip(tasks, others, strict=True):
        of_task = cell.gains(strategy, other)
        if not len(of_task):
            return None
        gains.append(of_task)
    is_right = tasks[0].unit == POINTS
    return difference(gains, is_right=is_right)


def best(tasks: Sequence[Cell], names: Sequence[str]) -> str | None:
    """Find the strategy with the best mean over tasks; of equal ones the first.

    Strategies are compared by the items that all of them have, if there are such items.
    """
    if not names:
        return None
    sign = 1
    if tasks[0].unit == NATS:
        sign = -1
    means: dict[str, list[float]] = {name: [] for name in names}
    for cell in tasks:
        scored = {name: cell.scored(name) for name in names}
        items = map(set, scored.values())
        shared = set.intersection(*items)
        for name, scores in scored.items():
            values = [scores[item] for item in shared or scores]
            mean_score = float(np.mean(values))
            means[name].append(mean_score)

    def value(name: str) -> float:
        total = math.fsum(means[name])
        return sign * round(total, 12)

    return max(names, key=value)


def best_strategy(results: Results) -> str:
    """Find the strategy with the best mean over the tasks.

    Losses count only where no task has points.
    """
    every_task = cells(results)
    with_points = [cell for cell in every_task if cell.unit == POINTS]
    tasks = with_points or every_task
    whole = results.strategies
    for cell in tasks:
        items: set[int] = set()
        for name in cell.rows:
            items.update(cell.scored(name))
        if not items:
            whole = []
        whole = [name for name in whole if cell.scored(name).keys() == items]
    if not whole:
        raise ResultsFileError(
            "No strategy can be saved: none has a score for every item of every task. See what "
            "failed, or leave those items out."
        )
    return best(tasks, whole) or ""


def heads(tasks: Sequence[Cell]) -> tuple[str, str, str]:
    name = tasks[0].best_single() or "the best single"
    if len(tasks) > 1:
        name = "each best single"
    return f"score, {tasks[0].unit}", "over static", f"over {name} *"


def rows(tasks: Sequence[Cell]) -> dict[str, Row]:
    """Give the score of each strategy, and how much better than static and the best single it is.

    tasks  one, or several of one unit, which count the same: strategies that one lacks are left out
    """
    statics = [STATIC] * len(tasks)
    singles = [cell.best_single() for cell in tasks]
    table = {}
    for strategy in tasks[0].rows:
        scores = [cell.scores(strategy) for cell in tasks]
        is_whole = all(map(len, scores))
        if len(tasks) > 1 and not is_whole:
            continue
        table[strategy] = Row(
            score=mean(scores),
            over_static=gain(tasks, strategy, statics),
            over_best=gain(tasks, strategy, singles),
        )
    return table


def number(value: float, unit: str, *, is_difference: bool = False) -> str:
    """Write a score or difference in its unit; `-` where there is none."""
    if math.isnan(value):
        return NONE
    sign = ""
    if is_difference:
        sign = "+"
    if unit == NATS:
        return f"{value:{sign}.3f}"
    points = 100 * value
    return f"{points:{sign}.1f}"


def estimate(mean: Estimate | None, unit: str, *, is_difference: bool = False) -> str:
    """Write a mean and its interval, as in `12.0 (8.5 to 16.7)`."""
    if mean is None:
        return NONE
    value = number(mean.value, unit, is_difference=is_difference)
    if math.isnan(mean.low):
        return value
    low = number(mean.low, unit, is_difference=is_difference)
    high = number(mean.high, unit, is_difference=is_difference)
    return f"{value} ({low} to {high})"
