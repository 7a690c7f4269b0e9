"""Scores of every strategy in every task, as rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qaflora_edge.cli.eval_words import items, number
from qaflora_edge.evaluation.cells import NATS, POINTS

if TYPE_CHECKING:
    from qaflora_edge.evaluation.lines import CellSummary

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
