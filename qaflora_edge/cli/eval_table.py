"""The tables of `qaflora eval` and `qaflora report`."""

from collections.abc import Sequence

from qaflora_edge.cli.eval_words import (
    estimate,
    figure,
    heading,
    items,
    kind,
    loaded_rows,
    plain,
    verdict_row,
)
from qaflora_edge.cli.tables import columns
from qaflora_edge.evaluation.cells import NATS, POINTS
from qaflora_edge.evaluation.lines import CellSummary, Line
from qaflora_edge.evaluation.summary import Summary, Verdict

NOTES = (
    "In brackets: 95 % intervals. Differences are paired, above 0 where the strategy is better.",
    "*: the best single adapter, found on these items, in hindsight.",
    "found: share of items whose two heaviest adapters are those of the language and domain.",
)
VERDICT_NOTE = "worse in: tasks where the whole interval over the best single adapter is below 0."


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
            n_fewer, rows = summary.fewer.n_adapter, loaded_rows(summary.loaded)
            lines += [f"against the same tasks with {n_fewer} adapters loaded", *columns(rows), ""]
    has_verdicts = any(len(summary.cells) > 1 for summary in summaries)
    return "\n".join([*lines, *NOTES, *([VERDICT_NOTE] if has_verdicts else [])])


def _cell(found: CellSummary) -> list[str]:
    unit = found.cell.unit
    best = f"over {plain(found.best_single)} *" if found.best_single else "over the best single"
    better = ", lower is better" if unit == NATS else ""
    head = ("", f"score, {unit}", "over static", best, "seconds", "prefills", "found")
    rows = [_cells(line, unit, found.best_single) for line in found.lines]
    return [
        f"{plain(found.cell.name)}: {kind(found.cell)}{better}, {items(found)} items",
        *columns([head, *rows]),
    ]


def _cells(line: Line, unit: str, best: str | None) -> tuple[str, ...]:
    over = estimate(line.over_single, unit, is_difference=True)
    return (
        plain(line.strategy),
        estimate(line.score, unit),
        estimate(line.over_static, unit, is_difference=True),
        "*" if line.strategy == best else over,
        figure(line.seconds, 2),
        figure(line.prefills, 1),
        figure(line.found, 2),
    )


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for unit in (POINTS, NATS):
        rows = [verdict_row(verdict) for verdict in verdicts if verdict.unit == unit]
        if rows:
            head = ("", "tasks", "over static", "worst over its best single", "", "worse in")
            lines += [f"all tasks in {unit}, each counts the same", *columns([head, *rows])]
    return lines
