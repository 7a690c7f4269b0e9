"""Write the tables of docs/evaluation.md out of files of results.

    python benchmarks/report.py benchmarks/results/* -o docs/evaluation.md

The tables stand in place of the line `<!-- results -->` of benchmarks/evaluation.md. Files of one
base, as many adapters and the same options are put together, as far as both say them; others get
sections of their own.
"""

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.errors import StrategyError
from qaflora_edge.evaluation.results import Results, read_results
from qaflora_edge.evaluation.statistics import Estimate, difference
from qaflora_edge.evaluation.table import NATS, NONE, POINTS, SINGLE, STATIC, Cell, estimate, number
from qaflora_edge.weighing.strategy import parse_strategy

BASE = "base"
PROSE = Path(__file__).with_name("evaluation.md")
PLACE = "<!-- results -->"  # the place of the tables in PROSE
# Options that a file does not name where they are these.
UNSAID = {"system": "", "min_weight": 0.0, "adapter_type": "auto"}
ROUNDING = 1e-3  # nats a token
PREFIX_MIN = 3  # characters from which an abbreviation is taken for a name, as med for medical
ROLES = ("domain", "language")
WANTED_POINTS = 5.0  # over static, from which a strategy is called clearly better
BUNDLES_MAX = 2  # that a heading names
BEST = "best single adapter, in hindsight"
SCORES = {POINTS: "Right answers of 100", NATS: "Loss in nats a token, less is better"}
BLOCKS = "▁▂▃▄▅▆▇█"

Row = Mapping[str, Any]


# sections of files that may be compared


@dataclass(frozen=True)
class Section:
    """Cells that may be compared: one base, as many adapters loaded, asked alike."""

    headers: list[Row] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def n_adapter(self) -> int:
        """How many adapters were loaded."""
        return len(self.headers[0]["adapters"])

    def is_alike(self, header: Row) -> bool:
        """Tell whether a file asks the same base in the same way, with adapters of any number.

        Options have to be equal where both files say them, and so have adapters of one name.
        """
        return all(is_asked_alike(each, header) for each in self.headers)

    @property
    def strategies(self) -> list[str]:
        """Every strategy, in the order asked for; the base and single adapters first."""
        every = dict.fromkeys(name for head in self.headers for name in head["strategies"])
        every |= dict.fromkeys(name for cell in self.cells for name in cell.rows)
        return sorted(every, key=lambda name: not (name == BASE or name.startswith(SINGLE)))


def sections(files: Sequence[tuple[str, Results]]) -> list[Section]:
    """Put what may be compared together.

    files  the name of each file, and its results
    """
    found: list[Section] = []
    for shown, results in files:
        section = next((each for each in found if fits(each, results.header)), None)
        if section is None:
            section = Section()
            found.append(section)
        add(section, results, shown)
    for section, other in itertools.permutations(found, 2):
        if all(map(section.is_alike, other.headers)):
            take_alone(section, other)
    return found


def take_alone(section: Section, other: Section) -> None:
    """Copy rows of the base and of single adapters from another section, where a cell has none.

    They are the same whatever else is loaded.
    """
    for cell, same in itertools.product(section.cells, other.cells):
        if cell.task == same.task:
            alone = {BASE, *(f"{SINGLE}{name}" for name in cell.adapters)}
            cell.rows.update(
                {s: rows for s, rows in same.rows.items() if s in alone - cell.rows.keys()}
            )


def is_asked_alike(a: Row, b: Row) -> bool:
    """Compare the bases, options and adapters of two files."""
    files = [{each["name"]: each["sha256"] for each in header["adapters"]} for header in (a, b)]
    return (
        a["base"]["sha256"] == b["base"]["sha256"]
        and agree(UNSAID | a["options"], UNSAID | b["options"])
        and agree(*files)
    )


def agree(a: Row, b: Row) -> bool:
    """Tell whether two dicts are equal in the keys that both have."""
    return all(a[key] == b[key] for key in a.keys() & b.keys())


def fits(section: Section, header: Row) -> bool:
    """Tell whether a file belongs to a section: a task of both is the same, with its adapters.

    What was fitted has to be the same too, where both were asked under it.
    """
    if section.n_adapter != len(header["adapters"]) or not section.is_alike(header):
        return False
    by_name = {cell.name: cell for cell in section.cells}
    shared = [(by_name[task["name"]], task) for task in header["tasks"] if task["name"] in by_name]
    return all(cell.adapters == names(header) and cell.task == task for cell, task in shared) and (
        all(has_same_fits(head, header) for head in section.headers)
    )


def has_same_fits(a: Row, b: Row) -> bool:
    """Compare what was fitted for a task of both, where both were asked under it."""
    if not {task["name"] for task in a["tasks"]} & {task["name"] for task in b["tasks"]}:
        return True
    both = {way.replace(":", ".", 1) for way in {*a["strategies"]} & {*b["strategies"]}}
    ours, theirs = a.get("measured", {}), b.get("measured", {})
    return all(ours[key] == theirs[key] for key in both & ours.keys() & theirs.keys())


def names(header: Row) -> tuple[str, ...]:
    """Names of a file's adapters."""
    return tuple(adapter["name"] for adapter in header["adapters"])


def add(section: Section, results: Results, shown: str) -> None:
    """Add a file to a section. Exits where two files give one item different scores."""
    section.headers.append(results.header)
    by_name = {cell.name: cell for cell in section.cells}
    for task in results.header["tasks"]:
        if task["name"] not in by_name:
            by_name[task["name"]] = Cell(task, names(results.header))
            section.cells.append(by_name[task["name"]])
    for row in results.records:
        rows = by_name[row["task"]].rows.setdefault(row["strategy"], {})
        before, now = rows.setdefault(row["item"], row)["score"], row["score"]
        if before != now and (None in (before, now) or abs(before - now) > ROUNDING):
            raise SystemExit(
                f"Cannot use {shown}: the score of item {row['item']} of {row['task']} under "
                f"{row['strategy']} is {now}, and {before} in a file before it. Leave one out."
            )


# one task


@dataclass(frozen=True)
class Line:
    """One strategy in one cell.

    score        in the cell's unit
    over_static, over_single  how much better than static and than the best single adapter
    seconds      of an item: medians of the probe, and of what comes after it
    probe_ms     median over the items where no other strategy had probed before
    prefills     what the probe takes, in prefills of the prompt; NaN where nothing is generated
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
    prefills: float
    found: float | None
    others: Mapping[str, float]
    n_cut: int
    n_failed: int


@dataclass(frozen=True)
class CellSummary:
    """One task: a line for each strategy, and the best single adapter in hindsight."""

    cell: Cell
    best_single: str | None
    lines: tuple[Line, ...]


def summarise_cell(cell: Cell, order: Sequence[str]) -> CellSummary:
    """Make a line for each strategy of a cell."""
    best = cell.best_single()
    return CellSummary(cell, best, tuple(line_of(cell, name, best) for name in order))


def line_of(cell: Cell, strategy: str, best: str | None) -> Line:
    """Collect what the tables say of one strategy in one cell."""
    rows = list(cell.rows[strategy].values())
    scored = [row for row in rows if row["score"] is not None]
    probe_ms = median([r["probe_ms"] for r in scored if not r.get("probe_before_ms")])
    is_generated = cell.task["metric"] not in ("choice", "loss")
    prefill_ms = median([row["prefill_ms"] for row in scored]) if is_generated else math.nan
    others = {
        name: cell.factor * float(np.mean([row[key] for row in scored]))
        for name, key in (("by sum", "score_sum"), ("by mean", "score_mean"))
        if scored and all(isinstance(row.get(key), int | float) for row in scored)
    }
    return Line(
        strategy=strategy,
        score=cell.score(strategy),
        over_static=cell.gain(strategy, STATIC),
        over_single=cell.gain(strategy, best),
        seconds=(probe_ms + median([r["prefill_ms"] + r["decode_ms"] for r in scored])) / 1000,
        probe_ms=probe_ms,
        prefills=probe_ms / prefill_ms if prefill_ms > 0 else math.nan,
        found=found_share(cell, strategy),
        others=others,
        n_cut=sum(row.get("finish_reason") == "length" for row in rows),
        n_failed=len(rows) - len(scored),
    )


def median(values: Sequence[float]) -> float:
    """Median; NaN of nothing."""
    return float(np.median(values)) if values else math.nan


def role(cell: Cell, what: str) -> str | None:
    """Find the adapter that is named like the task's language or domain, if just one is.

    what  "language" or "domain"
    """
    wanted = cell.task.get(what)
    found = [each for each in cell.adapters if isinstance(wanted, str) and is_named(each, wanted)]
    return found[0] if len(found) == 1 else None


def is_named(adapter: str, wanted: str) -> bool:
    """Tell whether an adapter is named like a language or a domain, as `es-r64` and `es` are."""
    name, wanted = re.split(r"[^a-z0-9]", adapter.lower())[0], wanted.lower()
    short, long = sorted((name, wanted), key=len)
    return short == long or (len(short) >= PREFIX_MIN and long.startswith(short))


def found_share(cell: Cell, strategy: str) -> float | None:
    """Share of items with those of the task's language and domain as the two heaviest adapters.

    By the mean over layers; of weights that are equal none is heaviest. None where the task does
    not name both, no others are loaded, or the strategy does not look at the query.
    """
    right = {role(cell, "language"), role(cell, "domain")}
    if not looks(strategy, cell.adapters) or None in right or len(right) < 2:
        return None
    weighed = [weights for row in cell.rows[strategy].values() if (weights := row["weights"])]
    if len(cell.adapters) <= 2 or not weighed:
        return None
    leads = (
        min(weights[str(name)] for name in right)
        > max(weight for name, weight in weights.items() if name not in right)
        for weights in weighed
    )
    return sum(leads) / len(weighed)


def looks(strategy: str, adapters: Sequence[str]) -> bool:
    """Tell whether weights differ from query to query; those of other tools may."""
    if strategy.startswith("fitted:"):
        return False
    try:
        return parse_strategy(strategy, adapters).strategy.is_probed
    except StrategyError:
        return True


# all tasks of a section


@dataclass(frozen=True)
class Verdict:
    """One strategy over all cells of one unit that have it.

    over_static  mean of the cells' means; None where no cell has static
    worst        the cell with the lowest difference to its best single adapter, and that
                 difference; its interval does not know that the cell was chosen for being worst
    below        cells whose whole interval against the best single adapter is below 0
    """

    strategy: str
    unit: str
    n_cell: int
    over_static: Estimate | None
    worst: tuple[str, Estimate] | None
    below: tuple[str, ...]

    @property
    def is_shown(self) -> bool:
        """At least 5 points over static, and in no cell worse than the best single adapter."""
        over = self.over_static
        is_clear = over is not None and over.value >= WANTED_POINTS and over.low > 0
        return self.unit == POINTS and is_clear and self.worst is not None and not self.below


@dataclass(frozen=True)
class Loaded:
    """One strategy among more adapters, against itself among fewer.

    gain    how much better it is with more: mean of the tasks' means
    worst   the task with the lowest difference, and that difference
    """

    strategy: str
    unit: str
    n_cell: int
    gain: Estimate
    worst: tuple[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """One section: its cells, and the verdicts over them.

    fewer   the same tasks with the fewest adapters loaded, where there is such a section
    loaded  each strategy against itself there
    """

    section: Section
    cells: tuple[CellSummary, ...]
    verdicts: tuple[Verdict, ...]
    fewer: Section | None
    loaded: tuple[Loaded, ...]


def summarise(files: Sequence[tuple[str, Results]]) -> list[Summary]:
    """Make a summary of each section.

    files  the name of each file, and its results
    """
    every = sections(files)
    return [summary_of(section, fewer_than(section, every)) for section in every]


def fewer_than(section: Section, every: Sequence[Section]) -> Section | None:
    """Find the section with the fewest adapters, fewer than here, that may be compared."""
    found = [
        each
        for each in every
        if each.n_adapter < section.n_adapter and all(map(section.is_alike, each.headers))
        if any(loaded_of(section, each))
    ]
    return min(found, key=lambda each: each.n_adapter, default=None)


def summary_of(section: Section, fewer: Section | None) -> Summary:
    """Summarise a section."""
    order = section.strategies
    orders = [[name for name in order if name in cell.rows] for cell in section.cells]
    return Summary(
        section,
        tuple(map(summarise_cell, section.cells, orders)),
        tuple(
            verdict_of(strategy, unit, section.cells)
            for unit in (POINTS, NATS)
            for strategy in order
            if strategy != STATIC and not strategy.startswith(SINGLE)
            if any(cell.unit == unit and strategy in cell.rows for cell in section.cells)
        ),
        fewer,
        tuple(loaded_of(section, fewer)) if fewer else (),
    )


def loaded_of(section: Section, fewer: Section) -> Iterator[Loaded]:
    """Compare each strategy with itself where fewer adapters are loaded, by item."""
    both = [
        (cell, each) for cell in section.cells for each in fewer.cells if each.task == cell.task
    ]
    for unit, strategy in itertools.product((POINTS, NATS), section.strategies):
        gains = {
            cell.name: values
            for cell, other in both
            if cell.unit == unit and len(values := cell.gains(strategy, strategy, other))
        }
        # The base and one adapter alone are the same whatever else is loaded.
        if not gains or strategy == BASE or strategy.startswith(SINGLE):
            continue
        each = {name: mean_gain([values], unit) for name, values in gains.items()}
        yield Loaded(
            strategy,
            unit,
            len(gains),
            mean_gain(list(gains.values()), unit),
            min(each.items(), key=lambda item: item[1].value),
        )


def mean_gain(gains: Sequence[Any], unit: str) -> Estimate:
    """Average differences of scores as they were written, in the unit."""
    factor = 1.0 if unit == NATS else 100.0
    return difference(gains, is_right=unit == POINTS).times(factor)


def verdict_of(strategy: str, unit: str, cells: Sequence[Cell]) -> Verdict:
    """Judge a strategy over all cells of one unit."""
    cells = [cell for cell in cells if cell.unit == unit and strategy in cell.rows]
    against = {
        cell.name: found for cell in cells if (found := cell.gain(strategy, cell.best_single()))
    }
    gains = [values for cell in cells if len(values := cell.gains(strategy, STATIC))]
    return Verdict(
        strategy,
        unit,
        len(cells),
        mean_gain(gains, unit) if gains and strategy != STATIC else None,
        min(against.items(), key=lambda item: item[1].value, default=None),
        tuple(name for name, found in against.items() if found.high < 0),
    )


# Markdown

MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#&~$"})


def plain(text: object) -> str:
    """Write a text on one line."""
    return " ".join(str(text).split())


def escaped(text: object) -> str:
    """Write a text on one line in which nothing is a mark of Markdown or HTML."""
    return plain(text).translate(MARKS)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Set[tuple[int, int]] = frozenset()
) -> list[str]:
    """Write a table: the first column to the left, others to the right.

    bold  row and column of cells that stand out
    """
    lines = [
        [
            f"**{escaped(cell)}**" if (row, column) in bold else escaped(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(rows)
    ]
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in ([*map(escaped, head)], rule, *lines)]


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """Write lines below a text that opens and closes them."""
    head = ["<details>", f"<summary>{escape(plain(title))}</summary>", ""]
    return [*head, *lines, "</details>", ""]


def figure(value: float | None, digits: int) -> str:
    """Write a number; `-` where there is none."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


def gain_text(found: Estimate | None, unit: str) -> str:
    """Write a difference with its interval."""
    return estimate(found, unit, is_difference=True)


def page(summaries: Sequence[Summary], prose: str) -> str:
    """Put the tables in the place of prose that has a line for them."""
    shown = "\n".join(line for each in summaries for line in section_lines(each)).rstrip()
    before, place, after = prose.partition(PLACE)
    return f"{before}{shown}{after}" if place else f"{prose.rstrip()}\n\n{shown}\n"


def section_lines(summary: Summary) -> list[str]:
    """Write a section."""
    lines = [f"## {escaped(heading(summary.section))}", "", *fact_lines(summary.section)]
    for unit in (POINTS, NATS):
        cells = [cell for cell in summary.cells if cell.cell.unit == unit]
        if cells:
            lines += score_lines(cells, unit, summary.section.strategies)
        if verdicts := [each for each in summary.verdicts if each.unit == unit]:
            lines += verdict_lines(verdicts, unit)
    lines += loaded_lines(summary)
    lines += cost_lines(summary)
    lines += layer_lines(summary)
    each = [line for cell in summary.cells for line in cell_lines(cell)]
    return [*lines, *folded("Each task, with intervals and what it takes", each)]


def heading(section: Section) -> str:
    """Name the base, the adapters loaded and the bundles of a section in one line."""
    bases = dict.fromkeys(plain(head["base"]["name"]) for head in section.headers)
    bundles = dict.fromkeys(plain(head["bundle"]) for head in section.headers)
    of = f"{', '.join(bundles)}: " if len(bundles) <= BUNDLES_MAX else ""
    loaded = dict.fromkeys(", ".join(map(plain, cell.adapters)) for cell in section.cells)
    shown = next(iter(loaded)) if len(loaded) == 1 else "other ones for other tasks"
    count = f"{section.n_adapter} adapter{'s' * (section.n_adapter != 1)} loaded"
    return f"{of}{', '.join(bases)}, {count}{f': {shown}' if section.n_adapter else ''}"


def fact_lines(section: Section) -> list[str]:
    """Say how a section's files were made: each fact once where it is equal."""
    heads = section.headers

    def adapters(head: Row) -> str:
        each = (f"{a['name']} ({a['bytes'] / 1e6:.1f} MB)" for a in head["adapters"])
        return ", ".join(each) or "none"

    def options(head: Row) -> str:
        pairs = head["options"].items()
        shown = (
            (k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in pairs
        )
        return ", ".join(f"{key} {value}" for key, value in shown)

    found = {
        "bundle": [head["bundle"] for head in heads],
        "base": [f"{head['base']['name']}, SHA-256 {head['base']['sha256']}" for head in heads],
        "adapters": [adapters(head) for head in heads],
        "options": [options(head) for head in heads],
        "version": [head["version"] for head in heads],
        "machine": [head["machine"] for head in heads],
        "code was kept from": [
            ", ".join(map(str, row["isolated"])) or "nothing"
            for cell in section.cells
            for rows in cell.rows.values()
            for row in rows.values()
            if isinstance(row.get("isolated"), list)
        ],
    }
    rows = [(name, "; ".join(dict.fromkeys(values))) for name, values in found.items() if values]
    return [*table(("how it was run", ""), rows), ""]


def score_lines(cells: Sequence[CellSummary], unit: str, strategies: Sequence[str]) -> list[str]:
    """Write the scores of cells of one unit; strategies that none of them has are left out."""
    best = [best_score(cell) for cell in cells]
    rows: list[Sequence[str]] = []
    bold = set()
    for strategy in (*strategies, BEST):
        values = [score_of(cell, strategy) for cell in cells]
        if np.isnan(values).all():
            continue
        bold |= {
            (len(rows), at)
            for at, pair in enumerate(zip(values, best, strict=True), 1)
            if pair[0] == pair[1]
        }
        shown = (number(value, unit) for value in (*values, float(np.mean(values))))
        rows.append((strategy, *shown))
    rows.append(("items", *map(items_of, cells), ""))
    head = ("", *(cell.cell.name for cell in cells), "mean")
    return [f"### {SCORES[unit]}", "", *table(head, rows, bold=bold), ""]


def score_of(found: CellSummary, strategy: str) -> float:
    """Give a strategy's score; NaN where the cell does not have the strategy."""
    wanted = found.best_single if strategy == BEST else strategy
    return next((each.score.value for each in found.lines if each.strategy == wanted), math.nan)


def best_score(found: CellSummary) -> float:
    """Give the best score of a cell."""
    scores = [line.score.value for line in found.lines if not math.isnan(line.score.value)]
    return (min if found.cell.unit == NATS else max)(scores, default=math.nan)


def items_of(cell: CellSummary) -> str:
    """Count the items that the strategies have a score for, as in `250` or `12 to 250`."""
    counts = sorted({line.score.n_item for line in cell.lines})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)


def verdict_lines(verdicts: Sequence[Verdict], unit: str) -> list[str]:
    """Write the verdicts over all tasks of a unit."""
    head = ["", "tasks", "over static", "worst over its best single adapter", "in", "worse in"]
    if unit == POINTS:
        head.append("5 points over static, and nowhere worse")
    rows = []
    for each in verdicts:
        name, worst = each.worst or (NONE, None)
        row = [each.strategy, str(each.n_cell), gain_text(each.over_static, unit)]
        row += [gain_text(worst, unit), plain(name), ", ".join(map(plain, each.below)) or "none"]
        rows.append(row + ["yes" if each.is_shown else "no"] * (unit == POINTS))
    title = f"Over all tasks in {unit}, each of which counts the same:"
    return [title, "", *table(head, rows), ""]


def loaded_lines(summary: Summary) -> list[str]:
    """Write what it changes that more adapters are loaded, where that is known."""
    if summary.fewer is None:
        return []
    rows = [
        (
            each.strategy,
            str(each.n_cell),
            f"{gain_text(each.gain, each.unit)} {each.unit}",
            gain_text(each.worst[1], each.unit),
            each.worst[0],
        )
        for each in summary.loaded
    ]
    title = f"### Against the same tasks with {summary.fewer.n_adapter} adapters loaded"
    return [title, "", *table(("", "tasks", "better by", "worst", "in"), rows), ""]


def cost_lines(summary: Summary) -> list[str]:
    """Write medians over tasks of what an item takes under each strategy."""
    rows = []
    for strategy in summary.section.strategies:
        lines = [line for cell in summary.cells for line in cell.lines if line.strategy == strategy]
        rows.append(
            (
                strategy,
                over(np.median, (line.seconds for line in lines), 2),
                over(np.median, (line.probe_ms for line in lines), 0),
                over(np.median, (line.prefills for line in lines), 1),
                over(np.mean, (line.found for line in lines), 2),
                str(sum(line.n_cut for line in lines)),
                str(sum(line.n_failed for line in lines)),
            )
        )
    head = ("", "seconds", "probe ms", "prefills", "found", "cut", "failed")
    return ["### What it takes, and what failed", "", *table(head, rows), ""]


def over(mean: Callable[[list[float]], Any], values: Iterable[float | None], digits: int) -> str:
    """Average the values that are there, as text."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return figure(float(mean(known)) if known else None, digits)


def cell_lines(found: CellSummary) -> list[str]:
    """Write one task."""
    unit = found.cell.unit
    best = f"over {found.best_single}" if found.best_single else "over the best single adapter"
    others = list(dict.fromkeys(name for line in found.lines for name in line.others))
    head = ("", f"score, {unit}", "over static", best, *others, "seconds", "found", "cut", "failed")
    rows = [
        (
            line.strategy,
            estimate(line.score, unit),
            gain_text(line.over_static, unit),
            gain_text(line.over_single, unit),
            *(number(line.others.get(name, math.nan), unit) for name in others),
            figure(line.seconds, 2),
            figure(line.found, 2),
            str(line.n_cut),
            str(line.n_failed),
        )
        for line in found.lines
    ]
    kind = "loss" if unit == NATS else str(found.cell.task["metric"])
    name = f"{escaped(found.cell.name)} ({kind}, {items_of(found)} items)"
    return [f"**{name}**", "", *table(head, rows), ""]


# weights by layer

WORDS = (
    "Means over tasks of what the adapter of the task's domain, and that of its language, weigh in "
    "a part of the layers; and the correlation over layers of these weights in two tasks: of the "
    "same domain (or language), and of different ones."
)


@dataclass(frozen=True)
class Profile:
    """The mean weights by layer of the adapters that a task names.

    by_role  "domain", "language" -> float64 [n_layer]
    """

    cell: Cell
    by_role: Mapping[str, Any]


def profiles(cells: Sequence[Cell], strategy: str) -> list[Profile]:
    """Find profiles of the cells that name a language and a domain with loaded adapters.

    Those that weigh all layers alike are left out.
    """
    found = []
    for cell in cells:
        layers = [
            row["layers"] for row in cell.rows.get(strategy, {}).values() if row.get("layers")
        ]
        adapters = {each: role(cell, each) for each in ROLES}
        if not layers or None in adapters.values():
            continue
        mean = np.mean(np.array(layers, np.float64), axis=0)  # [n_adapter, n_layer]
        lines = {each: mean[cell.adapters.index(str(name))] for each, name in adapters.items()}
        if any(np.ptp(line) > 0 for line in lines.values()):
            found.append(Profile(cell, lines))
    return found


def thirds(n_layer: int) -> dict[str, slice]:
    """Name the parts of a model that profiles are told by."""
    first, second = round(n_layer / 3), round(2 * n_layer / 3)
    return {
        "first third": slice(0, first),
        "middle third": slice(first, second),
        "last third": slice(second, n_layer),
        "last layer": slice(n_layer - 1, n_layer),
    }


def coherence(found: Sequence[Profile], what: str) -> tuple[str, str, str]:
    """Correlate the profiles of one role in every two cells.

    returns  mean correlation of one adapter's weights in two tasks, of two adapters', and how many
             pairs there are of both; constant profiles say nothing
    """
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for a, b in itertools.combinations(found, 2):
        lines = a.by_role[what], b.by_role[what]
        if all(np.ptp(line) > 0 for line in lines):
            is_same = role(a.cell, what) == role(b.cell, what)
            pairs[is_same].append(float(np.corrcoef(*lines)[0, 1]))
    same, other = (figure(float(np.mean(v)), 2) if v else NONE for v in pairs.values())
    return same, other, f"{len(pairs[True])}, {len(pairs[False])}"


def layer_lines(summary: Summary) -> list[str]:
    """Write a table of all strategies that weigh layers differently, then each by task, folded."""
    cells = [cell.cell for cell in summary.cells]
    found = {
        strategy: kept
        for strategy in summary.section.strategies
        if strategy not in (BASE, STATIC) and not strategy.startswith(SINGLE)
        if (kept := profiles(cells, strategy))
    }
    if not found:
        return []
    rows = []
    for strategy, each in found.items():
        for what in ROLES:
            mean = np.mean([profile.by_role[what] for profile in each], axis=0)
            rows.append((strategy, what, *parts_of(mean), *coherence(each, what)))
    head = ("", "adapter of the", *thirds(1), "same", "different", "pairs")
    lines = ["### Weights by layer", "", WORDS, "", *table(head, rows), ""]
    for strategy, each in found.items():
        lines += folded(f"{strategy}, by task", [*strips(each), "", *by_task(each), ""])
    return lines


def parts_of(line: Any) -> list[str]:
    """Average weights [n_layer] over each part of the model."""
    return [f"{line[part].mean():.2f}" for part in thirds(len(line)).values()]


def by_task(found: Sequence[Profile]) -> list[str]:
    """Write the profiles of each task as a table."""
    rows = [
        (each.cell.name, f"{what}: {role(each.cell, what)}", *parts_of(each.by_role[what]))
        for each in found
        for what in ROLES
    ]
    return table(("task", "adapter", *thirds(1)), rows)


def strips(found: Sequence[Profile]) -> list[str]:
    """Draw a sign for each layer, from layer 0 to the left; all on one scale."""
    most = float(max(line.max() for each in found for line in each.by_role.values()))
    width = max(len(each.cell.name) for each in found)
    lines = ["```text", f"{'':{width}}  {'':8} layer 0 to the last; {BLOCKS[-1]} is {most:.2f}"]
    for each, what in itertools.product(found, ROLES):
        name = each.cell.name if what == ROLES[0] else ""
        steps = np.clip(each.by_role[what] / (most or 1.0) * len(BLOCKS), 0, len(BLOCKS) - 1)
        strip = "".join(BLOCKS[step] for step in steps.astype(int))
        lines.append(f"{name:{width}}  {what:8} {strip}")
    return [*lines, "```"]


def main(words: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--prose", type=Path, default=PROSE)
    args = parser.parse_args(words)
    files = sorted(args.results, key=lambda path: path.name)
    found = summarise([(str(path), read_results(path)) for path in files])
    args.out.write_text(page(found, args.prose.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
