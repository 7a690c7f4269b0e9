"""The option `first`: which few of many adapters are probed at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qaflora_edge.weighing.calibrated import check_typical
from qaflora_edge.weighing.strategy import Mix, Probe, Query
from qaflora_edge.weighing.typical import surprise

F64 = NDArray[np.float64]


def check_first(strategy: str, query: Query) -> None:
    """Raise StrategyError where adapters cannot be chosen, for want of what is usual of them."""
    if "first" in query.options and len(query.adapters) > query.options["first"]:
        keys = ["added_last", "added_question", "added_text"]
        check_typical(strategy, query, keys, "for the option first")


def first_of(query: Query, probe: Probe) -> tuple[str, ...]:
    """The adapters that are probed: those that would add the most unusual amounts to the base.

    In chat form by the sum of both places, in standard deviations; else at the last token.
    """
    n = query.options.get("first", len(query.adapters))
    if n >= len(query.adapters):
        return query.adapters
    last, question = probe.places("added")

    def unusual(measured: F64, key: str) -> F64:
        return surprise(measured, [query.typical[name][key] for name in query.adapters])

    if query.is_chat:
        order = unusual(last, "added_last") + unusual(question, "added_question")
    else:
        order = unusual(last, "added_text")
    kept = set(np.argsort(-order, kind="stable")[:n].tolist())
    return tuple(name for ia, name in enumerate(query.adapters) if ia in kept)


def only(query: Query, names: Sequence[str]) -> Query:
    """The query with these adapters alone."""
    return replace(query, adapters=tuple(names))


def with_others(mix: Mix, names: Sequence[str], adapters: Sequence[str]) -> Mix:
    """A mix of some adapters as one of all: the others weigh 0, and were found to do nothing."""

    def of_all(array: ArrayLike) -> F64:
        some = np.asarray(array, np.float64)
        found = np.zeros((len(adapters), *some.shape[1:]))
        found[[adapters.index(name) for name in names]] = some
        return found

    return Mix(of_all(mix.weights), None if mix.divergence is None else of_all(mix.divergence))
