"""What results say: scores with intervals, paired differences, and which strategy was the best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.results import Record, Results
from qaflora_edge.evaluation.statistics import Estimate, difference, mean

POINTS, NATS = "points", "nats a token"
STATIC, SINGLE = "static", "single:"
NONE = "-"


@dataclass(frozen=True)
class Cell:
    """One task, answered with one set of adapters.

    task      its facts in the header
    adapters  names of those in use
    rows      strategy -> item -> record
    """

    task: Record
    adapters: tuple[str, ...]
    rows: dict[str, dict[int, Record]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.task["name"])

    @property
    def unit(self) -> str:
        """Unit of scores: points of 100, where more is better, or nats a token, where less is."""
        return NATS if self.task["metric"] == "loss" else POINTS

    @property
    def factor(self) -> float:
        """Factor from scores in the file to the unit."""
        return 1.0 if self.unit == NATS else 100.0

    @property
    def sign(self) -> float:
        """1 where a higher score is better, else -1."""
        return -1.0 if self.unit == NATS else 1.0

    def scored(self, strategy: str | None) -> dict[int, Record]:
        """Records that have a score, by item."""
        rows = self.rows.get(strategy or "", {})
        return {item: row for item, row in rows.items() if row["score"] is not None}

    def scores(self, strategy: str) -> F64:
        """Scores as they were written, 0 to 1 or nats: float64 [n_item]."""
        return np.array([row["score"] for row in self.scored(strategy).values()], np.float64)

    def gains(self, strategy: str, over: str | None) -> F64:
        """How much better a strategy is than another, above 0 where it is: float64 [n_item].

        Differences of scores as they were written, over the items that both have.
        """
        mine, theirs = self.scored(strategy), self.scored(over)
        found = [mine[item]["score"] - theirs[item]["score"] for item in mine if item in theirs]
        return self.sign * np.array(found, np.float64)

    def score(self, strategy: str) -> Estimate:
        """The mean score in the unit; NaN where no item has one."""
        return mean([self.scores(strategy)]).times(self.factor)

    def gain(self, strategy: str, over: str | None) -> Estimate | None:
        """How much better a strategy is than another, in the unit; None where one is missing."""
        return total_gain([self], strategy, [over])

    def best_single(self) -> str | None:
        """Find the single adapter with the best mean, in hindsight: on these items.

        Adapters are compared by the items that all of them have, if there are such items.
        """
        scored = {f"{SINGLE}{name}": self.scored(f"{SINGLE}{name}") for name in self.adapters}
        scored = {name: rows for name, rows in scored.items() if rows}
        shared = set.intersection(*map(set, scored.values())) if scored else set()

        def value(name: str) -> float:
            rows = scored[name]
            return self.sign * float(np.mean([rows[item]["score"] for item in shared or rows]))

        return max(scored, key=value, default=None)


def cells(results: Results) -> list[Cell]:
    """Sort records by task and strategy, in the order asked for: answers end in another one."""
    found = {task["name"]: Cell(task, results.adapters) for task in results.header["tasks"]}
    order = results.strategies.index
    for row in sorted(results.records, key=lambda row: order(row["strategy"])):
        found[row["task"]].rows.setdefault(row["strategy"], {})[row["item"]] = row
    return list(found.values())


def total_gain(
    found: Sequence[Cell], strategy: str, others: Sequence[str | None]
) -> Estimate | None:
    """Average how much better a strategy is than another one of each task, in the unit.

    None where a task lacks one of them, or they are the same. Every task counts the same.
    """
    gains = [cell.gains(strategy, over) for cell, over in zip(found, others, strict=True)]
    if {strategy} == {*others} or not all(map(len, gains)):
        return None
    return difference(gains, is_right=found[0].unit == POINTS).times(found[0].factor)


# tables


def heads(found: Sequence[Cell]) -> tuple[str, str, str]:
    """Name the columns of `rows`."""
    best = "each best single" if len(found) > 1 else found[0].best_single() or "the best single"
    return f"score, {found[0].unit}", "over static", f"over {best} *"


def rows(found: Sequence[Cell]) -> dict[str, tuple[Estimate, Estimate | None, Estimate | None]]:
    """Give the score of each strategy, and how much better than static and the best single it is.

    found  a task, or several of one unit, each of which counts the same: then strategies that one
           of them lacks are left out
    """
    others = [STATIC] * len(found), [cell.best_single() for cell in found]
    table = {}
    for strategy in found[0].rows:
        scores = [cell.scores(strategy) for cell in found]
        if len(found) == 1 or all(map(len, scores)):
            over_static, over_best = (total_gain(found, strategy, each) for each in others)
            table[strategy] = mean(scores).times(found[0].factor), over_static, over_best
    return table


def number(value: float, unit: str, *, is_difference: bool = False) -> str:
    """Write a score or difference in its unit; `-` where there is none."""
    digits = 3 if unit == NATS else 1
    return NONE if math.isnan(value) else f"{value:{'+' if is_difference else ''}.{digits}f}"


def estimate(found: Estimate | None, unit: str, *, is_difference: bool = False) -> str:
    """Write a mean and its interval, as in `12.0 (8.5 to 16.7)`."""
    if found is None:
        return NONE
    ends = (found.value, found.low, found.high)
    value, low, high = (number(end, unit, is_difference=is_difference) for end in ends)
    return value if low == NONE else f"{value} ({low} to {high})"


# the best strategy


def best_strategy(results: Results) -> str:
    """Find the strategy with the highest mean over the tasks.

    Losses count only where no task has points. Of equal strategies the first is taken.

    Raises ResultsFileError where no strategy has a score for all items.
    """
    found = cells(results)
    found = [cell for cell in found if cell.unit == POINTS] or found
    items = [{item for name in cell.rows for item in cell.scored(name)} for cell in found]
    means = {
        name: math.fsum(cell.sign * cell.scores(name).mean() for cell in found)
        for name in results.strategies
        if all(
            own and cell.scored(name).keys() == own for cell, own in zip(found, items, strict=True)
        )
    }
    if not means:
        raise ResultsFileError(
            "No strategy can be saved: none has a score for every item of every task. See what "
            "failed, or leave those items out."
        )
    return max(means, key=lambda name: round(means[name], 12))
