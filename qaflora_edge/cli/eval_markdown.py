"""Results of evaluations as a page of Markdown: what `docs/evaluation.md` is made with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qaflora_edge.cli.eval_layers import layer_lines
from qaflora_edge.cli.eval_matrix import SCORES, matrix
from qaflora_edge.cli.eval_words import NONE, estimate, facts, heading, items, number, plain
from qaflora_edge.cli.markdown_table import escaped, folded, table
from qaflora_edge.evaluation.cells import NATS, POINTS

if TYPE_CHECKING:
    from qaflora_edge.evaluation.lines import CellSummary, Line
    from qaflora_edge.evaluation.summary import Summary, Verdict

PLACE = "<!-- results -->"  # where a page of prose has the tables


def eval_markdown(summaries: Sequence[Summary], prose: str = "") -> str:
    """The tables, in the place of prose that has a line for them, else behind it."""
    shown = "\n".join(line for summary in summaries for line in _section(summary)).rstrip()
    before, place, after = prose.partition(PLACE)
    if not place:
        return f"{prose.rstrip()}\n\n{shown}\n".lstrip("\n")
    return f"{before}{shown}{after}"


def _section(summary: Summary) -> list[str]:
    lines = [f"## {escaped(heading(summary.section))}", "", *_facts(summary)]
    for unit in (POINTS, NATS):
        cells = [cell for cell in summary.cells if cell.cell.unit == unit]
        if cells:
            lines += _matrix(cells, unit, summary.section.strategies)
        if verdicts := [each for each in summary.verdicts if each.unit == unit]:
            lines += _verdicts(verdicts, unit)
    lines += _loaded(summary)
    lines += _costs(summary)
    lines += layer_lines(summary)
    each = [line for cell in summary.cells for line in _cell(cell)]
    return [*lines, *folded("Each task, with intervals and what it takes", each)]


def _facts(summary: Summary) -> list[str]:
    rows = [(name, value.replace("\n", "; ")) for name, value in facts(summary.section)]
    return [*table(("how it was run", ""), rows), ""]


def _matrix(cells: Sequence[CellSummary], unit: str, strategies: Sequence[str]) -> list[str]:
    found = matrix(cells, strategies)
    bold = {
        (row, column)
        for row, (_, scores) in enumerate(found.rows)
        for column, score in enumerate(scores, 1)
        if score.is_best
    }
    rows: list[Sequence[str]] = [
        (label, *(score.text for score in scores)) for label, scores in found.rows
    ]
    rows.append(("items", *found.counts, ""))
    return [f"### {SCORES[unit]}", "", *table(("", *found.names, "mean"), rows, bold=bold), ""]


def _verdicts(verdicts: Sequence[Verdict], unit: str) -> list[str]:
    rows = []
    for row in verdicts:
        name, worst = row.worst or (NONE, None)
        rows.append(
            (
                row.strategy,
                str(row.n_cell),
                estimate(row.over_static, unit, is_difference=True),
                estimate(worst, unit, is_difference=True),
                name,
                ", ".join(row.below) or "none",
                *(["yes" if row.is_shown else "no"] if unit == POINTS else []),
            )
        )
    head = ["", "tasks", "over static", "worst over its best single adapter", "in", "worse in"]
    if unit == POINTS:
        head.append("5 points over static, and nowhere worse")
    title = f"Over all tasks in {unit}, each of which counts the same:"
    return [title, "", *table(head, rows), ""]


def _loaded(summary: Summary) -> list[str]:
    """What it changes that more adapters are loaded, where that is known."""
    if summary.fewer is None:
        return []
    rows = [
        (
            each.strategy,
            str(each.n_cell),
            f"{estimate(each.gain, each.unit, is_difference=True)} {each.unit}",
            estimate(each.worst[1], each.unit, is_difference=True),
            each.worst[0],
        )
        for each in summary.loaded
    ]
    title = f"### Against the same tasks with {summary.fewer.n_adapter} adapters loaded"
    head = ("", "tasks", "better by", "worst", "in")
    return [title, "", *table(head, rows), ""]


def _costs(summary: Summary) -> list[str]:
    """Medians over tasks of what an item takes under each strategy."""
    rows = []
    for strategy in summary.section.strategies:
        lines = [line for cell in summary.cells for line in cell.lines if line.strategy == strategy]
        rows.append(
            (
                strategy,
                _median([line.seconds for line in lines], 2),
                _median([line.probe_ms for line in lines], 0),
                _median([line.prefills for line in lines], 1),
                _share([line.found for line in lines]),
                str(sum(line.n_cut for line in lines)),
                str(sum(line.n_failed for line in lines)),
            )
        )
    head = ("", "seconds", "probe ms", "prefills", "found", "cut", "failed")
    return ["### What it takes, and what failed", "", *table(head, rows), ""]


def _median(values: Sequence[float], digits: int) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{np.median(known):.{digits}f}" if known else NONE


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else NONE


def _cell(found: CellSummary) -> list[str]:
    unit = found.cell.unit
    kind = "loss" if unit == NATS else found.cell.task["metric"]
    best = f"over {found.best_single}" if found.best_single else "over the best single adapter"
    others = list(dict.fromkeys(name for line in found.lines for name in line.others))
    head = ("", f"score, {unit}", "over static", best, *others, "seconds", "found", "cut", "failed")
    rows = [_line(line, unit, others) for line in found.lines]
    name = f"{escaped(plain(found.cell.name))} ({kind}, {items(found)} items)"
    return [f"**{name}**", "", *table(head, rows), ""]


def _line(line: Line, unit: str, others: Sequence[str]) -> tuple[str, ...]:
    return (
        line.strategy,
        estimate(line.score, unit),
        estimate(line.over_static, unit, is_difference=True),
        estimate(line.over_single, unit, is_difference=True),
        *(number(line.others.get(name, math.nan), unit) for name in others),
        _median([line.seconds], 2),
        _share([line.found]),
        str(line.n_cut),
        str(line.n_failed),
    )
