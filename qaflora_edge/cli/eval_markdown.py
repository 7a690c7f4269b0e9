"""Results of evaluations as a page of Markdown: what `docs/evaluation.md` is made with."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.cli.eval_words import (
    NONE,
    SCORES,
    estimate,
    facts,
    figure,
    heading,
    items,
    kind,
    loaded_rows,
    matrix,
    number,
    plain,
    verdict_row,
)
from qaflora_edge.cli.show import BLOCKS
from qaflora_edge.cli.tables import escaped, folded, table
from qaflora_edge.evaluation.cells import BASE, NATS, POINTS, SINGLE, STATIC
from qaflora_edge.evaluation.lines import CellSummary, Line
from qaflora_edge.evaluation.summary import (
    ROLES,
    Profile,
    Summary,
    Verdict,
    coherence,
    profiles,
    thirds,
)

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
    rows = [verdict_row(each) for each in verdicts]
    head = ["", "tasks", "over static", "worst over its best single adapter", "in", "worse in"]
    if unit == POINTS:
        head.append("5 points over static, and nowhere worse")
        shown = ("yes" if each.is_shown else "no" for each in verdicts)
        rows = [(*row, each) for row, each in zip(rows, shown, strict=True)]
    title = f"Over all tasks in {unit}, each of which counts the same:"
    return [title, "", *table(head, rows), ""]


def _loaded(summary: Summary) -> list[str]:
    """What it changes that more adapters are loaded, where that is known."""
    if summary.fewer is None:
        return []
    title = f"### Against the same tasks with {summary.fewer.n_adapter} adapters loaded"
    head, *rows = loaded_rows(summary.loaded)
    return [title, "", *table(head, rows), ""]


def _costs(summary: Summary) -> list[str]:
    """Medians over tasks of what an item takes under each strategy."""
    rows = []
    for strategy in summary.section.strategies:
        lines = [line for cell in summary.cells for line in cell.lines if line.strategy == strategy]
        rows.append(
            (
                strategy,
                _over(np.median, (line.seconds for line in lines), 2),
                _over(np.median, (line.probe_ms for line in lines), 0),
                _over(np.median, (line.prefills for line in lines), 1),
                _over(np.mean, (line.found for line in lines), 2),
                str(sum(line.n_cut for line in lines)),
                str(sum(line.n_failed for line in lines)),
            )
        )
    head = ("", "seconds", "probe ms", "prefills", "found", "cut", "failed")
    return ["### What it takes, and what failed", "", *table(head, rows), ""]


def _over(mean: Callable[[list[float]], Any], values: Iterable[float | None], digits: int) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return figure(float(mean(known)) if known else None, digits)


def _cell(found: CellSummary) -> list[str]:
    unit = found.cell.unit
    best = f"over {found.best_single}" if found.best_single else "over the best single adapter"
    others = list(dict.fromkeys(name for line in found.lines for name in line.others))
    head = ("", f"score, {unit}", "over static", best, *others, "seconds", "found", "cut", "failed")
    rows = [_line(line, unit, others) for line in found.lines]
    name = f"{escaped(plain(found.cell.name))} ({kind(found.cell)}, {items(found)} items)"
    return [f"**{name}**", "", *table(head, rows), ""]


def _line(line: Line, unit: str, others: Sequence[str]) -> tuple[str, ...]:
    return (
        line.strategy,
        estimate(line.score, unit),
        estimate(line.over_static, unit, is_difference=True),
        estimate(line.over_single, unit, is_difference=True),
        *(number(line.others.get(name, math.nan), unit) for name in others),
        figure(line.seconds, 2),
        figure(line.found, 2),
        str(line.n_cut),
        str(line.n_failed),
    )


WORDS = (
    "Means over tasks of what the adapter of the task's domain, and that of its language, weigh in "
    "a part of the layers; and the correlation over layers of these weights in two tasks: of the "
    "same domain (or language), and of different ones."
)


def layer_lines(summary: Summary) -> list[str]:
    """A table of all strategies that weigh layers differently, then each by task, folded."""
    cells = [cell.cell for cell in summary.cells]
    found = {
        strategy: kept
        for strategy in summary.section.strategies
        if strategy not in (BASE, STATIC) and not strategy.startswith(SINGLE)
        if (kept := [each for each in profiles(cells, strategy) if _is_layered(each)])
    }
    if not found:
        return []
    rows = [row for strategy, each in found.items() for row in _roles(strategy, each)]
    parts = thirds(len(next(iter(found.values()))[0].by_role[ROLES[0]]))
    head = ("", "adapter of the", *parts, "same", "different", "pairs")
    lines = ["### Weights by layer", "", WORDS, "", *table(head, rows), ""]
    for strategy, each in found.items():
        lines += folded(f"{strategy}, by task", [*_strips(each), "", *_by_task(each), ""])
    return lines


def _is_layered(profile: Profile) -> bool:
    return any(np.ptp(line) > 0 for line in profile.by_role.values())


def _roles(strategy: str, found: Sequence[Profile]) -> list[tuple[str, ...]]:
    rows = []
    for role in ROLES:
        mean = np.mean([each.by_role[role] for each in found], axis=0)
        agreed = coherence(found, role)
        rows.append(
            (
                strategy,
                role,
                *_parts(mean),
                f"{agreed.same:.2f}" if agreed.n_same else NONE,
                f"{agreed.other:.2f}" if agreed.n_other else NONE,
                f"{agreed.n_same}, {agreed.n_other}",
            )
        )
    return rows


def _parts(line: F64) -> list[str]:
    return [f"{line[part].mean():.2f}" for part in thirds(len(line)).values()]


def _by_task(found: Sequence[Profile]) -> list[str]:
    rows = [
        (each.cell.name, f"{role}: {each.cell.role(role)}", *_parts(each.by_role[role]))
        for each in found
        for role in ROLES
    ]
    return table(("task", "adapter", *thirds(1)), rows)


def _strips(found: Sequence[Profile]) -> list[str]:
    """A sign for each layer, from layer 0 to the left; all on one scale."""
    most = float(max(line.max() for each in found for line in each.by_role.values()))
    width = max(len(plain(each.cell.name)) for each in found)
    lines = ["```text", f"{'':{width}}  {'':8} layer 0 to the last; {BLOCKS[-1]} is {most:.2f}"]
    for each in found:
        for role in ROLES:
            name = plain(each.cell.name).replace("`", "'") if role == ROLES[0] else ""
            lines.append(f"{name:{width}}  {role:8} {_strip(each.by_role[role], most)}")
    return [*lines, "```"]


def _strip(line: F64, most: float) -> str:
    steps = np.clip(line / (most or 1.0) * len(BLOCKS), 0, len(BLOCKS) - 1).astype(int)
    return "".join(BLOCKS[step] for step in steps)
