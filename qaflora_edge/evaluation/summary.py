"""What results show over tasks: verdicts on strategies, and what it costs to load more adapters."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

WANTED_POINTS = 5.0  # over static, from which a strategy is called clearly better


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

    @property
    def estimates(self) -> tuple[Estimate, Estimate]:
        """Both differences."""
        return self.gain, self.worst[1]


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
    """The section with the fewest adapters, fewer than in this one, that has a task of this one."""
    found = [
        each
        for each in every
        if each.n_adapter < section.n_adapter and all(map(section.is_alike, each.headers))
        if any(_same(cell, each) for cell in section.cells)
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
        each = {name: difference([values]).times(factor) for name, values in gains.items()}
        yield Loaded(
            strategy,
            unit,
            len(gains),
            difference(list(gains.values())).times(factor),
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
