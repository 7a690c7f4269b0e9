"""Fit weights to a task's examples, and keep them in the bundle with their evidence."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qaflora_edge import __version__
from qaflora_edge.bundles.edit import editing
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BundleError
from qaflora_edge.evaluation.tasks import Task
from qaflora_edge.fitting.examples import read_examples
from qaflora_edge.fitting.lorahub import Search, Tried
from qaflora_edge.fitting.progress_file import read_tried, writing
from qaflora_edge.formats.bundle_format import NAME_PATTERN, NAME_RULE

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
