"""Strategies that weigh an adapter by how far it moves the base: qa-FLoRA and its ablations."""

from __future__ import annotations

from typing import Any

from qaflora_edge.config import PROBING, SHAPING
from qaflora_edge.weighing.strategy import Measure, Mix, Probe, Query, Strategy


class _Divergence(Strategy):
    measure: Measure = "kl"
    options = (*SHAPING, *PROBING)

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        from qaflora_edge.weighing.numbers import normalise

        divergence = probe.divergence(self.measure)
        return Mix(normalise(divergence), divergence)


class QaFlora(_Divergence):
    name = "qa-flora"
    help = "by the KL of the base's next-token distribution to the adapter's (the published method)"


class Cosine(_Divergence):
    name = "cosine"
    help = "by the cosine distance of hidden states"
    measure = "cosine"


class Euclidean(_Divergence):
    name = "euclidean"
    help = "by the Euclidean distance of hidden states"
    measure = "euclidean"


STRATEGIES = (QaFlora(), Cosine(), Euclidean())
