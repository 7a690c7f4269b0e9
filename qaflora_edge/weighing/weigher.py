"""The weigher: from a strategy's name, or given weights, to the fusion weights of a query."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from qaflora_edge.arrays import F32
from qaflora_edge.errors import QafloraError, StrategyError
from qaflora_edge.weighing import numbers, shaping
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import (
    Chosen,
    Mix,
    Probe,
    Query,
    Span,
    Typical,
    parse_strategy,
    strategies,
)

Weights = FusionWeights | Mapping[str, float] | ArrayLike | str | None


def _no_question(tokens: Sequence[int]) -> Span | None:
    return None


@dataclass(frozen=True)
class Known:
    """A bundle's defaults of weighing, and measurements of its adapters.

    typical, centroids  see Query
    """

    strategy: str = numbers.DEFAULT_STRATEGY
    lens: str = numbers.DEFAULT_LENS
    pool: str = numbers.DEFAULT_POOL
    typical: Typical = field(default_factory=dict, repr=False)
    centroids: Mapping[str, F32] = field(default_factory=dict, repr=False)

    def under(self, **given: str | None) -> Self:
        """Replace the defaults by the strategy, lens and pool that a caller gives."""
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
        return replace(self, **chosen)


@dataclass(frozen=True)
class Weigher:
    """Weighs for an Engine: the adapters in use, defaults, and facts of each adapter.

    find_question  finds the question's span in a prompt's tokens; None for plain text
    targets        adapter -> kinds of modules that it adapts, where known
    """

    adapters: tuple[str, ...]
    n_layer: int
    known: Known = Known()
    find_question: Callable[[Sequence[int]], Span | None] = _no_question
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers.check_choice("lens", self.known.lens, numbers.LENSES)
        numbers.check_choice("pool", self.known.pool, numbers.POOLS)
        self.parse(self.known.strategy)

    def parse(self, text: str) -> Chosen:
        """Parse a strategy; StrategyError if it is unknown or cannot be followed here."""
        chosen = parse_strategy(text, self.adapters)
        query = self.query((), chosen)
        chosen.strategy.check(chosen.argument, query)
        return chosen

    @property
    def followed(self) -> tuple[str, ...]:
        """List the strategies that can be followed here without an argument.

        First the base, the static mix and each adapter alone, then those that look at the query.
        """
        if not self.adapters:
            return ("base",)
        targets = [self.targets[name] for name in self.adapters if name in self.targets]
        whole = [
            each for each in strategies() if not each.needs_argument and each.can_compare(targets)
        ]
        fixed = [each.name for each in whole if not each.is_probed]
        fixed.sort(key=lambda name: name != "base")
        probed = [each.name for each in whole if each.is_probed]
        singles = [f"single:{name}" for name in self.adapters]
        every = (*fixed, *singles, *probed)
        found = []
        for text in every:
            with suppress(QafloraError):
                found.append(self.parse(text).text)
        return tuple(found)

    def query(self, tokens: Sequence[int], chosen: Chosen | None = None) -> Query:
        """Make a query from tokens, these defaults and the strategy's options."""
        options = {} if chosen is None else chosen.options
        pool = options.get("pool", self.known.pool)
        needs_question = pool == "question" or (
            chosen is not None and chosen.strategy.reads_question
        )
        question = self.find_question(tokens) if needs_question and tokens else None
        return Query(
            tokens=tuple(tokens),
            adapters=self.adapters,
            n_layer=self.n_layer,
            lens=self.known.lens,
            pool=pool,
            typical=self.known.typical,
            centroids=self.known.centroids,
            options=options,
            question=question or (0, len(tokens)),
            is_chat=question is not None,
        )

    def weigh(
        self, weights: Weights, tokens: Sequence[int], probe: Callable[[Query], Probe]
    ) -> FusionWeights:
        """Weigh a query by a strategy, or take given weights.

        weights  None (the default strategy), a strategy name, FusionWeights, a mapping from
                 adapter names to numbers, or an array [n_adapter, n_layer]
        probe    makes the probe of a query
        """
        query = self.query(tokens)
        if isinstance(weights, FusionWeights):
            return self._given(weights)
        if isinstance(weights, Mapping):
            pairs = ",".join(f"{name}={weight}" for name, weight in weights.items())
            weights = f"manual:{pairs}" if pairs else "base"
        if weights is not None and not isinstance(weights, str):
            return self._fusion(Mix(weights), "manual", query)
        chosen = self.parse(weights or self.known.strategy)
        strategy = chosen.strategy
        if not self.adapters:
            return self._fusion(Mix(np.zeros((0, self.n_layer))), chosen.text, query)
        query = self.query(tokens, chosen)
        start = time.perf_counter()
        mix = strategy.weigh(query, probe(query), chosen.argument)
        probe_ms = 1e3 * (time.perf_counter() - start) if strategy.is_probed else 0.0
        mix = mix if isinstance(mix, Mix) else Mix(mix)
        source = f"Strategy {chosen.text!r}: "
        fusion = self._fusion(mix, chosen.text, query, probe_ms, source=source)
        found = shaping.shaped(fusion.weights, chosen.options, source)
        return replace(fusion, weights=found)

    def _given(self, weights: FusionWeights) -> FusionWeights:
        if weights.adapters != self.adapters:
            raise StrategyError(
                f"The weights are for the adapters {', '.join(weights.adapters)}, loaded are "
                f"{', '.join(self.adapters)}; weigh the prompt with this Engine."
            )
        numbers.check_weights(weights.weights, self.adapters, self.n_layer)
        return weights

    def _fusion(
        self, mix: Mix, strategy: str, query: Query, probe_ms: float = 0.0, *, source: str = ""
    ) -> FusionWeights:
        """Check a mix and make FusionWeights of it; messages begin with `source`."""

        def checked(array: ArrayLike) -> F32:
            return numbers.check_weights(array, self.adapters, self.n_layer, source=source)

        return FusionWeights(
            adapters=self.adapters,
            weights=checked(mix.weights),
            divergence=None if mix.divergence is None else checked(mix.divergence),
            strategy=strategy,
            lens=query.lens,
            pool=query.pool,
            prompt_tokens=len(query.tokens),
            probe_ms=probe_ms,
        )
