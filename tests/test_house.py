"""Budgets of the house: no commit raises a figure of tests/house.json, or a limit of house.py.

`python tests/house.py` prints each figure next to its budget.
"""

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


def test_help_has_no_long_sentence() -> None:
    todo: list[click.Command] = [main]
    context = click.Context(main)
    found: list[str] = []
    for command in todo:
        if isinstance(command, click.Group):
            inner = (command.get_command(context, name) for name in command.list_commands(context))
            todo += [each for each in inner if each is not None]
        texts = [command.help, *(getattr(each, "help", None) for each in command.params)]
        found += [each for text in texts for each in sentences(text or "")]
    assert len(found) > 200
    assert [each for each in found if len(each.split()) > LONG] == []
