"""Which strategy was the best, and on what evidence."""

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.cells import NATS, POINTS, STATIC, Cell, sections
from qaflora_edge.evaluation.results import Results
from qaflora_edge.evaluation.statistics import Estimate, difference, mean
from qaflora_edge.weighing.strategy import parse_strategy

_DIGITS = 6
_TIE = 1e-9  # means that differ by less are equal


def best_strategy(results: Results) -> str:
    """The strategy with the highest mean over the tasks; of equal ones the cheapest.

    Where there are tasks with points, losses do not count. Of those that cost nothing to weigh,
    the first one stands before the others.

    Raises ResultsFileError where no strategy has a score for all items.
    """
    cells = _cells(results)
    whole = [name for name in results.strategies if all(_is_whole(cell, name) for cell in cells)]
    if not cells or not whole:
        raise ResultsFileError(
            "No strategy can be saved: none has a score for every item of every task. See what "
            "failed, or leave those items out."
        )
    means = {name: _mean(cells, name) for name in whole}
    best = max(means.values())
    equal = [name for name in whole if best - means[name] <= _TIE]
    return min(equal, key=lambda name: _cost(cells, name, results.adapters))


def evidence(results: Results, strategy: str) -> dict[str, Any]:
    """What a bundle says of why this is its strategy: `fusion.evidence` of bundle.json."""
    return {
        "strategy": strategy,
        "version": results.header["version"],
        "date": datetime.date.today().isoformat(),
        "compared": list(results.strategies),
        "tasks": [_task(cell, strategy) for cell in _all_cells(results)],
    }


def _all_cells(results: Results) -> list[Cell]:
    return [cell for section in sections([("", results)]) for cell in section.cells]


def _cells(results: Results) -> list[Cell]:
    """The tasks that decide."""
    cells = _all_cells(results)
    return [cell for cell in cells if cell.unit == POINTS] or cells


def _is_whole(cell: Cell, strategy: str) -> bool:
    """Whether a strategy has a score for each item that any has one for."""
    items = {
        item
        for rows in cell.rows.values()
        for item, row in rows.items()
        if row["score"] is not None
    }
    return bool(items) and len(cell.scores(strategy)) == len(items)


def _mean(cells: Sequence[Cell], strategy: str) -> float:
    means = [float(cell.scores(strategy).mean()) for cell in cells]
    sign = -1.0 if cells[0].unit == NATS else 1.0
    return sign * math.fsum(means) / len(means)


def _cost(cells: Sequence[Cell], strategy: str, adapters: Sequence[str]) -> float:
    """Mean milliseconds of the probe, where others had not probed before if there is such an item;
    0 where a strategy does not look at the query.
    """
    if not parse_strategy(strategy, adapters).strategy.is_probed:
        return 0.0
    rows: list[Mapping[str, Any]] = [row for cell in cells for row in cell.rows[strategy].values()]
    rows = [row for row in rows if not row.get("probe_before_ms")] or rows
    return math.fsum(row.get("probe_ms", 0.0) for row in rows) / len(rows)


def _task(cell: Cell, strategy: str) -> dict[str, Any]:
    gains = cell.gains(strategy, STATIC)
    over = difference([gains], is_right=cell.unit == POINTS) if len(gains) else None
    return {
        "name": cell.name,
        "metric": cell.task["metric"],
        "sha256": cell.task["sha256"],
        "n_item": len(cell.scores(strategy)),
        "score": _numbers(mean(cell.scores(strategy))),
        "over_static": _numbers(over) if over and strategy != STATIC else None,
    }


def _numbers(found: Estimate) -> list[float | None]:
    """Value, and the ends of its 95 % interval; null where a single item tells of none."""
    ends = (found.value, found.low, found.high)
    return [None if math.isnan(value) else round(value, _DIGITS) for value in ends]
