"""Weights by layer, of a task and over tasks: where which adapter leads, and whether always so."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.evaluation.cells import Cell

ROLES = ("domain", "language")


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
