"""What is typical of an adapter: how far it moves neutral prompts, as bundle.json stores it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.progress import TellCount
from qaflora_edge.weighing.numbers import LENSES, typical_divergence
from qaflora_edge.weighing.strategy import Query

# One number a layer: the geometric mean of the KL at the last token, or of the question's states.
LAYERS = tuple(f"{place}{lens}" for place in ("", "question_") for lens in LENSES)
# Mean and spread of `extent`, by what is measured (see Probe.places) and where: at the last token,
# in the question, and at the last token of prompts as plain text.
EXTENTS = ("added_last", "added_question", "added_text", "cosine_question")
KEYS = (*LAYERS, *EXTENTS)

_EPS = 1e-12  # of what a logarithm is taken of; layers of 0 change no surprise
_SPREAD_MIN = 0.01  # an adapter that always does the same is no surprise whatever it does


def extent(measured: F64) -> F64:
    """How much an adapter does to a query, in one number: mean over layers of log(x + 1e-12).

    measured  [n_adapter, n_layer]  >= 0, in any unit
    returns   [n_adapter]
    """
    return np.asarray(np.log(measured + _EPS).mean(axis=1))


def surprise(measured: F64, usual: Sequence[Mapping[str, float]]) -> F64:
    """How unusual an extent is, in standard deviations: float64 [n_adapter].

    measured  [n_adapter, n_layer]  as for extent
    usual     mean and spread of each adapter over neutral prompts
    """
    mean, spread = (np.array([each[key] for each in usual]) for key in ("mean", "spread"))
    return np.asarray((extent(measured) - mean) / spread)


def unusual(query: Query, key: str, measured: F64) -> F64:
    """How unusual what a query's adapters do is, in standard deviations: float64 [n_adapter].

    key       one of EXTENTS, what is measured
    measured  [n_adapter, n_layer]
    """
    return surprise(measured, [query.typical[name][key] for name in query.adapters])


def adds_nothing(usual: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether an adapter was seen to add nothing to q, k and v of any block.

    usual  what is usual of it, by EXTENTS
    """
    return usual["added_last"]["mean"] < math.log(_EPS) + 1e-3  # of nine digits


def measure_typical(
    measure: Callable[[str], Mapping[str, F64]],
    prompts: Sequence[str],
    adapters: Sequence[str],
    progress: TellCount | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure each adapter against itself, over neutral prompts.

    measure   a prompt -> one of KEYS -> float64 [n_adapter, n_layer]
    progress  called with (prompts done, prompts in all)
    returns   adapter -> key -> a list of n_layer numbers, or mean and spread
    """
    measured: dict[str, list[F64]] = {}
    for done, prompt in enumerate(prompts, 1):
        for key, value in measure(prompt).items():
            measured.setdefault(key, []).append(value)
        if progress is not None:
            progress(done, len(prompts))
    typical = {
        key: _usual(values) if key in EXTENTS else typical_divergence(values).tolist()
        for key, values in measured.items()
    }
    return {
        name: {key: values[ia] for key, values in typical.items()}
        for ia, name in enumerate(adapters)
    }


def _usual(measured: Sequence[F64]) -> list[dict[str, float]]:
    """Mean and spread of each adapter's extent, of what was measured of some prompts."""
    extents = np.stack([extent(each) for each in measured])
    spreads = np.maximum(extents.std(axis=0), _SPREAD_MIN)
    return [
        {"mean": float(mean), "spread": float(spread)}
        for mean, spread in zip(extents.mean(axis=0), spreads, strict=True)
    ]
