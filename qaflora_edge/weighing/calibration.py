"""Calibration: what is typical of an adapter over neutral prompts, as bundle.json stores it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.config import LENSES
from qaflora_edge.weighing.numbers import typical_divergence
from qaflora_edge.weighing.strategy import Query

# One number a layer: the geometric mean of the KL at the last token, or of the question's states.
LAYERS = tuple(f"{place}{lens}" for place in ("", "question_") for lens in LENSES)
# Mean and spread of `extent` of Probe.added, and each prompt's distance from the mean in spreads,
# by passes of the base alone: at the last token and in the question of a first turn, at the last
# token of plain text, and at both places of a later turn.
EXTENTS = ("added_last", "added_question", "added_text", "later_last", "later_question")
# Mean and spread over neutral chats of how sure an adapter is of its own draft.
SURENESS = "sureness"
KEYS = (*LAYERS, *EXTENTS, SURENESS)

_EPS = 1e-12  # added before a logarithm; layers of 0 change no surprise
_COPY = 0.85  # correlation of versions of one adapter: .9 and above; of others .73 and below
_SPREAD_MIN = 0.01  # an adapter that always does the same would surprise whatever it does


def extent(measured: F64) -> F64:
    """Sum up what an adapter does in one number: the mean over layers of log(x + 1e-12).

    measured  [n_adapter, n_layer]  >= 0, in any unit
    returns   [n_adapter]
    """
    return np.asarray(np.log(measured + _EPS).mean(axis=1))


def above_typical(query: Query, key: str, measured: F64) -> F64:
    """Tell how far extents are above the typical ones, in standard deviations: float64 [n_adapter].

    key       one of EXTENTS
    measured  [n_adapter, n_layer]
    """
    typical = [query.typical[name][key] for name in query.adapters]
    mean, spread = (np.array([each[part] for each in typical]) for part in ("mean", "spread"))
    return np.asarray((extent(measured) - mean) / spread)


def unusual(query: Query, measured: Mapping[str, F64]) -> F64:
    """Tell how unusual extents are, in standard deviations: float64 [n_adapter].

    measured  one or several of EXTENTS -> [n_adapter, n_layer]; several count together, equally

    What adapters alike predict is subtracted, because a greeting raises many: their mean, weighted
    by correlation over the neutral prompts, times three quarters of its slope, as these are few.
    Near copies predict nothing, or versions of one adapter would hide each other.
    """
    typical = [
        [query.typical[name][key].get("each", ()) for key in measured] for name in query.adapters
    ]
    n = min(len(each) for keys in typical for each in keys)
    prompts = np.array([[each[:n] for each in keys] for keys in typical], np.float64)
    alike = np.einsum("akn,bkn->ab", prompts, prompts) / max(len(measured) * n, 1)
    shares = np.where(alike < _COPY, np.maximum(alike, 0), 0)
    np.fill_diagonal(shares, 0)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), _EPS)
    own, above = prompts.sum(axis=1), sum(above_typical(query, *each) for each in measured.items())
    expected = shares @ own
    products = (own**2, own * expected, expected**2)
    variance, shared, of_expected = (each.sum(axis=1) / max(n, 1) for each in products)
    slope = 0.75 * shared / np.maximum(of_expected, _EPS)
    spread = np.sqrt(np.maximum(variance, len(measured)) - slope**2 * of_expected)
    return np.asarray((above - slope * (shares @ above)) / spread)


def adds_nothing(typical: Mapping[str, Mapping[str, float]]) -> bool:
    """Tell whether an adapter added nothing to q, k and v of any block.

    typical  of this adapter, by EXTENTS
    """
    return typical["added_last"]["mean"] < math.log(_EPS) + 1e-3


def typical_of(
    measured: Mapping[str, Sequence[F64]], adapters: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Sum up what was measured of each adapter over neutral prompts.

    measured  one of KEYS -> of each prompt float64 [n_adapter, n_layer]; of SURENESS [n_adapter]
    returns   adapter -> one of KEYS -> a list of n_layer numbers, or mean and spread, and each
    """
    typical: dict[str, Any] = {}
    for key, values in measured.items():
        if key in EXTENTS:
            typical[key] = _mean_and_spread(values)
        elif key == SURENESS:
            typical[key] = _typical_sureness(np.stack(values))
        else:
            typical[key] = typical_divergence(values).tolist()
    return {
        name: {key: values[ia] for key, values in typical.items()}
        for ia, name in enumerate(adapters)
    }


def _typical_sureness(sureness: F64) -> list[dict[str, float]]:
    """Give mean and spread of each adapter's sureness [n_prompt, n_adapter], in nats a token."""
    # Who shares a batch with a draft moves the last digits of its logits.
    means = np.round(sureness.mean(axis=0), 4)
    spreads = np.round(np.maximum(sureness.std(axis=0), _SPREAD_MIN), 4)
    pairs = zip(means.tolist(), spreads.tolist(), strict=True)
    return [{"mean": mean, "spread": spread} for mean, spread in pairs]


def _mean_and_spread(measured: Sequence[F64]) -> list[dict[str, Any]]:
    extents = np.stack([extent(each) for each in measured])
    means, spreads = extents.mean(axis=0), np.maximum(extents.std(axis=0), _SPREAD_MIN)
    distances = np.round((extents - means) / spreads, 3).T
    return [
        {"mean": float(m), "spread": float(s), "each": each.tolist()}
        for m, s, each in zip(means, spreads, distances, strict=True)
    ]
