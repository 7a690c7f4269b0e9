"""What results say: scores with intervals, paired differences, and which strategy was the best."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.results import Record, Results
from qaflora_edge.evaluation.statistics import Estimate, difference, mean, mean_of_means
from qaflora_edge.formats.json_text import without_nan
from qaflora_edge.weighing.strategy import parse_strategy

POINTS, NATS = "points", "nats a token"
STATIC, SINGLE = "static", "single:"
NONE = "-"
TIE = 1e-9  # means that differ by less are equal


@dataclass(frozen=True)
class Cell:
    """One task, answered with one set of adapters.

    task      its facts in the header
    adapters  names, in the order of the first axis of `layers`
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

    def scored(self, strategy: str) -> dict[int, Record]:
        """Records that have a score, by item."""
        rows = self.rows.get(strategy, {})
        return {item: row for item, row in rows.items() if row["score"] is not None}

    def scores(self, strategy: str) -> F64:
        """Scores as they were written, 0 to 1 or nats: float64 [n_item]."""
        return np.array([row["score"] for row in self.scored(strategy).values()], np.float64)

    def gains(self, strategy: str, over: str, of: "Cell | None" = None) -> F64:
        """How much better a strategy is than another, above 0 where it is: float64 [n_item].

        of  the other's cell: the same task under other adapters; None: this one

        Differences of scores as they were written, over the items that both have.
        """
        theirs = (of or self).scored(over)
        pairs = [(row, theirs.get(item)) for item, row in self.scored(strategy).items()]
        found = [mine["score"] - other["score"] for mine, other in pairs if other is not None]
        return self.sign * np.array(found, np.float64)

    def gain(self, strategy: str, over: str | None) -> Estimate | None:
        """How much better a strategy is than another, in the unit; None where one is missing."""
        if over is None or over == strategy or not len(gains := self.gains(strategy, over)):
            return None
        return difference([gains], is_right=self.unit == POINTS).times(self.factor)

    def score(self, strategy: str) -> Estimate:
        """The mean score in the unit; NaN where no item has one."""
        scores = self.scores(strategy)
        if len(scores) == 0:
            return Estimate(math.nan, math.nan, math.nan, 0)
        return mean(scores).times(self.factor)

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
    rows: dict[tuple[str, str], dict[int, Record]] = {}
    for row in results.records:
        rows.setdefault((row["task"], row["strategy"]), {})[row["item"]] = row
    return [
        Cell(
            task,
            results.adapters,
            {s: rows[task["name"], s] for s in results.strategies if (task["name"], s) in rows},
        )
        for task in results.header["tasks"]
    ]


# as text


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


def rows(cell: Cell) -> list[tuple[str, ...]]:
    """Write a task as a table: its head, then a row for each strategy."""
    best, unit = cell.best_single(), cell.unit
    over_best = f"over {best} *" if best else "over the best single"
    found: list[tuple[str, ...]] = [("", f"score, {unit}", "over static", over_best, "items")]
    for strategy in cell.rows:
        score = cell.score(strategy)
        gains = (cell.gain(strategy, over) for over in (STATIC, best))
        texts = (estimate(gain, unit, is_difference=True) for gain in gains)
        found.append((strategy, estimate(score, unit), *texts, str(score.n_item)))
    return found


def total_rows(found: Sequence[Cell]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Write a title and a table over several tasks of one unit, each of which counts the same.

    Strategies that a task was not asked under are left out.
    """
    totals = []
    for unit in (POINTS, NATS):
        alike = [cell for cell in found if cell.unit == unit]
        head = ("", f"score, {unit}", "over static", "over each best single *")
        table: list[tuple[str, ...]] = [head]
        for strategy in alike[0].rows if len(alike) > 1 else ():
            if all(len(cell.scores(strategy)) for cell in alike):
                score = float(np.mean([cell.score(strategy).value for cell in alike]))
                gains = (
                    _total_gain(alike, strategy, [STATIC] * len(alike)),
                    _total_gain(alike, strategy, [cell.best_single() for cell in alike]),
                )
                texts = (estimate(gain, unit, is_difference=True) for gain in gains)
                table.append((strategy, number(score, unit), *texts))
        if len(table) > 1:
            totals.append((f"all {len(alike)} tasks in {unit}, each counts the same", table))
    return totals


def _total_gain(alike: Sequence[Cell], strategy: str, others: Sequence[str | None]) -> Any:
    """Average gains over one strategy of each task; None where a task lacks it."""
    pairs = zip(alike, others, strict=True)
    gains = [cell.gains(strategy, over or "") for cell, over in pairs]
    if {strategy} == {*others} or not all(map(len, gains)):
        return None
    return mean_of_means(gains).times(alike[0].factor)


# the best strategy


def best_strategy(results: Results) -> str:
    """Find the strategy with the highest mean over the tasks.

    Losses count only where no task has points. Of equal strategies the first is taken that does
    not look at the query, else the first.

    Raises ResultsFileError where no strategy has a score for all items.
    """
    found = cells(results)
    found = [cell for cell in found if cell.unit == POINTS] or found
    whole = [name for name in results.strategies if all(_is_whole(cell, name) for cell in found)]
    if not found or not whole:
        raise ResultsFileError(
            "No strategy can be saved: none has a score for every item of every task. See what "
            "failed, or leave those items out."
        )
    means = {
        name: math.fsum(cell.sign * cell.scores(name).mean() for cell in found) / len(found)
        for name in whole
    }
    equal = [name for name in whole if max(means.values()) - means[name] <= TIE]
    return min(equal, key=lambda each: parse_strategy(each, results.adapters).strategy.is_probed)


def _is_whole(cell: Cell, strategy: str) -> bool:
    """Tell whether a strategy has a score for each item that any has one for."""
    items = {item for name in cell.rows for item in cell.scored(name)}
    return bool(items) and items == cell.scored(strategy).keys()


def evidence(results: Results, strategy: str) -> dict[str, Any]:
    """Say why this is the bundle's strategy: `fusion.evidence` of bundle.json.

    Scores are 0 to 1, or nats a token; an interval's ends are null where one item has none.
    """
    tasks = []
    for cell in cells(results):
        score, over = cell.score(strategy), cell.gain(strategy, STATIC)
        values = [
            each and [round(end / cell.factor, 6) for end in (each.value, each.low, each.high)]
            for each in (score, over)
        ]
        about = {key: cell.task[key] for key in ("name", "metric", "sha256")}
        tasks.append(about | {"n_item": score.n_item, "score": values[0], "over_static": values[1]})
    found: dict[str, Any] = without_nan(
        {
            "strategy": strategy,
            "version": results.header["version"],
            "date": datetime.date.today().isoformat(),
            "compared": list(results.strategies),
            "tasks": tasks,
        }
    )
    return found
