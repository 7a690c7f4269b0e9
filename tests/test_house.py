"""Budgets of the house: no commit raises a figure of tests/house.json, or a limit of house.py.

`python tests/house.py` prints each figure next to its budget.
"""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from house import LONG, budgets, figures, sentences

from qaflora_edge.cli import main

CHECKOUT = Path(__file__).resolve().parents[1]
BUDGETS = budgets(CHECKOUT)
FIGURES = figures(CHECKOUT)


@pytest.mark.parametrize("name", sorted({*BUDGETS, *FIGURES}))
def test_figure_is_within_its_budget(name: str) -> None:
    assert FIGURES.get(name, 0) <= BUDGETS.get(name, 0), "delete before you add"


def test_sentences_are_those_of_the_prose() -> None:
    page = "# Head\n\nOne [two](x.md). Three:\n\n```sh\nno\n```\n* **Four**: five\n  six.\n| no |\n"
    assert sentences(page) == ["One two.", "Three:", "Four: five six."]


def help_texts(command: click.Command, context: click.Context) -> Iterator[str]:
    yield command.help or ""
    yield from (getattr(param, "help", None) or "" for param in command.get_params(context))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from help_texts(inner, context)


def test_help_has_no_long_sentence() -> None:
    found = [each for text in help_texts(main, click.Context(main)) for each in sentences(text)]
    assert len(found) > 200
    assert [each for each in found if len(each.split()) > LONG] == []
