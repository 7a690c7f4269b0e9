"""Fit weights to labelled examples of a task, and keep them in the bundle with their evidence."""

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge import __version__
from qaflora_edge.bundles.edit import editing
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BundleError, OptionError, PromptError, TaskFileError
from qaflora_edge.evaluation.run import task_prompt
from qaflora_edge.evaluation.task_checks import listed
from qaflora_edge.evaluation.tasks import Item, Task
from qaflora_edge.fitting.lorahub import Search, Tried, read_tried, writing
from qaflora_edge.formats.bundle import NAME_PATTERN, NAME_RULE


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

    def prompt(item: Item) -> tuple[int, ...]:
        try:
            return tuple(task_prompt(engine, task, item, raw_prompt=raw_prompt))
        except PromptError as error:
            raise type(error)(f"Cannot fit to {item.where}: {error}") from error

    return Examples(
        tuple(items), tuple(map(prompt, chosen)), tuple(_answer(task, item) for item in chosen)
    )


def _answer(task: Task, item: Item) -> str:
    """The text that an item should be answered with: `continuation`, or else its first answer."""
    text = item.fields.get("continuation")
    if text is None and task.metric == "choice":
        text = task.choices(item)[item.fields["answer"]]
    if text is None and task.metric != "code":
        text = str(listed(task.expected(item))[0])
    if not isinstance(text, str) or not text:
        raise TaskFileError(
            f"Cannot fit to {item.where}: its field continuation is "
            f"{'missing' if text is None else 'no text'}, expected the text that should be "
            f"answered, for a task of {task.metric} does not say it otherwise. Add it."
        )
    return text


METHOD = "lorahub"

Tell = Callable[[Search], None]


def fit(
    folder: Path,
    engine: Engine,
    task: Task,
    items: Sequence[int],
    *,
    name: str,
    budget: int,
    seed: int,
    raw_prompt: bool = False,
    tell: Tell = lambda search: None,
) -> dict[str, Any]:
    """Search weights of the Engine's adapters in use, and record the best in its bundle.

    folder  of the bundle that the Engine opened
    items   indexes of the examples
    name    as in the strategy fitted:NAME; what had it is replaced
    budget  weights that are tried
    tell    called after each
    returns what bundle.json has now under fusion.fitted.NAME

    What was tried is kept in a hidden file of the folder until the end: a search that was ended,
    or is given a larger budget, goes on from there.

    Raises BundleError for a name that is none, or when the adapters are others by now.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise BundleError(f"The name {name!r} cannot be used for a fit; expected {NAME_RULE}.")
    examples = read_examples(engine, task, items, raw_prompt=raw_prompt)
    files = _files(folder, engine.adapters)
    header = {
        "fit": METHOD,
        "search": Search(len(files) - 1).searcher,
        "files": files,
        "task": task.sha256,
        "items": list(examples.items),
        "prompts": hashlib.sha256(json.dumps(examples.prompts).encode()).hexdigest(),
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:16]
    path = folder / f".fit-{key}.jsonl"
    known = read_tried(path, header)
    search = Search(len(engine.adapters), budget, seed, known)
    with writing(path, header, known) as put:
        for tried in search.run(lambda weights: examples.loss(engine, weights)):
            if len(search.tried) > len(known):
                put(tried)
            tell(search)
    record = _record(engine.adapters, search.tried[0], search.best, task, examples.items)
    record |= {"n_tried": len(search.tried), "seed": seed}
    with editing(folder) as (_, raw):
        if _files(folder, engine.adapters) != files:
            raise BundleError(
                f"Cannot keep what was fitted in {folder}: its adapters are not those that it was "
                "fitted with, expected the same files; another program changed them. Fit again."
            )
        raw.setdefault("fusion", {}).setdefault("fitted", {})[name] = record
    path.unlink(missing_ok=True)
    return record


def _files(folder: Path, adapters: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the base, as "", and of adapters."""
    description = load_bundle(folder).description_dict
    found = {adapter["name"]: adapter["sha256"] for adapter in description["adapters"]}
    return {"": description["base"]["sha256"], **{name: found[name] for name in adapters}}


def _record(
    adapters: Sequence[str], first: Tried, best: Tried, task: Task, items: Sequence[int]
) -> dict[str, Any]:
    weights: Mapping[str, float] = {
        name: float(f"{weight:.6g}") for name, weight in zip(adapters, best.weights, strict=True)
    }
    return {
        "method": METHOD,
        "weights": weights,
        "task": {"name": task.name, "sha256": task.sha256, "items": list(items)},
        "loss": {"base": round(first.loss, 6), "fitted": round(best.loss, 6)},
        "date": datetime.date.today().isoformat(),
        "version": __version__,
    }
