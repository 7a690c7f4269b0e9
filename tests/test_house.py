"""Budgets of the house. `python tests/house.py` prints each figure next to its limit."""

from pathlib import Path

import click
import pytest
from house import BUDGETS, LONG, ROOM, figures, sentences

from qaflora_edge.cli import main

FIGURES = figures(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_within_its_budget(name) -> None:
    assert FIGURES[name] <= ROOM * BUDGETS[name]


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
