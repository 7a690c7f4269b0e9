"""Results of evaluations as a page of Markdown: what `docs/evaluation.md` is made with."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import numpy as np

from qaflora_edge.cli.eval_matrix import SCORES, matrix
from qaflora_edge.cli.eval_words import NONE, estimate, facts, heading, items, number, plain
from qaflora_edge.cli.show import BLOCKS
from qaflora_edge.evaluation.cells import BASE, NATS, POINTS, SINGLE, STATIC
from qaflora_edge.evaluation.patterns import ROLES, coherence, profiles, thirds

if TYPE_CHECKING:
    from qaflora_edge.evaluation.cells import F64
    from qaflora_edge.evaluation.patterns import Profile
    from qaflora_edge.evaluation.summary import CellSummary, Line, Summary, Verdict

PLACE = "<!-- results -->"  # where a page of prose has the tables
_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#"})


def eval_markdown(summaries: Sequence[Summary], prose: str = "") -> str:
    """The tables, in the place of prose that has a line for them, else behind it."""
    tables = "\n".join(line for summary in summaries for line in _section(summary)).rstrip()
    before, place, after = prose.partition(PLACE)
    if not place:
        return f"{prose.rstrip()}\n\n{tables}\n".lstrip("\n")
    return f"{before}{tables}{after}"


def _section(summary: Summary) -> list[str]:
    lines = [f"## {_text(heading(summary.section))}", "", *_facts(summary)]
    for unit in (POINTS, NATS):
        cells = [cell for cell in summary.cells if cell.cell.unit == unit]
        if cells:
            lines += _matrix(cells, unit, summary.section.strategies)
        if verdicts := [each for each in summary.verdicts if each.unit == unit]:
            lines += _verdicts(verdicts, unit)
    lines += _costs(summary)
    for strategy in summary.section.strategies:
        if strategy not in (BASE, STATIC) and not strategy.startswith(SINGLE):
            lines += _patterns(summary, strategy)
    lines += ["### Each task", ""]
    for cell in summary.cells:
        lines += _cell(cell)
    return lines


def _facts(summary: Summary) -> list[str]:
    rows = [(name, value.replace("\n", "; ")) for name, value in facts(summary.section)]
    return [*_table(("how it was run", ""), rows), ""]


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
    return [f"### {SCORES[unit]}", "", *_table(("", *found.names, "mean"), rows, bold=bold), ""]


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
    return [title, "", *_table(head, rows), ""]


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
    return ["### What it takes, and what failed", "", *_table(head, rows), ""]


def _median(values: Sequence[float], digits: int) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{np.median(known):.{digits}f}" if known else NONE


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else NONE


def _patterns(summary: Summary, strategy: str) -> list[str]:
    """Where by layer the adapters of domain and language weigh, and whether tasks agree in it."""
    found = profiles([cell.cell for cell in summary.cells], strategy)
    found = [each for each in found if any(np.ptp(line) > 0 for line in each.by_role.values())]
    if not found:
        return []
    parts = thirds(len(found[0].by_role[ROLES[0]]))
    rows = [
        (
            profile.cell.name,
            f"{role}: {profile.cell.role(role)}",
            *(f"{profile.by_role[role][part].mean():.2f}" for part in parts.values()),
        )
        for profile in found
        for role in ROLES
    ]
    lines = [f"### Weights by layer: {_text(strategy)}", "", *_strips(found), ""]
    lines += [*_table(("task", "adapter", *parts), rows), ""]
    return [*lines, *_coherence(found), ""]


def _strips(found: Sequence[Profile]) -> list[str]:
    """A sign for each layer, from layer 0 to the left; all on one scale."""
    most = max(line.max() for each in found for line in each.by_role.values())
    width = max(len(plain(each.cell.name)) for each in found)
    lines = ["```text", f"{'':{width}}  {'':8} layer 0 to the last; {BLOCKS[-1]} is {most:.2f}"]
    for each in found:
        for role in ROLES:
            name = plain(each.cell.name).replace("`", "'") if role == ROLES[0] else ""
            lines.append(f"{name:{width}}  {role:8} {_strip(each.by_role[role], float(most))}")
    return [*lines, "```"]


def _strip(line: F64, most: float) -> str:
    steps = np.clip(line / (most or 1.0) * len(BLOCKS), 0, len(BLOCKS) - 1).astype(int)
    return "".join(BLOCKS[step] for step in steps)


def _coherence(found: Sequence[Profile]) -> list[str]:
    rows = []
    for role in ROLES:
        each = coherence(found, role)
        rows.append(
            (
                role,
                f"{each.same:.2f}" if each.n_same else NONE,
                f"{each.other:.2f}" if each.n_other else NONE,
                f"{each.n_same}, {each.n_other}",
            )
        )
    head = ("adapter of the", "two tasks of the same", "of different ones", "pairs")
    return ["Correlation over layers of its weights in two tasks:", "", *_table(head, rows)]


def _cell(found: CellSummary) -> list[str]:
    unit = found.cell.unit
    kind = "loss" if unit == NATS else found.cell.task["metric"]
    best = f"over {found.best_single}" if found.best_single else "over the best single adapter"
    others = list(dict.fromkeys(name for line in found.lines for name in line.others))
    head = ("", f"score, {unit}", "over static", best, *others, "seconds", "found", "cut", "failed")
    rows = [_line(line, unit, others) for line in found.lines]
    name = f"{_text(plain(found.cell.name))} ({kind}, {items(found)} items)"
    return [f"**{name}**", "", *_table(head, rows), ""]


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


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Set[tuple[int, int]] = frozenset()
) -> list[str]:
    """A table: the first column to the left, others to the right.

    bold  row and column of cells that stand out
    """
    lines = [
        [
            f"**{_text(cell)}**" if (row, column) in bold else _text(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(rows)
    ]
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in ([*map(_text, head)], rule, *lines)]


def _text(shown: str) -> str:
    """A text on one line that no mark of Markdown or HTML acts in."""
    return plain(shown).translate(_MARKS)
