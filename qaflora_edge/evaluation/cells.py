"""What several files of results say together: sections that may be compared, and their cells."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.results import Results

Row = Mapping[str, Any]

POINTS, NATS = "points", "nats a token"
BASE, STATIC, SINGLE = "base", "static", "single:"
# Options that a file does not name where they are these.
UNSAID = {"system": "", "min_weight": 0.0, "adapter_type": "auto"}
ROUNDING = 1e-3  # nats a token
PREFIX_MIN = 3  # characters from which an abbreviation is taken for a name, as med for medical


@dataclass(frozen=True)
class Cell:
    """One task, answered with one set of adapters.

    task      its header
    adapters  names, in the order of the first axis of `layers`
    rows      strategy -> item -> row
    """

    task: Row
    adapters: tuple[str, ...]
    rows: dict[str, dict[int, Row]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.task["name"])

    @property
    def unit(self) -> str:
        """Of scores: points of 100, where more is better, or nats a token, where less is."""
        return NATS if self.task["metric"] == "loss" else POINTS

    @property
    def is_likelihood(self) -> bool:
        """Whether texts are scored that are given, and nothing is generated."""
        return self.task["metric"] in ("choice", "loss")

    @property
    def factor(self) -> float:
        """From scores as they are written to the unit."""
        return 1.0 if self.unit == NATS else 100.0

    @property
    def _sign(self) -> float:
        return -1.0 if self.unit == NATS else 1.0

    @property
    def singles(self) -> list[str]:
        """The strategies that are one adapter alone, in the order of the adapters."""
        return [name for each in self.adapters if (name := f"{SINGLE}{each}") in self.rows]

    def scores(self, strategy: str) -> F64:
        """Scores as they were written, 0 to 1 or nats: float64 [n_item]."""
        return np.array([row["score"] for row in self._scored(strategy).values()], np.float64)

    def gains(self, strategy: str, over: str, of: Self | None = None) -> F64:
        """How much better a strategy is than another, above 0 where it is: float64 [n_item].

        Differences of scores as they were written, over the items that both have.

        of  whose strategy the other is: the same task under other adapters; None: this cell's
        """
        mine, theirs = self._scored(strategy), (of or self)._scored(over)
        found = [
            row["score"] - theirs[item]["score"] for item, row in mine.items() if item in theirs
        ]
        return self._sign * np.array(found, np.float64)

    def best_single(self) -> str | None:
        """The single adapter with the best mean, found on these items: in hindsight.

        Of those that were asked half as many items as any, by the items that all of these have.
        """
        scored = {name: self._scored(name) for name in self.singles}
        most = max(map(len, scored.values()), default=0)
        fit = {name: rows for name, rows in scored.items() if rows and 2 * len(rows) >= most}
        shared = set.intersection(*map(set, fit.values())) if fit else set()

        def mean(name: str) -> float:
            items = shared or fit[name]
            return self._sign * float(np.mean([fit[name][item]["score"] for item in items]))

        return max(fit, key=mean, default=None)

    def role(self, what: str) -> str | None:
        """The adapter that is named like the task's language or domain, if just one is.

        what  "language" or "domain"
        """
        wanted = self.task.get(what)
        found = [
            name for name in self.adapters if isinstance(wanted, str) and _is_alike(name, wanted)
        ]
        return found[0] if len(found) == 1 else None

    def _scored(self, strategy: str) -> dict[int, Row]:
        rows = self.rows.get(strategy, {})
        return {item: row for item, row in rows.items() if row["score"] is not None}


@dataclass(frozen=True)
class Section:
    """Cells that may be compared: one base, as many adapters loaded, asked alike."""

    headers: list[Mapping[str, Any]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def n_adapter(self) -> int:
        """How many adapters were loaded."""
        return len(self.headers[0]["adapters"])

    def is_alike(self, header: Mapping[str, Any]) -> bool:
        """Whether a file asks the same base in the same way, the number of adapters apart.

        Options have to be equal where both files say them, and so have adapters of one name.
        """
        return all(_is_asked_alike(each, header) for each in self.headers)

    @property
    def strategies(self) -> list[str]:
        """Every strategy, in the order asked for; the base and single adapters first."""
        every = dict.fromkeys(name for head in self.headers for name in head["strategies"])
        every |= dict.fromkeys(name for cell in self.cells for name in cell.rows)
        return sorted(every, key=lambda name: not (name == BASE or name.startswith(SINGLE)))


def sections(files: Sequence[tuple[str, Results]]) -> list[Section]:
    """Put what may be compared together.

    files  the name of each file, and what it says

    Raises ResultsFileError where two files say different things of one item.
    """
    found: list[Section] = []
    for shown, results in files:
        section = next((each for each in found if _fits(each, results.header)), None)
        if section is None:
            section = Section()
            found.append(section)
        _add(section, results, shown)
    for section, other in itertools.permutations(found, 2):
        if all(map(section.is_alike, other.headers)):
            _take_over(section, other)
    return found


def _take_over(section: Section, other: Section) -> None:
    """Take what another section has of the base and of single adapters, where a cell has nothing.

    These are the same whatever else is loaded.
    """
    for cell, same in itertools.product(section.cells, other.cells):
        if cell.task == same.task:
            alone = {BASE, *(f"{SINGLE}{name}" for name in cell.adapters)}
            missing = {s: rows for s, rows in same.rows.items() if s in alone - cell.rows.keys()}
            cell.rows.update(missing)  # in the order of the other's


def _is_asked_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    files = [{each["name"]: each["sha256"] for each in header["adapters"]} for header in (a, b)]
    return (
        a["base"]["sha256"] == b["base"]["sha256"]
        and _agree(UNSAID | a["options"], UNSAID | b["options"])
        and _agree(*files)
    )


def _agree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[key] == b[key] for key in a.keys() & b.keys())


def _fits(section: Section, header: Mapping[str, Any]) -> bool:
    """Whether both may be compared, and a task of both is the same, with the same adapters.

    What is fitted has to be the same too, where both were asked under it.
    """
    if section.n_adapter != len(header["adapters"]) or not section.is_alike(header):
        return False
    by_name = {cell.name: cell for cell in section.cells}
    shared = [(by_name[task["name"]], task) for task in header["tasks"] if task["name"] in by_name]
    return all(
        cell.adapters == _names(header) and cell.task == task for cell, task in shared
    ) and all(_has_same_fits(head, header) for head in section.headers)


def _has_same_fits(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether what was fitted for a task of both is the same, where both were asked under it."""
    if not {task["name"] for task in a["tasks"]} & {task["name"] for task in b["tasks"]}:
        return True
    both = {way.replace(":", ".", 1) for way in {*a["strategies"]} & {*b["strategies"]}}
    ours, theirs = a.get("measured", {}), b.get("measured", {})
    return all(ours[key] == theirs[key] for key in both & ours.keys() & theirs.keys())


def _names(header: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(adapter["name"] for adapter in header["adapters"])


def _add(section: Section, results: Results, shown: str) -> None:
    section.headers.append(results.header)
    by_name = {cell.name: cell for cell in section.cells}
    for task in results.header["tasks"]:
        if task["name"] not in by_name:
            by_name[task["name"]] = Cell(task, _names(results.header))
            section.cells.append(by_name[task["name"]])
    for row in results.records:
        rows = by_name[row["task"]].rows.setdefault(row["strategy"], {})
        before = rows.setdefault(row["item"], row)
        if _differ(before["score"], row["score"]):
            raise ResultsFileError(
                f"Cannot use {shown}: the score of item {row['item']} of {row['task']} under "
                f"{row['strategy']} is {row['score']}, and {before['score']} in a file before it; "
                "expected the same. Leave one of the files out."
            )


def _differ(a: float | None, b: float | None) -> bool:
    """Whether two scores of one item differ by more than what is computed together rounds."""
    return a != b if a is None or b is None else abs(a - b) > ROUNDING


def _is_alike(adapter: str, wanted: str) -> bool:
    """Whether an adapter is named like a language or a domain, as `es-r64` and `es` are."""
    name, wanted = re.split(r"[^a-z0-9]", adapter.lower())[0], wanted.lower()
    short, long = sorted((name, wanted), key=len)
    return short == long or (len(short) >= PREFIX_MIN and long.startswith(short))
