"""Results of evaluations as one HTML file that stands alone, every item to be opened.

What a task says and what a model wrote is text there, escaped.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from qaflora_edge.evaluation.lines import CellSummary
from qaflora_edge.evaluation.statistics import Estimate
from qaflora_edge.evaluation.summary import Summary, mean_layers
from qaflora_edge.show.picture_text import crop
from qaflora_edge.show.svg_panel import legend, min_weight, panel, scale
from qaflora_edge.weighing.numbers import FusionWeights

AXIS_WIDTH, MARGIN = 140, 6  # pixels


def eval_html(summaries: Sequence[Summary]) -> str:
    """The page of `qaflora eval --html` and `qaflora report --html`."""
    names = dict.fromkeys(
        str(head["bundle"]) for summary in summaries for head in summary.section.headers
    )
    words = {each.__name__: each for each in (facts, figure, heading, items, kind, number)}
    return page(
        "eval.html.j2",
        f"{asset('weights.css')}\n{asset('eval.css')}",
        title=f"Evaluation of {', '.join(names)}",
        summaries=summaries,
        parts=_parts,
        loaded_axes=_loaded_axes,
        drawn_cell=_cell,
        NONE=NONE,
        nan=math.nan,
        **words,
    )


class _Axis:
    """From numbers of a unit to pixels of a small picture, which shows all that are given.

    zero  where 0 is, on an axis of differences; None on one of scores
    """

    def __init__(
        self, found: Iterable[Estimate | None], unit: str, *, is_difference: bool = True
    ) -> None:
        ends = [
            end
            for each in found
            if each is not None
            for end in (each.value, each.low, each.high)
            if not math.isnan(end)
        ]
        low, high = min(ends, default=0.0), max(ends, default=1.0)
        if is_difference:
            high = max(map(abs, ends), default=1.0)
            low = -high
        self._low, self._high = low, high if high > low else low + 1
        self._unit, self.width = unit, AXIS_WIDTH
        self.zero = self._pixel(0.0) if is_difference else None

    def _pixel(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return round(MARGIN + share * (self.width - 2 * MARGIN), 1)

    def drawn(self, found: Estimate | None) -> dict[str, Any]:
        """An estimate as text and as places in the picture, where it has any."""
        is_difference = self.zero is not None
        text = estimate(found, self._unit, is_difference=is_difference)
        if found is None or math.isnan(found.value):
            return {"text": text, "kind": ""}
        low, high = (found.value if math.isnan(end) else end for end in (found.low, found.high))
        verdict = "open"
        if is_difference and not math.isnan(found.low):
            verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "open"
        ends = {"low": self._pixel(low), "high": self._pixel(high), "at": self._pixel(found.value)}
        return {"text": text, "kind": verdict, **ends}


def _parts(summary: Summary) -> Iterator[dict[str, Any]]:
    """Of several tasks those of one unit: their scores, and the verdicts over them."""
    for unit in (POINTS, NATS) if len(summary.cells) > 1 else ():
        if cells := [each for each in summary.cells if each.cell.unit == unit]:
            verdicts = [each for each in summary.verdicts if each.unit == unit]
            every = (
                end for row in verdicts for end in (row.over_static, row.worst and row.worst[1])
            )
            yield {
                "title": SCORES[unit],
                "unit": unit,
                "matrix": matrix(cells, summary.section.strategies),
                "verdicts": verdicts,
                "axis": _Axis(every, unit),
            }


def _loaded_axes(summary: Summary) -> dict[str, _Axis]:
    return {
        unit: _Axis((end for row in rows for end in (row.gain, row.worst[1])), unit)
        for unit in (POINTS, NATS)
        if (rows := [row for row in summary.loaded if row.unit == unit])
    }


def _cell(found: CellSummary) -> dict[str, Any]:
    """What the page shows of a task beside its lines."""
    cell, unit, names = found.cell, found.cell.unit, [line.strategy for line in found.lines]
    over = (each for line in found.lines for each in (line.over_static, line.over_single))
    return {
        "better": ", lower is better" if unit == NATS else "",
        "others": list(dict.fromkeys(name for line in found.lines for name in line.others)),
        "axis": _Axis((line.score for line in found.lines), unit, is_difference=False),
        "difference_axis": _Axis(over, unit),
        "is_marked": unit == POINTS,
        "order": ", ".join(names),
        "every": [
            item(cell, index, names)
            for index in sorted({index for rows in cell.rows.values() for index in rows})
        ],
        **_maps(cell, names),
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
