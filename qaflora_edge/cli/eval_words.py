"""Results of evaluations in words: what their tables, pages and documents have in common."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qaflora_edge.evaluation.cells import NATS, POINTS, Cell, Section
from qaflora_edge.evaluation.lines import CellSummary
from qaflora_edge.evaluation.statistics import Estimate
from qaflora_edge.evaluation.summary import Loaded, Summary, Verdict
from qaflora_edge.formats.json_text import without_nan
from qaflora_edge.show.picture_text import beginning

NONE = "-"
BUNDLES_MAX = 2  # that a heading names


def heading(section: Section) -> str:
    """The base, the adapters loaded and the bundles of a section, in one line."""
    bases = dict.fromkeys(plain(head["base"]["name"]) for head in section.headers)
    bundles = dict.fromkeys(plain(head["bundle"]) for head in section.headers)
    of = f"{', '.join(bundles)}: " if len(bundles) <= BUNDLES_MAX else ""
    loaded = dict.fromkeys(", ".join(map(plain, cell.adapters)) for cell in section.cells)
    names = next(iter(loaded)) if len(loaded) == 1 else "other ones for other tasks"
    count = f"{section.n_adapter} adapter{'s' * (section.n_adapter != 1)} loaded"
    return f"{of}{', '.join(bases)}, {count}{f': {names}' if section.n_adapter else ''}"


def plain(text: object) -> str:
    """A text of a file on one line, with what a terminal would obey spelt out."""
    return beginning(str(text))


def number(value: float, unit: str, *, is_difference: bool = False) -> str:
    """A score or difference in its unit; `-` where there is none."""
    if math.isnan(value):
        return NONE
    digits = 3 if unit == NATS else 1
    return f"{value:{'+' if is_difference else ''}.{digits}f}"


def estimate(found: Estimate | None, unit: str, *, is_difference: bool = False) -> str:
    """A mean and its interval, as in `12.0 (8.5 to 16.7)`."""
    if found is None:
        return NONE
    value, low, high = (
        number(part, unit, is_difference=is_difference)
        for part in (found.value, found.low, found.high)
    )
    return value if NONE in (low, high) else f"{value} ({low} to {high})"


def figure(value: float | None, digits: int) -> str:
    """A number as text; `-` where there is none."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


def verdict_row(found: Verdict) -> tuple[str, ...]:
    """A strategy, its tasks, how much better it is, at worst, where, and where it is worse."""
    name, worst = found.worst or (NONE, None)
    return (
        plain(found.strategy),
        str(found.n_cell),
        estimate(found.over_static, found.unit, is_difference=True),
        estimate(worst, found.unit, is_difference=True),
        plain(name),
        ", ".join(map(plain, found.below)) or "none",
    )


def loaded_rows(loaded: Sequence[Loaded]) -> list[tuple[str, ...]]:
    """What it changes that more adapters are loaded, below a head."""
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
    return [("", "tasks", "better by", "worst", "in"), *rows]


def kind(cell: Cell) -> str:
    """How a task is scored."""
    return "loss" if cell.unit == NATS else str(cell.task["metric"])


def items(cell: CellSummary) -> str:
    """How many items the strategies have a score for, as in `250` or `12 to 250`."""
    counts = sorted({line.score.n_item for line in cell.lines})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)


def as_json_object(summary: Summary) -> dict[str, Any]:
    """Every number of a section, as `qaflora report --json` prints it; null where there is none."""
    cells = [
        {
            "task": cell.cell.name,
            "adapters": list(cell.cell.adapters),
            "unit": cell.cell.unit,
            "best_single": cell.best_single,
            "strategies": [asdict(line) | {"prefills": line.prefills} for line in cell.lines],
        }
        for cell in summary.cells
    ]
    loaded = [asdict(each) for each in summary.loaded]
    verdicts = [asdict(each) | {"is_shown": each.is_shown} for each in summary.verdicts]
    found: dict[str, Any] = without_nan(
        {
            "heading": heading(summary.section),
            "tasks": cells,
            "verdicts": verdicts,
            "loaded": loaded,
        }
    )
    return found


def facts(section: Section) -> list[tuple[str, str]]:
    """How a section's files were made: name and value of each fact, once where they are equal."""
    heads = section.headers
    found = {
        "bundle": (head["bundle"] for head in heads),
        "base": (f"{head['base']['name']}, SHA-256 {head['base']['sha256']}" for head in heads),
        "adapters": (_adapters(head) for head in heads),
        "options": (
            ", ".join(f"{k} {text(v)}" for k, v in head["options"].items()) for head in heads
        ),
        "version": (head["version"] for head in heads),
        "machine": (head["machine"] for head in heads),
    }
    shown = [(name, "\n".join(dict.fromkeys(map(str, values)))) for name, values in found.items()]
    isolated = [
        ", ".join(map(str, row["isolated"])) or "nothing"
        for cell in section.cells
        for rows in cell.rows.values()
        for row in rows.values()
        if isinstance(row.get("isolated"), list)
    ]
    if isolated:
        shown.append(("code was kept from", "\n".join(dict.fromkeys(isolated))))
    return shown


def _adapters(head: Mapping[str, Any]) -> str:
    each = (f"{a['name']} ({a['bytes'] / 1e6:.1f} MB)" for a in head["adapters"])
    return ", ".join(each) or "none"


def text(value: object) -> str:
    """A value of a file as text: a text as it is, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


BEST = "best single adapter, in hindsight"
SCORES = {POINTS: "Right answers of 100", NATS: "Loss in nats a token, less is better"}


@dataclass(frozen=True)
class Score:
    """A number as text, and whether no other strategy of its task has a better one."""

    text: str
    is_best: bool


@dataclass(frozen=True)
class Matrix:
    """Tasks of one unit.

    names, counts  of the tasks, and how many items they have
    rows           a strategy, and its score in each task, then the mean over all tasks if it has
                   one in each; last comes the best single adapter of each task
    """

    names: Sequence[str]
    counts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Score]]]


def matrix(cells: Sequence[CellSummary], strategies: Sequence[str]) -> Matrix:
    """The scores of cells of one unit; strategies that none of them has are left out."""
    unit = cells[0].cell.unit
    best = [_best(cell) for cell in cells]
    rows = []
    for strategy in (*strategies, BEST):
        values = [_score(cell, strategy) for cell in cells]
        if np.isnan(values).all():
            continue
        scores = [
            Score(number(value, unit), value == most)
            for value, most in zip(values, best, strict=True)
        ]
        rows.append((strategy, [*scores, Score(number(float(np.mean(values)), unit), False)]))
    return Matrix([cell.cell.name for cell in cells], list(map(items, cells)), rows)


def _score(found: CellSummary, strategy: str) -> float:
    """NaN where the cell does not have the strategy."""
    wanted = found.best_single if strategy == BEST else strategy
    return next((each.score.value for each in found.lines if each.strategy == wanted), math.nan)


def _best(found: CellSummary) -> float:
    scores = [line.score.value for line in found.lines if not math.isnan(line.score.value)]
    return (min if found.cell.unit == NATS else max)(scores, default=math.nan)
