"""What is typical of an adapter: how far it moves neutral prompts, as bundle.json stores it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.progress import TellCount
from qaflora_edge.weighing.numbers import LENSES, typical_divergence
from qaflora_edge.weighing.strategy import Query

# One number a layer: the geometric mean of the KL at the last token, or of the question's states;
# and of how many times the KL that ends of the prompt show it is, see `lacking`.
LAYERS = tuple(f"{place}{lens}" for place in ("", "question_", "fast_") for lens in LENSES)
# Mean and spread of `extent`, by what is measured (see Probe.places) and where: at the last token,
# in the question, and at the last token of prompts as plain text.
EXTENTS = ("added_last", "added_question", "added_text", "cosine_question")
ALWAYS = (*LAYERS[:4], *EXTENTS)  # the others where ends can be read and the base has a template
KEYS = (*LAYERS, *EXTENTS)

TYPICAL_TAIL = 8  # tokens at the end of a long text that adapters read: see `lacking`

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


def lacking(exact: F64, ends: F64, share: float) -> F64:
    """What `as_if_read` needs to make one of the other: float64 [n_adapter, n_layer]."""
    return np.asarray(((exact + _EPS) / (ends + _EPS)) ** (1 / share))


def as_if_read(query: Query, ends: F64, share: float) -> F64:
    """A chat prompt's KL as it would be, had the adapters read all: float64 [n_adapter, n_layer].

    ends   what was found where they read the ends; it stays where the bundle does not know what
           is usual
    share  of the tokens that they did not read: the more, the weaker they seem, and by how much is
           each adapter's own. Half of what long neutral texts show is taken: it differs from one
           question to the next, and that half came nearest (docs/performance.md).
    """
    usual = [query.typical.get(name, {}).get(f"fast_{query.lens}") for name in query.adapters]
    if not query.is_chat or not all(usual):
        return ends
    return np.asarray(ends * np.array(usual, np.float64) ** (share / 2))


def long_texts(prompts: Sequence[str]) -> list[str]:
    """Three texts of 6 to 8 prompts each, for what only shows in long ones."""
    starts = ((0, 6), (8, 7), (16, 8))
    return [" ".join(prompts[(at + i) % len(prompts)] for i in range(n)) for at, n in starts]


def measure_typical(
    measures: Sequence[tuple[Callable[[str], Mapping[str, F64]], Sequence[str]]],
    adapters: Sequence[str],
    progress: TellCount | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure each adapter against itself.

    measures  functions, and the neutral prompts for each of them: a prompt -> those of KEYS that
              it tells of -> float64 [n_adapter, n_layer]
    progress  called with (prompts done, prompts in all)
    returns   adapter -> key -> a list of n_layer numbers, or mean and spread
    """
    measured: dict[str, list[F64]] = {}
    every = [(measure, prompt) for measure, prompts in measures for prompt in prompts]
    for done, (measure, prompt) in enumerate(every, 1):
        for key, value in measure(prompt).items():
            measured.setdefault(key, []).append(value)
        if progress is not None:
            progress(done, len(every))
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
