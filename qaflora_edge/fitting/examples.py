"""Labelled examples out of a task file: prompts, and what should be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qaflora_edge.engine import Engine
from qaflora_edge.errors import OptionError, TaskFileError
from qaflora_edge.evaluation.prompt import task_prompt
from qaflora_edge.evaluation.tasks import Item, Task


@dataclass(frozen=True)
class Examples:
    """Items of a task as an Engine reads them.

    items    their indexes in the task
    prompts  token ids
    answers  what follows each prompt
    """

    items: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]

    def loss(self, engine: Engine, weights: Sequence[float]) -> float:
        """Nats a token of the right answers: the mean over examples of each one's mean.

        weights  of the adapters in use
        """
        of_adapter = dict(zip(engine.adapters, weights, strict=True))
        scores = engine.score(list(self.prompts), list(self.answers), weights=of_adapter)
        return float(np.mean([-score.astype(np.float64).mean() for score in scores]))


def choose(items: Sequence[int], n: int, seed: int) -> list[int]:
    """n of some indexes by chance, in their order.

    Raises OptionError when there are fewer.
    """
    if n > len(items):
        raise OptionError(
            f"{n} examples are to be taken, and there are {len(items)}; expected at most as many. "
            "Give a smaller --examples."
        )
    chosen = np.random.default_rng(seed).permutation(len(items))[:n]
    return sorted(items[int(at)] for at in chosen)


def read_examples(
    engine: Engine, task: Task, items: Sequence[int], *, raw_prompt: bool = False
) -> Examples:
    """Items of a task, as they are asked in an evaluation.

    Raises TaskFileError for an item that does not say what should be answered, PromptError for one
    that is too long.
    """
    chosen = [task.items[index] for index in items]
    return Examples(
        tuple(items),
        tuple(tuple(task_prompt(engine, task, item, raw_prompt=raw_prompt)) for item in chosen),
        tuple(_answer(task, item) for item in chosen),
    )


def _answer(task: Task, item: Item) -> str:
    """The text that an item should be answered with: `continuation`, or else its answer."""
    text = item.fields.get("continuation")
    if text is None and task.metric == "choice":
        text = task.choices(item)[item.fields["answer"]]
    if text is None and task.metric != "code":
        text = str(task.expected(item))
    if not isinstance(text, str) or not text:
        raise TaskFileError(
            f"Cannot fit to {item.where}: its field continuation is "
            f"{'missing' if text is None else 'no text'}, expected the text that should be "
            f"answered, for a task of {task.metric} does not say it otherwise. Add it."
        )
    return text
