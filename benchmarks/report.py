"""Write docs/results.md, the charts of docs/ and benchmarks/results/tables.md from stored results.

    python benchmarks/report.py          into this checkout (`make eval-report`)
    python benchmarks/report.py -o DIR   into another folder

docs/results.md is benchmarks/results.md with a figure or table in place of each `{name: words}`;
`FIGURES` has the names. Results are those of benchmarks/results/; speeds are in performance.json.
"""

import argparse
import gzip
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import charts
import numpy as np
from one_reading import Report, interval

from qaflora_edge.evaluation.table import (
    NATS,
    NONE,
    POINTS,
    SINGLE,
    STATIC,
    Cell,
    Estimate,
    difference,
    estimate,
    mean,
    number,
)
from qaflora_edge.evaluation.table import gain as gain_over
from qaflora_edge.evaluation.tasks import Results

HERE = Path(__file__).resolve().parent
BASE, SUBJECT, BEST = "base", "subject", "best single adapter, in hindsight"
# The beginning of a file's name -> the set that it belongs to; of several the longest counts.
SETS = {
    **{name: name for name in ("demo", "grid", "pair", "shipped", "six", "taught", "told")},
    **{name: name for name in ("twenty", "wide", "xl", "xl-six")},
    **{"shipped-mix": "shipped mix", "own": "taught", "own-anew": "anew"},
    **{"taught-anew": "anew", "taught-pair": "taught pair"},
    **{"pair-medical-text": "pair text", "refresh": "six", "refresh-two": "taught"},
}
# The adapter of a subject, whichever of them is loaded.
ADAPTERS = {
    **{"math": ("math",), "code": ("coder", "code"), "medical": ("medicine", "med")},
    **{"company": ("company",), "json": ("json",), "company_json": ("company",)},
}
LANGUAGES = {"es": "Spanish", "ru": "Russian", "zh": "Chinese"}
TITLES = {"math": "maths", "code": "code", "medical": "medicine"}
# Of the set MAIN: what is in the table and the charts.
SHOP = {"math": "maths", "company": "facts", "json": "orders", "company_json": "facts as JSON"}
CELLS = [f"{subject}_{language}" for subject in ADAPTERS for language in LANGUAGES]
NINE = [cell for cell in CELLS if cell.partition("_")[0] in TITLES]
# Part of a set -> the set, and which items of a cell, by subject.
PARTS = {
    "anew first": ("anew", {"math": (0, 16), "code": (0, 10), "medical": (0, 48)}),
}
CHATS = (*TITLES, "chat", "system")  # cells of one_reading.py
ROUNDING = 1e-3  # nats a token

Row = Mapping[str, Any]


# sets of results


@dataclass(frozen=True)
class Set:
    """Results that may be compared: one base, the same adapters, asked alike."""

    name: str
    headers: list[Row] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """SHA-256 of the base."""
        return str(self.headers[0]["base"]["sha256"])

    @property
    def hashes(self) -> dict[str, str]:
        """Adapter -> SHA-256."""
        return {each["name"]: each["sha256"] for head in self.headers for each in head["adapters"]}

    @property
    def strategies(self) -> list[str]:
        """Every strategy; the base and single adapters first."""
        every = dict.fromkeys(name for cell in self.cells.values() for name in cell.rows)
        return sorted(every, key=lambda name: (name != BASE, not name.startswith(SINGLE), name))

    def add(self, results: Results, file: str) -> None:
        """Add a file. Exits where it is of another base, or gives an item another score."""
        self.headers.append(results.header)
        if results.header["base"]["sha256"] != self.base:
            raise SystemExit(f"Cannot use {file}: its base is not that of the set {self.name}.")
        adapters = [adapter["name"] for adapter in results.header["adapters"]]
        for task in results.header["tasks"]:
            cell = self.cells.setdefault(task["name"], Cell(task, adapters))
            if cell.task != task:
                raise SystemExit(f"Cannot use {file}: {task['name']} is not asked as before.")
        for row in results.records.values():
            rows = self.cells[row["task"]].rows.setdefault(row["strategy"], {})
            before, now = rows.setdefault(row["item"], row)["score"], row["score"]
            if before != now and (None in (before, now) or abs(before - now) > ROUNDING):
                raise SystemExit(
                    f"Cannot use {file}: the score of item {row['item']} of {row['task']} under "
                    f"{row['strategy']} is {now}, and {before} in a file before it."
                )


def read_sets(folder: Path) -> dict[str, Set]:
    """Read every file of results: name of the set -> set."""
    found: dict[str, Set] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        beginning = max((each for each in SETS if path.name.startswith(f"{each}-")), key=len)
        name = SETS[beginning]
        with gzip.open(path) as file:
            header, *records = map(json.loads, file)
        found.setdefault(name, Set(name)).add(Results(header, records), path.name)
    for one, other in itertools.permutations(list(found.values()), 2):
        borrow(one, other)
    for name, (of, items) in PARTS.items():
        whole = found[of]
        found[name] = Set(name, whole.headers, {key: part(whole.cells[key], items) for key in NINE})
    return found


def borrow(one: Set, other: Set) -> None:
    """Copy rows of the base and of single adapters where a cell has fewer or none.

    They are the same whatever else is loaded.
    """
    same = {f"{SINGLE}{name}" for name, _ in one.hashes.items() & other.hashes.items()} | {BASE}
    for name in one.cells.keys() & other.cells.keys() if one.base == other.base else ():
        mine, theirs = one.cells[name], other.cells[name]
        alone = {BASE, *(f"{SINGLE}{each}" for each in mine.adapters)} & same
        for strategy in alone & theirs.rows.keys() if mine.task == theirs.task else ():
            mine.rows[strategy] = {**theirs.rows[strategy], **mine.rows.get(strategy, {})}


def part(cell: Cell, items: Mapping[str, tuple[int, int | None]]) -> Cell:
    """Keep some of the items, by their place among those that two-place was asked."""
    begin, end = items[subject_of(cell)]
    return only(cell, set(sorted(cell.rows["two-place"])[begin:end]))


def only(cell: Cell, items: set[int]) -> Cell:
    """Keep some of the items."""
    rows = {
        strategy: {item: row for item, row in found.items() if item in items}
        for strategy, found in cell.rows.items()
    }
    return Cell(cell.task, cell.adapters, rows)


def shared(cell: Cell, strategies: Iterable[str]) -> Cell:
    """Keep the items that all of these strategies have a score for."""
    return only(cell, set.intersection(*(set(cell.scored(named(cell, s))) for s in strategies)))


def subject_of(cell: Cell) -> str:
    """Name the subject of a cell: its name without the language."""
    return str(cell.task["name"]).rpartition("_")[0]


def named(cell: Cell, strategy: str) -> str:
    """Resolve `subject` to the adapter of the cell's subject alone."""
    if strategy != SUBJECT:
        return strategy
    return next(f"{SINGLE}{name}" for name in ADAPTERS[subject_of(cell)] if name in cell.adapters)


# figures


class Figures:
    """Figures of sets over their cells; every cell counts the same."""

    def __init__(self, sets: Mapping[str, Set]) -> None:
        self.sets = sets

    def cells(self, name: str, strategies: Sequence[str], subject: str = "") -> list[Cell]:
        """Find the cells that have all the strategies, with the items that all of them have.

        name     of a set, or of several with a plus between
        subject  the name of a cell, or the beginning of those of the nine
        """
        found = [
            cell
            for each in name.split("+")
            for key, cell in self.sets[each].cells.items()
            if key == subject or (key in CELLS and subject in ("", key.rpartition("_")[0]))
            if all(cell.scored(named(cell, strategy)) for strategy in strategies)
        ]
        if not found:
            raise SystemExit(f"The set {name} has no cell {subject} with {strategies}.")
        return [shared(cell, strategies) for cell in found]

    def over(self, name: str, one: str, other: str, subject: str = "") -> Estimate:
        """Average how much of 1 a strategy is ahead of another one."""
        cells = self.cells(name, (one, other), subject)
        gains = [cell.gains(named(cell, one), named(cell, other)) for cell in cells]
        return difference(gains, is_right=True)

    def points(self, cells: Sequence[Cell], strategy: str) -> Estimate:
        """Average the share of right answers."""
        return mean([cell.scores(named(cell, strategy)) for cell in cells])

    def right(self, cells: Sequence[Cell], strategy: str) -> tuple[int, int]:
        """Count right answers, and questions."""
        scores = np.concatenate([cell.scores(named(cell, strategy)) for cell in cells])
        return round(float(scores.sum())), len(scores)

    def prefills(self, cells: Sequence[Cell], strategy: str) -> float:
        """Give what weighing takes, in prefills of the prompt: the median over generating tasks."""
        found = [prefills(cell, strategy) for cell in cells if cell.task["metric"] != "choice"]
        return median(found)


def median(values: Iterable[float]) -> float:
    """Give the median of the numbers; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def answered(cell: Cell, strategy: str) -> list[Row]:
    """List the records that have a score."""
    return [cell.rows[strategy][item] for item in cell.scored(strategy)]


def probe_ms(cell: Cell, strategy: str) -> float:
    """Give the median over the items where no other strategy had probed before."""
    rows = answered(cell, strategy)
    return median(row["probe_ms"] for row in rows if not row.get("probe_before_ms"))


def prefills(cell: Cell, strategy: str) -> float:
    """Give what weighing takes, in prefills of the prompt."""
    prefill_ms = median(row["prefill_ms"] for row in answered(cell, strategy))
    return probe_ms(cell, strategy) / prefill_ms if prefill_ms > 0 else math.nan


# Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table: the first column to the left, others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def gain(found: Estimate | None, unit: str = POINTS) -> str:
    """Write a difference with its interval."""
    return estimate(found, unit, is_difference=True)


def figure(value: float, digits: int) -> str:
    """Write a number; `-` where there is none."""
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


MAIN = "demo"  # the set of the first table and of the charts
RIVALS = (BASE, SUBJECT, STATIC, "qa-flora", "two-place")
SHOWN = {SUBJECT: "subject's adapter alone"}
ROWS = {
    "demo": "the six of `models/demo-small/`, twelve cells",
    "shipped": "earlier ones of rank 5, nine cells",
    "taught": "six of rank 16, nine cells",
    "twenty": "twenty adapters, nine cells",
    "xl": "1.5B base, four adapters, maths",
    "xl-six": "1.5B base, also with `company` and `json`, maths",
}


def cells_table(figures: Figures) -> str:
    """Compare strategies with six adapters loaded, by subject."""
    rows = []
    for strategy in RIVALS:
        cells = figures.cells(MAIN, RIVALS)
        by_subject = [
            "{} of {}".format(*figures.right(figures.cells(MAIN, RIVALS, subject), strategy))
            for subject in SHOP
        ]
        score = number(figures.points(cells, strategy).value, POINTS)
        ahead = NONE if strategy == STATIC else gain(figures.over(MAIN, strategy, STATIC))
        rows.append((SHOWN.get(strategy, f"`{strategy}`"), *by_subject, score, ahead))
    head = ("", *SHOP.values(), "of 100, mean of twelve", "ahead of `static`")
    return table(head, rows)


def sets_table(figures: Figures) -> str:
    """Compare strategies in each set, on the questions that all of them were asked."""
    rows = []
    for name, title in ROWS.items():
        cells = figures.cells(name, RIVALS)
        scores = [number(figures.points(cells, each).value, POINTS) for each in RIVALS]
        n_item = figures.right(cells, "two-place")[1]
        gains = [cell.gains("two-place", STATIC) for cell in cells]
        ahead = gain(difference(gains, is_right=True))
        rows.append((title, str(n_item), *scores, ahead))
    shown = [SHOWN.get(each, f"`{each}`") for each in RIVALS]
    return table(("", "questions", *shown, "`two-place` ahead of `static`"), rows)


@cache
def read_report() -> Report:
    """Read the results of one_reading.py."""
    with gzip.open(HERE / "results" / "one-reading" / "results.jsonl.gz") as file:
        return Report(line for line in map(json.loads, file) if "score" in line)


def read_gains(subject: str, half: str, reading: str, strategy: str = "two-place") -> np.ndarray:
    """Give what a reading gains over the mix's, in points: [n_item]."""
    score = read_report().table(subject, half, [strategy], reading)["score"]
    return np.asarray(score[1] - score[0])


def read(gains: Sequence[np.ndarray], digits: int = 1) -> str:
    """Write the mean over groups with its interval."""
    value, low, high = (f"{each:+.{digits}f}" for each in interval(gains))
    return f"{value} ({low} to {high})"


def read_mean(_: Figures, reading: str, half: str, strategy: str = "two-place") -> str:
    """Write the mean over all chats' rows."""
    return read([read_gains(each, half, reading, strategy) for each in CHATS])


def rights(figures: Figures, name: str, one: str, other: str, subject: str = "") -> str:
    """Count the right answers of two strategies, as in `12 and 15 of 30`."""
    cells = figures.cells(name, (one, other), subject)
    n_right, n_item = figures.right(cells, one)
    return f"{n_right} and {figures.right(cells, other)[0]} of {n_item}"


def points_of(figures: Figures, name: str, strategy: str) -> str:
    """Write how many of 100 a strategy has right, on what all rivals were asked."""
    return number(figures.points(figures.cells(name, RIVALS), strategy).value, POINTS)


FIGURES: dict[str, Callable[..., str]] = {
    "over": lambda figures, *words: gain(figures.over(*words)),
    "points": points_of,
    "right": rights,
    "cells": cells_table,
    "sets": sets_table,
    "readings": read_mean,
}


def page(prose: str, figures: Figures) -> str:
    """Put figures in their places in the prose."""

    def found(match: re.Match[str]) -> str:
        words = [word.strip() for word in match[2].split(";") if word.strip()]
        return FIGURES[match[1]](figures, *words)

    return re.sub(rf"\{{({'|'.join(FIGURES)}):([^}}]*)\}}", found, prose)


# tables of everything


def tables(sets: Iterable[Set]) -> str:
    """Write every set: how it was run, scores, costs, and each task with intervals."""
    lines = ["# All results", "", "Made by `make eval-report`; edit nothing here.", ""]
    for each in sets:
        lines += [f"## {each.name}", "", facts(each), ""]
        for unit, title in (
            (POINTS, "Right answers of 100"),
            (NATS, "Nats a token, less is better"),
        ):
            cells = [cell for cell in each.cells.values() if cell.unit == unit]
            if cells:
                lines += [f"### {title}", "", scores(cells, each.strategies), ""]
                lines += [details(cells, each.strategies), ""]
        lines += ["### What it takes", "", what_it_takes(each), ""]
    return "\n".join(lines)


def facts(found: Set) -> str:
    """Say how a set was made: each fact once."""
    heads = found.headers
    rows = {
        "bundle": [str(head["bundle"]) for head in heads],
        "base": [f"{head['base']['name']}, SHA-256 {head['base']['sha256']}" for head in heads],
        "adapters": [", ".join(each["name"] for each in head["adapters"]) for head in heads],
        "options": [json.dumps(head["options"], ensure_ascii=False) for head in heads],
        "machine": [str(head["machine"]) for head in heads],
    }
    each = ((name, "; ".join(dict.fromkeys(values))) for name, values in rows.items())
    return table(("how it was run", ""), each)


def scores(cells: Sequence[Cell], strategies: Sequence[str]) -> str:
    """Write the mean score of each strategy in each cell."""
    rows = []
    for strategy in (*strategies, BEST):
        of = [cell.best_single() if strategy == BEST else strategy for cell in cells]
        values = [
            mean([cell.scores(each)]).value if cell.scored(each) else math.nan
            for cell, each in zip(cells, of, strict=True)
        ]
        if not all(map(math.isnan, values)):
            shown = (number(value, cells[0].unit) for value in (*values, float(np.mean(values))))
            rows.append((strategy, *shown))
    return table(("", *(cell.task["name"] for cell in cells), "mean"), rows)


def details(cells: Sequence[Cell], strategies: Sequence[str]) -> str:
    """Write each task under each strategy, with intervals."""
    head = ("task", "strategy", "items", "score", "over static", "over the best single adapter")
    rows = [
        (
            cell.task["name"],
            strategy,
            str(len(cell.scored(strategy))),
            estimate(mean([cell.scores(strategy)]), cell.unit),
            gain(gain_over([cell], strategy, [STATIC]), cell.unit),
            gain(gain_over([cell], strategy, [cell.best_single()]), cell.unit),
        )
        for cell in cells
        for strategy in strategies
        if cell.scored(strategy)
    ]
    return table(head, rows)


def what_it_takes(found: Set) -> str:
    """Write medians over tasks of what an item takes, and what was cut or failed."""
    rows = []
    for strategy in found.strategies:
        cells = [cell for cell in found.cells.values() if cell.scored(strategy)]
        every = [row for cell in cells for row in cell.rows[strategy].values()]
        rows.append(
            (
                strategy,
                figure(median(probe_ms(cell, strategy) for cell in cells), 0),
                figure(Figures({}).prefills(cells, strategy), 1),
                str(sum(row.get("finish_reason") == "length" for row in every)),
                str(sum(row["score"] is None for row in every)),
            )
        )
    return table(("", "probe ms", "prefills", "cut", "failed"), rows)


# charts


def ends(found: Estimate) -> charts.Range:
    """Give a mean of shares and the ends of its interval, of 100."""
    return 100 * found.value, 100 * found.low, 100 * found.high


def result_charts(figures: Figures) -> dict[str, str]:
    """Draw the charts of docs/results.md: name of the file -> SVG."""
    shown = [f"{subject}_{language}" for subject in SHOP for language in LANGUAGES]
    rivals = {f"ahead of {SHOWN.get(s, s)}": s for s in (BASE, STATIC, "qa-flora")}
    rivals["ahead of subject's adapter"] = SUBJECT
    differences = {
        title: [ends(figures.over(MAIN, "two-place", rival, cell)) for cell in (*shown, "")]
        for title, rival in rivals.items()
    }
    rows = [f"{SHOP[s]}, {language}" for s in SHOP for language in LANGUAGES.values()]
    by_subject = {}
    for subject, title in SHOP.items():
        cells = figures.cells(MAIN, RIVALS, subject)
        by_subject[f"{title}, of 100"] = [
            (ends(figures.points(cells, each)), "{} of {}".format(*figures.right(cells, each)))
            for each in RIVALS
        ]
    asked = ["static", "two-place", "norm", "arrow", "spectr", "centroid", "cosine", "euclidean"]
    cells = figures.cells("anew first", [*asked, BASE, "qa-flora"])
    weighed = [
        (each, figures.prefills(cells, each), ends(figures.points(cells, each)))
        for each in (BASE, *asked, "qa-flora")
    ]
    return {
        "cells.svg": charts.forest(
            "Points that two-place is ahead, six adapters loaded, 95 % intervals",
            [*rows, "mean of twelve"],
            differences,
        ),
        "by-subject.svg": charts.bars(
            "Right answers by subject, six adapters loaded",
            [SHOWN.get(each, each) for each in RIVALS],
            by_subject,
        ),
        "cost-of-weighing.svg": charts.costs(
            "What weighing costs, and what it wins",
            sorted(weighed, key=lambda row: row[1]),
            "weighing, in prefills",
            "right answers of 100, nine cells",
        ),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Write the page, the tables and the charts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", dest="out", type=Path, default=HERE.parent, metavar="DIR")
    out = parser.parse_args(words).out
    sets = read_sets(HERE / "results")
    figures = Figures(sets)
    files = {
        "docs/results.md": page((HERE / "results.md").read_text("utf-8"), figures),
        "benchmarks/results/tables.md": tables(s for s in sets.values() if s.name not in PARTS),
    }
    speeds = json.loads((HERE / "results/performance.json").read_text("utf-8"))
    drawn = result_charts(figures) | charts.speeds(speeds)
    files |= {f"docs/images/{name}": svg for name, svg in drawn.items()}
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
