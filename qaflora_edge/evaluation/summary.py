"""What results show over tasks: verdicts on strategies, and what it costs to load more adapters.

Also weights by layer: where which adapter leads, and whether always so.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.evaluation.cells import (
    BASE,
    NATS,
    POINTS,
    SINGLE,
    STATIC,
    Cell,
    Section,
    sections,
)
from qaflora_edge.evaluation.lines import CellSummary, gain_over, summarise_cell
from qaflora_edge.evaluation.results import Results
from qaflora_edge.evaluation.statistics import Estimate, difference

ROLES = ("domain", "language")
WANTED_POINTS = 5.0  # over static, from which a strategy is called clearly better


@dataclass(frozen=True)
class Profile:
    """The mean weights by layer of the adapters that a task names.

    by_role  "domain", "language" -> float64 [n_layer]
    """

    cell: Cell
    by_role: Mapping[str, F64]


@dataclass(frozen=True)
class Coherence:
    """Whether an adapter's weights go up and down at the same layers in several tasks.

    role         "domain" or "language"
    same, other  mean correlation over layers of its weights in two tasks of the same domain (or
                 language), and of two adapters' in tasks of different ones; NaN without such pairs
    n_same, n_other  pairs of tasks
    """

    role: str
    same: float
    other: float
    n_same: int
    n_other: int


def mean_layers(cell: Cell, strategy: str) -> F64 | None:
    """A strategy's mean weights over items: float64 [n_adapter, n_layer]; None without any."""
    found = [row["layers"] for row in cell.rows.get(strategy, {}).values() if row.get("layers")]
    return np.mean(np.array(found, np.float64), axis=0) if found else None


def profiles(cells: Sequence[Cell], strategy: str) -> list[Profile]:
    """Profiles of the cells that name a language and a domain whose adapters are loaded."""
    found = []
    for cell in cells:
        layers, names = mean_layers(cell, strategy), {role: cell.role(role) for role in ROLES}
        if layers is None or None in names.values():
            continue
        rows = {role: layers[cell.adapters.index(str(name))] for role, name in names.items()}
        found.append(Profile(cell, rows))
    return found


def thirds(n_layer: int) -> dict[str, slice]:
    """The parts of a model that profiles are told by."""
    first, second = round(n_layer / 3), round(2 * n_layer / 3)
    return {
        "first third": slice(0, first),
        "middle third": slice(first, second),
        "last third": slice(second, n_layer),
        "last layer": slice(n_layer - 1, n_layer),
    }


def coherence(found: Sequence[Profile], role: str) -> Coherence:
    """Compare the profiles of one role over every two cells; constant ones say nothing."""
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for a, b in itertools.combinations(found, 2):
        lines = a.by_role[role], b.by_role[role]
        if all(np.ptp(line) > 0 for line in lines):
            is_same = a.cell.role(role) == b.cell.role(role)
            pairs[is_same].append(float(np.corrcoef(*lines)[0, 1]))
    same, other = (
        float(np.mean(pairs[key])) if pairs[key] else float("nan") for key in (True, False)
    )
    return Coherence(role, same, other, len(pairs[True]), len(pairs[False]))


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
        return (
            self.unit == POINTS
            and self.over_static is not None
            and self.over_static.value >= WANTED_POINTS
            and self.over_static.low > 0
            and self.worst is not None
            and not self.below
        )


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
    fewer: Section | None = None
    loaded: tuple[Loaded, ...] = ()


def summarise(files: Sequence[tuple[str, Results]]) -> list[Summary]:
    """What files of results show, a summary for each section.

    files  the name of each file, and what it says
    """
    every = sections(files)
    return [_summary(section, _fewer(section, every)) for section in every]


def _fewer(section: Section, every: Sequence[Section]) -> Section | None:
    """The section with the fewest adapters, fewer than here, that it may be compared with."""
    found = [
        each
        for each in every
        if each.n_adapter < section.n_adapter and all(map(section.is_alike, each.headers))
        if any(_loaded(section, each))
    ]
    return min(found, key=lambda each: each.n_adapter, default=None)


def _same(cell: Cell, section: Section) -> Cell | None:
    """The same task, asked in the same way, in another section."""
    return next((each for each in section.cells if each.task == cell.task), None)


def _summary(section: Section, fewer: Section | None) -> Summary:
    order = section.strategies
    orders = [[name for name in order if name in cell.rows] for cell in section.cells]
    return Summary(
        section,
        tuple(map(summarise_cell, section.cells, orders)),
        tuple(
            _verdict(strategy, unit, section.cells)
            for unit in (POINTS, NATS)
            for strategy in order
            if strategy != STATIC and not strategy.startswith(SINGLE)
            if any(cell.unit == unit and strategy in cell.rows for cell in section.cells)
        ),
        fewer,
        tuple(_loaded(section, fewer)) if fewer else (),
    )


def _loaded(section: Section, fewer: Section) -> Iterator[Loaded]:
    both = [(cell, other) for cell in section.cells if (other := _same(cell, fewer))]
    for unit, strategy in itertools.product((POINTS, NATS), section.strategies):
        gains = {
            cell.name: values
            for cell, other in both
            if cell.unit == unit and len(values := cell.gains(strategy, strategy, other))
        }
        # The base and one adapter alone are the same whatever else is loaded.
        if not gains or strategy == BASE or strategy.startswith(SINGLE):
            continue
        factor = 1.0 if unit == NATS else 100.0
        is_right = unit == POINTS
        each = {
            name: difference([values], is_right=is_right).times(factor)
            for name, values in gains.items()
        }
        yield Loaded(
            strategy,
            unit,
            len(gains),
            difference(list(gains.values()), is_right=is_right).times(factor),
            min(each.items(), key=lambda item: item[1].value),
        )


def _verdict(strategy: str, unit: str, cells: Sequence[Cell]) -> Verdict:
    cells = [cell for cell in cells if cell.unit == unit and strategy in cell.rows]
    against: dict[str, Estimate] = {}
    for cell in cells:
        if found := gain_over([cell], strategy, cell.best_single()):
            against[cell.name] = found
    return Verdict(
        strategy,
        unit,
        len(cells),
        gain_over(cells, strategy, STATIC),
        min(against.items(), key=lambda item: item[1].value, default=None),
        tuple(name for name, found in against.items() if found.high < 0),
    )
