"""Results of evaluations as one HTML file that stands alone, every item to be opened.

What a task says and what a model wrote is text there, escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.cli.eval_words import (
    NONE,
    SCORES,
    estimate,
    facts,
    figure,
    heading,
    items,
    kind,
    matrix,
    number,
    text,
)
from qaflora_edge.cli.plot_html import INK, PAPER, asset, markup, page
from qaflora_edge.evaluation.cells import NATS, POINTS, SINGLE, Cell, Row
from qaflora_edge.evaluation.lines import CellSummary, Line
from qaflora_edge.evaluation.statistics import Estimate
from qaflora_edge.evaluation.summary import Summary, Verdict, mean_layers
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.picture_text import crop
from qaflora_edge.weighing.svg_panel import legend, min_weight, panel, scale

AXIS_WIDTH, MARGIN = 140, 6  # pixels


def eval_html(summaries: Sequence[Summary]) -> str:
    """The page of `qaflora eval --html` and `qaflora report --html`."""
    names = dict.fromkeys(
        str(head["bundle"]) for summary in summaries for head in summary.section.headers
    )
    title = f"Evaluation of {', '.join(names)}"
    style = f"{asset('weights.css')}\n{asset('eval.css')}"
    return page("eval.html.j2", style, title=title, sections=list(map(_section, summaries)))


class _Axis:
    """From numbers to pixels of a small picture.

    zero  where 0 is, on an axis of differences; None on one of scores
    """

    def __init__(self, low: float, high: float, *, is_difference: bool) -> None:
        self._low, self._high = low, high if high > low else low + 1
        self.width = AXIS_WIDTH
        self.zero = self.pixel(0.0) if is_difference else None

    def pixel(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return round(MARGIN + share * (self.width - 2 * MARGIN), 1)


def _axis(found: Iterable[Estimate | None], *, is_difference: bool) -> _Axis:
    ends = [
        end
        for each in found
        if each is not None
        for end in (each.value, each.low, each.high)
        if not math.isnan(end)
    ]
    if is_difference:
        most = max((abs(end) for end in ends), default=1.0)
        return _Axis(-most, most, is_difference=True)
    return _Axis(min(ends, default=0.0), max(ends, default=1.0), is_difference=False)


def _drawn(
    found: Estimate | None, axis: _Axis, unit: str, *, is_difference: bool = True
) -> dict[str, Any]:
    """An estimate as text and as places in its picture."""
    text = estimate(found, unit, is_difference=is_difference)
    if found is None or math.isnan(found.value):
        return {"text": text, "is_empty": True}
    low, high = (found.value if math.isnan(end) else end for end in (found.low, found.high))
    verdict = "open"
    if is_difference and not math.isnan(found.low):
        verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "open"
    places = {"low": axis.pixel(low), "high": axis.pixel(high), "at": axis.pixel(found.value)}
    return {"text": text, "is_empty": False, "kind": verdict, **places}


def _section(summary: Summary) -> dict[str, Any]:
    ends = {
        unit: [end for row in summary.loaded if row.unit == unit for end in row.estimates]
        for unit in (POINTS, NATS)
    }
    axes = {unit: _axis(each, is_difference=True) for unit, each in ends.items()}
    return {
        "heading": heading(summary.section),
        "facts": facts(summary.section),
        "parts": [
            {
                "title": SCORES[unit],
                "matrix": matrix(cells, summary.section.strategies),
                "verdicts": _verdicts(
                    unit, [each for each in summary.verdicts if each.unit == unit]
                ),
            }
            for unit in (POINTS, NATS)
            if len(summary.cells) > 1
            if (cells := [each for each in summary.cells if each.cell.unit == unit])
        ],
        "loaded": [
            {
                "strategy": each.strategy,
                "n_cell": each.n_cell,
                "gain": _drawn(each.gain, axes[each.unit], each.unit),
                "unit": each.unit,
                "axis": axes[each.unit],
                "worst": _drawn(each.worst[1], axes[each.unit], each.unit),
                "worst_in": each.worst[0],
            }
            for each in summary.loaded
        ],
        "n_fewer": summary.fewer.n_adapter if summary.fewer else 0,
        "cells": [_cell(cell) for cell in summary.cells],
    }


def _verdicts(unit: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    every = [each for row in verdicts for each in (row.over_static, row.worst and row.worst[1])]
    axis = _axis(every, is_difference=True)
    return {
        "unit": unit,
        "axis": axis,
        "rows": [
            {
                "strategy": row.strategy,
                "n_cell": row.n_cell,
                "static": _drawn(row.over_static, axis, unit),
                "worst": _drawn(row.worst[1] if row.worst else None, axis, unit),
                "worst_in": row.worst[0] if row.worst else NONE,
                "below": ", ".join(row.below) or "none",
            }
            for row in verdicts
        ],
    }


def _cell(found: CellSummary) -> dict[str, Any]:
    cell, unit = found.cell, found.cell.unit
    axis = _axis((line.score for line in found.lines), is_difference=False)
    over = (each for line in found.lines for each in (line.over_static, line.over_single))
    difference_axis = _axis(over, is_difference=True)
    is_marked = unit == POINTS
    others = list(dict.fromkeys(name for line in found.lines for name in line.others))
    return {
        "name": cell.name,
        "kind": kind(cell) + (", lower is better" if unit == NATS else ""),
        "n_item": items(found),
        "unit": unit,
        "others": others,
        "best": found.best_single or "the best single adapter",
        "axis": axis,
        "difference_axis": difference_axis,
        "rows": [_line(line, unit, others, axis, difference_axis) for line in found.lines],
        **_maps(cell, [line.strategy for line in found.lines]),
        "is_marked": is_marked,
        "order": ", ".join(line.strategy for line in found.lines),
        "every": [
            item(cell, index, [line.strategy for line in found.lines])
            for index in sorted({index for rows in cell.rows.values() for index in rows})
        ],
    }


def _line(
    line: Line, unit: str, others: Sequence[str], axis: _Axis, difference_axis: _Axis
) -> dict[str, Any]:
    return {
        "strategy": line.strategy,
        "score": _drawn(line.score, axis, unit, is_difference=False),
        "static": _drawn(line.over_static, difference_axis, unit),
        "single": _drawn(line.over_single, difference_axis, unit),
        "others": [number(line.others.get(name, math.nan), unit) for name in others],
        "seconds": figure(line.seconds, 2),
        "prefills": figure(line.prefills, 1),
        "found": figure(line.found, 2),
        "n_cut": line.n_cut or NONE,
        "n_failed": line.n_failed or NONE,
    }


def _maps(cell: Cell, strategies: Sequence[str]) -> dict[str, Any]:
    """A heatmap for each strategy whose weights differ over layers or adapters, on one scale."""
    fusions = [
        FusionWeights(cell.adapters, layers.astype(np.float32), None, strategy)
        for strategy in strategies
        if (layers := mean_layers(cell, strategy)) is not None
        if len(cell.adapters) > 1 and np.ptp(layers) > 0 and not strategy.startswith(SINGLE)
    ]
    ends = scale(fusions)
    panels = [
        {"strategy": each.strategy, "panel": markup(panel(each, ends, ink=INK, paper=PAPER))}
        for each in fusions
    ]
    return {"maps": panels, "legend": markup(legend(ends, min_weight(fusions), ink=INK))}


TITLE_CHARS = 160  # of a question, in the list of items


def item(cell: Cell, index: int, strategies: Sequence[str]) -> dict[str, Any]:
    """What the page's template takes of an item: its question, and who answered what."""
    rows = {name: cell.rows[name].get(index) for name in strategies}
    given = {name: row for name, row in rows.items() if row is not None}
    first = next(iter(given.values()))
    question = str(first.get("question", ""))
    is_marked = cell.unit == POINTS
    return {
        "index": index,
        "title": crop(question, TITLE_CHARS),
        "question": question,
        "expected": text(first.get("expected")),
        "marks": "".join(_mark(row) for row in rows.values()) if is_marked else "",
        "n_right": sum(row["score"] == 1 for row in given.values()),
        "is_same": is_marked and len({row["score"] for row in given.values()}) == 1,
        "answers": _answers(cell, given),
    }


def _mark(row: Row | None) -> str:
    if row is None or row["score"] is None:
        return "·"
    return "●" if row["score"] == 1 else "○"


def _answers(cell: Cell, given: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Equal answers once, with every strategy that gave them."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for strategy, row in given.items():
        answer = row.get("error") or row.get("answer")
        groups.setdefault(answer, []).append(
            {
                "strategy": strategy,
                "weights": _weights(row["weights"]),
                "failure": row.get("failure") or "",
                **_score(cell, row),
            }
        )
    return [{"text": answer, "rows": rows} for answer, rows in groups.items()]


def _score(cell: Cell, row: Row) -> dict[str, str]:
    score = row["score"]
    if score is None:
        return {"score": "failed", "kind": "wrong"}
    if cell.unit == NATS:
        return {"score": number(score, NATS), "kind": "loss"}
    if score in (0, 1):
        return {"score": "right" if score else "wrong", "kind": "right" if score else "wrong"}
    return {"score": number(100 * score, POINTS), "kind": "loss"}


def _weights(weights: Mapping[str, float]) -> str:
    if not any(weights.values()):
        return "the base alone"
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
