"""Budgets of the house: no commit raises a figure of tests/house.json.

`python tests/house.py` prints each figure next to its budget.
"""

import json
from pathlib import Path

import pytest
from house import figures

CHECKOUT = Path(__file__).resolve().parents[1]
BUDGETS = json.loads((CHECKOUT / "tests" / "house.json").read_text(encoding="utf-8"))
FIGURES = figures(CHECKOUT)


@pytest.mark.parametrize("name", sorted({*BUDGETS, *FIGURES}))
def test_figure_is_within_its_budget(name: str) -> None:
    assert FIGURES.get(name, 0) <= BUDGETS.get(name, 0), "delete before you add"
