"""One task under every strategy: scores, differences, costs, whether the right adapters lead."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qaflora_edge.errors import StrategyError
from qaflora_edge.evaluation.cells import POINTS, STATIC, Cell, Row
from qaflora_edge.evaluation.statistics import Estimate, difference, mean
from qaflora_edge.weighing.strategy import parse_strategy


@dataclass(frozen=True)
class Line:
    """One strategy in one cell.

    score        in the cell's unit
    over_static, over_single  how much better than static and than the best single adapter, above
                 0 where it is, over the items that both have; None where the other is missing
    seconds      of an item: medians of the probe, and of what comes after it
    probe_ms     median over the items where no other strategy had probed before
    prefill_ms   median of an item
    found        see `found_share`
    others       score by sum and by mean of log-probabilities, where choices were scored
    n_cut        answers that max_tokens cut; n_failed items that have no score
    """

    strategy: str
    score: Estimate
    over_static: Estimate | None
    over_single: Estimate | None
    seconds: float
    probe_ms: float
    prefill_ms: float
    found: float | None
    others: Mapping[str, float]
    n_cut: int
    n_failed: int

    @property
    def prefills(self) -> float:
        """What the probe takes, in readings of the prompt; NaN where nothing is generated."""
        return self.probe_ms / self.prefill_ms if self.prefill_ms > 0 else math.nan


@dataclass(frozen=True)
class CellSummary:
    """One task: a line for each strategy, and the best single adapter in hindsight."""

    cell: Cell
    best_single: str | None
    lines: tuple[Line, ...]


def summarise_cell(cell: Cell, order: Sequence[str]) -> CellSummary:
    best = cell.best_single()
    lines = (_line(cell, strategy, best) for strategy in order)
    return CellSummary(cell, best, tuple(line for line in lines if line is not None))


def _line(cell: Cell, strategy: str, best: str | None) -> Line:
    rows = list(cell.rows[strategy].values())
    probe_ms = _median([row for row in rows if not row.get("probe_before_ms")], "probe_ms")
    return Line(
        strategy=strategy,
        score=_score(cell, strategy),
        over_static=gain_over([cell], strategy, STATIC),
        over_single=gain_over([cell], strategy, best),
        seconds=(probe_ms + _median(rows, "prefill_ms", "decode_ms")) / 1000,
        probe_ms=probe_ms,
        prefill_ms=math.nan if cell.is_likelihood else _median(rows, "prefill_ms"),
        found=found_share(cell, strategy),
        others=_others(cell, rows),
        n_cut=sum(row.get("finish_reason") == "length" for row in rows),
        n_failed=sum(row["score"] is None for row in rows),
    )


def _score(cell: Cell, strategy: str) -> Estimate:
    scores = cell.scores(strategy)
    if len(scores) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return mean(scores).times(cell.factor)


def _others(cell: Cell, rows: Sequence[Row]) -> dict[str, float]:
    """Name -> mean, in the cell's unit, of the scores by another rule that all rows have."""
    known = [row for row in rows if row["score"] is not None]
    return {
        name: cell.factor * float(np.mean([row[key] for row in known]))
        for name, key in (("by sum", "score_sum"), ("by mean", "score_mean"))
        if known and all(isinstance(row.get(key), int | float) for row in known)
    }


def gain_over(cells: Sequence[Cell], strategy: str, over: str | None) -> Estimate | None:
    """How much better a strategy is over the cells, in their unit; None where none has both."""
    if over in (None, strategy):
        return None
    gains = [values for cell in cells if len(values := cell.gains(strategy, str(over)))]
    if not gains:
        return None
    return difference(gains, is_right=cells[0].unit == POINTS).times(cells[0].factor)


def _median(rows: Sequence[Row], *keys: str) -> float:
    times = [
        sum(row.get(key, math.nan) for key in keys) for row in rows if row["score"] is not None
    ]
    return float(np.median(times)) if times else math.nan


def found_share(cell: Cell, strategy: str) -> float | None:
    """Share of items whose two heaviest adapters are those of the task's language and domain.

    By the mean over layers; of weights that are equal none is heaviest. None where the task does
    not name both, no others are loaded, or the strategy does not look at the query.
    """
    if not _looks(strategy, cell.adapters):
        return None
    right = {cell.role("language"), cell.role("domain")}
    if None in right or len(right) < 2 or len(cell.adapters) <= 2:
        return None
    weighed = [weights for row in cell.rows[strategy].values() if (weights := row["weights"])]
    return sum(_lead(weights, right) for weights in weighed) / len(weighed) if weighed else None


def _looks(strategy: str, adapters: Sequence[str]) -> bool:
    """Whether weights differ from query to query; what another tool calls a strategy may."""
    try:
        return parse_strategy(strategy, adapters).strategy.is_probed
    except StrategyError:
        return True


def _lead(weights: Mapping[str, float], right: set[Any]) -> bool:
    others = [weight for name, weight in weights.items() if name not in right]
    return min(weights[name] for name in right) > max(others)
