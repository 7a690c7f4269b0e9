"""The tables of `qaflora eval` and `qaflora report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaflora_edge.cli.eval_words import NONE, estimate, heading, items, plain
from qaflora_edge.evaluation.cells import NATS, POINTS

if TYPE_CHECKING:
    from qaflora_edge.evaluation.lines import CellSummary, Line
    from qaflora_edge.evaluation.summary import Loaded, Summary, Verdict

NOTES = (
    "In brackets: 95 % intervals. Differences are paired, above 0 where the strategy is better.",
    "*: the best single adapter, found on these items, in hindsight.",
    "found: share of items whose two heaviest adapters are those of the language and domain.",
)
VERDICT_NOTE = "worse in: tasks where the whole interval over the best single adapter is below 0."
GAP = "   "


def table(summaries: Sequence[Summary]) -> str:
    """A table for each task, then the verdicts over several; sections have a heading."""
    lines: list[str] = []
    for summary in summaries:
        if len(summaries) > 1:
            lines += [heading(summary.section), ""]
        for cell in summary.cells:
            lines += [*_cell(cell), ""]
        if len(summary.cells) > 1:
            lines += [*_verdicts(summary.verdicts), ""]
        if summary.fewer is not None:
            lines += [*_loaded(summary.loaded, summary.fewer.n_adapter), ""]
    has_verdicts = any(len(summary.cells) > 1 for summary in summaries)
    return "\n".join([*lines, *NOTES, *([VERDICT_NOTE] if has_verdicts else [])])


def _cell(found: CellSummary) -> list[str]:
    task, unit = found.cell.task, found.cell.unit
    best = f"over {plain(found.best_single)} *" if found.best_single else "over the best single"
    kind = "loss, lower is better" if unit == NATS else task["metric"]
    head = ("", f"score, {unit}", "over static", best, "seconds", "prefills", "found")
    rows = [_cells(line, unit, found.best_single) for line in found.lines]
    return [
        f"{plain(found.cell.name)}: {kind}, {items(found)} items",
        *_columns([head, *rows]),
    ]


def _cells(line: Line, unit: str, best: str | None) -> tuple[str, ...]:
    over = estimate(line.over_single, unit, is_difference=True)
    return (
        plain(line.strategy),
        estimate(line.score, unit),
        estimate(line.over_static, unit, is_difference=True),
        "*" if line.strategy == best else over,
        NONE if math.isnan(line.seconds) else f"{line.seconds:.2f}",
        NONE if math.isnan(line.prefills) else f"{line.prefills:.1f}",
        NONE if line.found is None else f"{line.found:.2f}",
    )


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for unit in (POINTS, NATS):
        rows = [_verdict(verdict) for verdict in verdicts if verdict.unit == unit]
        if rows:
            head = ("", "tasks", "over static", "worst over its best single", "", "worse in")
            lines += [f"all tasks in {unit}, each counts the same", *_columns([head, *rows])]
    return lines


def _verdict(found: Verdict) -> tuple[str, ...]:
    name, worst = found.worst or (NONE, None)
    return (
        plain(found.strategy),
        str(found.n_cell),
        estimate(found.over_static, found.unit, is_difference=True),
        estimate(worst, found.unit, is_difference=True),
        plain(name),
        ", ".join(map(plain, found.below)) or "none",
    )


def _loaded(loaded: Sequence[Loaded], n_fewer: int) -> list[str]:
    rows = [
        (
            plain(each.strategy),
            str(each.n_cell),
            f"{estimate(each.gain, each.unit, is_difference=True)} {each.unit}",
            estimate(each.worst[1], each.unit, is_difference=True),
            plain(each.worst[0]),
        )
        for each in loaded
    ]
    head = ("", "tasks", "better by", "worst", "in")
    return [f"against the same tasks with {n_fewer} adapters loaded", *_columns([head, *rows])]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        GAP.join(
            f"{cell:{'>' if index else '<'}{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
