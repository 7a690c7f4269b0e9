"""From a strategy and a query's tokens to fusion weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing import numbers as fuse
from qaflora_edge.weighing.numbers import FusionWeights, Strategy
from qaflora_edge.weighing.probe import Prober

F32 = NDArray[np.float32]
Weights = FusionWeights | ArrayLike | str | None

# adapter -> lens -> typical divergence of each layer, as bundle.json stores it
Typical = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Weigher:
    """How an Engine weighs: its adapters, its defaults, and what is typical of each adapter."""

    adapters: tuple[str, ...]
    strategy: str
    lens: str
    pool: str
    typical: Typical

    def __post_init__(self) -> None:
        fuse.check_choice("lens", self.lens, fuse.LENSES)
        fuse.check_choice("pool", self.pool, fuse.POOLS)
        self.parse(self.strategy)

    def parse(self, text: str) -> Strategy:
        """Read a strategy; StrategyError if it is unknown or cannot be followed here."""
        strategy = fuse.parse_strategy(text, self.adapters)
        if strategy.kind == "calibrated":
            self._check_calibrated()
        return strategy

    def _check_calibrated(self) -> None:
        if self.pool != "last":
            raise StrategyError(
                f"Strategy calibrated needs pool last, found {self.pool}: typical divergences "
                "are measured at the last token."
            )
        missing = [name for name in self.adapters if self.lens not in self.typical.get(name, {})]
        if missing:
            raise StrategyError(
                f"Strategy calibrated needs typical divergences, missing for {', '.join(missing)} "
                f"with lens {self.lens}; measure them with `qaflora bundle calibrate DIR`."
            )

    def weigh(self, weights: Weights, tokens: Sequence[int], prober: Prober) -> FusionWeights:
        """Weights for a query, by a strategy name, or as they are given.

        weights  None (the default strategy), a strategy name, FusionWeights, or an array
                 [n_adapter, n_layer]
        """
        n_layer = prober.n_layer
        if isinstance(weights, FusionWeights):
            if weights.adapters != self.adapters:
                raise StrategyError(
                    f"The weights are for the adapters {', '.join(weights.adapters)}, loaded are "
                    f"{', '.join(self.adapters)}; weigh the prompt with this Engine."
                )
            fuse.check_weights(weights.weights, self.adapters, n_layer)
            return weights
        if weights is not None and not isinstance(weights, str):
            array = fuse.check_weights(weights, self.adapters, n_layer)
            return self._fusion(array, "manual", tokens)
        text = weights or self.strategy
        strategy = self.parse(text)
        if not strategy.is_probed or not self.adapters:
            return self._fusion(fuse.fixed_weights(strategy, self.adapters, n_layer), text, tokens)
        if strategy.kind == "norm":
            return self._weigh_by_norm(strategy, text, tokens, prober)
        start = time.perf_counter()
        divergence = prober.divergence(tokens, strategy.kind, self.lens, self.pool)
        relevance: ArrayLike = divergence
        if strategy.kind == "calibrated":
            typical = [self.typical[name][self.lens] for name in self.adapters]
            relevance = fuse.calibrate(divergence, typical)
        array = fuse.normalise(relevance)
        probe_ms = 1e3 * (time.perf_counter() - start)
        return self._fusion(array, text, tokens, divergence.astype(np.float32), probe_ms)

    def _weigh_by_norm(
        self, strategy: Strategy, text: str, tokens: Sequence[int], prober: Prober
    ) -> FusionWeights:
        """One weight per adapter, the same at every layer; so is what it is made from."""
        start = time.perf_counter()
        norms = prober.norms(tokens)
        weights = fuse.normalise_top(norms, strategy.top)
        probe_ms = 1e3 * (time.perf_counter() - start)
        array, divergence = (
            np.repeat(column.astype(np.float32)[:, None], prober.n_layer, axis=1)
            for column in (weights, norms)
        )
        return self._fusion(array, text, tokens, divergence, probe_ms)

    def _fusion(
        self,
        weights: F32,
        strategy: str,
        tokens: Sequence[int],
        divergence: F32 | None = None,
        probe_ms: float = 0.0,
    ) -> FusionWeights:
        return FusionWeights(
            adapters=self.adapters,
            weights=weights,
            divergence=divergence,
            strategy=strategy,
            lens=self.lens,
            pool=self.pool,
            prompt_tokens=len(tokens),
            probe_ms=probe_ms,
        )


def measure_typical(
    prober: Prober,
    adapters: Sequence[str],
    queries: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Measure each adapter against itself, for the strategy `calibrated`.

    queries   token ids of each neutral query
    progress  called with (queries done, queries in all)
    returns   adapter -> lens -> geometric mean of the divergence at each layer
    """
    measured: dict[str, list[NDArray[np.float64]]] = {lens: [] for lens in fuse.LENSES}
    for done, tokens in enumerate(queries, 1):
        for lens in fuse.LENSES:
            measured[lens].append(prober.divergence(tokens, "qa-flora", lens, "last"))
        if progress is not None:
            progress(done, len(queries))
    typical = {lens: fuse.typical_divergence(measured[lens]) for lens in fuse.LENSES}
    return {
        name: {lens: [float(x) for x in typical[lens][ia]] for lens in fuse.LENSES}
        for ia, name in enumerate(adapters)
    }
