"""Calibration: what is typical of an adapter over neutral prompts, as bundle.json stores it."""

import math
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.config import LENSES
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.inputs import Json
from qaflora_edge.weighing.numbers import typical_divergence
from qaflora_edge.weighing.strategy import Query

# One number a layer: the geometric mean of the KL at the last token, or of the question's states.
LAYERS = (*LENSES, *(f"question_{lens}" for lens in LENSES))
# Mean and spread of `extent` of Probe.added, and each prompt's distance from the mean in spreads,
# by passes of the base alone: at the last token and in the question of a first turn, at the last
# token of plain text, and at both places of a later turn.
EXTENTS = ("added_last", "added_question", "added_text", "later_last", "later_question")
# Mean and spread over neutral chats, of drafts: the base's log p of an adapter's first token, and
# how sure an adapter is of its words (relay.sureness).
DRAFTED = ("opening", "sureness")
KEYS = (*LAYERS, *EXTENTS, *DRAFTED)

_EPS = 1e-12  # added before a logarithm; layers of 0 change no surprise
_COPY = 0.85  # correlation of versions of one adapter: .9 and above; of others .73 and below
_SPREAD_MIN = 0.01  # an adapter that always does the same would surprise whatever it does
_ASKED_FOR = 0.7  # spreads by which a system prompt raises an adapter that it asks for
_SHIFT_LATER = 0.5  # of a system prompt's shift, behind other turns


def extent(measured: F64) -> F64:
    """Sum up what an adapter does in one number: the mean over layers of log(x + 1e-12).

    measured  [n_adapter, n_layer]  >= 0, in any unit
    returns   [n_adapter]
    """
    logs = np.log(measured + _EPS)  # [n_adapter, n_layer]
    return np.asarray(logs.mean(axis=1))


def above_typical(query: Query, key: str, measured: F64) -> F64:
    """Tell how far extents are above the typical ones, in standard deviations: float64 [n_adapter].

    key       one of EXTENTS
    measured  [n_adapter, n_layer]
    """
    means = []
    spreads = []
    for name in query.adapters:
        typical = query.typical[name][key]
        means.append(typical["mean"])
        spreads.append(typical["spread"])
    above_mean = extent(measured) - np.array(means)  # [n_adapter]
    return np.asarray(above_mean / np.array(spreads))


def without_system(query: Query, added: F64, keys: Sequence[str], neutral: F64) -> F64:
    """Take out of what adapters add what the query's system prompt adds, whatever is asked.

    added    [2, n_adapter, n_layer]  at the last token, and in the question
    keys     of EXTENTS, for both
    neutral  of neutral prompts, as usual and behind the system prompt:
             [2, 2, n_prompt, n_adapter, n_layer]
    returns  as `added`, in its unit

    An adapter that it raises far is one that it asks for, such as a language's, and stays as it is.
    """
    usual, behind = np.log(neutral + _EPS).mean(axis=-1)  # [2, n_prompt, n_adapter]
    shift = (behind - usual).mean(axis=1)  # [2, n_adapter]
    at_last, _ = keys
    spread = np.array([query.typical[name][at_last]["spread"] for name in query.adapters])
    is_asked_for = shift[0] > _ASKED_FOR * spread
    shift[:, is_asked_for] = 0.0
    if query.is_later:
        shift *= _SHIFT_LATER
    return np.asarray(added * np.exp(-shift)[..., None])


def unusual(query: Query, measured: Mapping[str, F64]) -> F64:
    """Tell how unusual extents are, in standard deviations: float64 [n_adapter].

    measured  one or several of EXTENTS -> [n_adapter, n_layer]; several count together, equally

    What adapters alike predict is subtracted, because a greeting raises many: their mean, weighted
    by correlation over the neutral prompts, times three quarters of its slope, as these are few.
    Near copies predict nothing, or versions of one adapter would hide each other.
    """
    prompts = _neutral_distances(query, list(measured))  # [n_adapter, n_place, n_prompt]
    shares = _shares_of_alike(prompts)

    # A regression through 0 over the neutral prompts: distance = slope * expected + rest.
    distance = prompts.sum(axis=1)  # [n_adapter, n_prompt]
    expected = shares @ distance
    variance = (distance**2).mean(axis=1)  # [n_adapter]
    covariance = (distance * expected).mean(axis=1)
    variance_expected = (expected**2).mean(axis=1)
    divisor = np.maximum(variance_expected, _EPS)
    slope = 0.75 * covariance / divisor
    explained = slope**2 * variance_expected
    n_place = len(measured)
    variance_rest = np.maximum(variance, n_place) - explained

    above = np.zeros(len(query.adapters))  # of this query
    for key, values in measured.items():
        above += above_typical(query, key, values)
    above_expected = shares @ above
    rest = above - slope * above_expected
    spread = np.sqrt(variance_rest)
    return np.asarray(rest / spread)


def _shares_of_alike(prompts: F64) -> F64:
    """Give the share of each other adapter in what one is expected to do, by correlation.

    prompts  [n_adapter, n_place, n_prompt]  in standard deviations
    returns  [n_adapter, n_adapter]          rows sum to 1, or 0 where nobody is alike
    """
    _, n_place, n_prompt = prompts.shape
    products = np.einsum("akn,bkn->ab", prompts, prompts)
    correlation = products / (n_place * n_prompt)
    is_copy = correlation >= _COPY
    shares = np.maximum(correlation, 0)
    shares[is_copy] = 0
    np.fill_diagonal(shares, 0)
    totals = shares.sum(axis=1, keepdims=True)  # [n_adapter, 1]
    shares /= np.maximum(totals, _EPS)
    return np.asarray(shares)


def _neutral_distances(query: Query, keys: Sequence[str]) -> F64:
    """Give how far neutral prompts were from the mean, as far as all adapters have them.

    returns  [n_adapter, n_key, n_prompt]  in standard deviations
    """
    rows = []
    for name in query.adapters:
        typical = query.typical[name]
        for key in keys:
            rows.append(typical[key].get("each", ()))
    n_prompt = min(map(len, rows))
    if n_prompt == 0:  # nothing is known of them: as one prompt that is as the mean
        return np.zeros((len(query.adapters), len(keys), 1))
    shared_rows = [row[:n_prompt] for row in rows]
    shared = np.array(shared_rows, np.float64)
    return shared.reshape(len(query.adapters), len(keys), n_prompt)


def check_typical(strategy: str, query: Query, keys: Sequence[str]) -> None:
    """Raise StrategyError for adapters of which some of these keys were not measured."""
    lacking = [name for name in query.adapters if {*keys} - {*query.typical.get(name, {})}]
    if not lacking:
        return
    finish = "`qaflora bundle create` and `add` measure it, unless --no-calibrate is given."
    if query.folder:
        command = shlex.join(["qaflora", "bundle", "calibrate", query.folder])
        finish = f"Measure it with `{command}`."
    raise StrategyError(
        f"Strategy {strategy} needs to know what each adapter does to everyday prompts, and that "
        f"was not measured of {', '.join(lacking)}. {finish}"
    )


def adds_nothing(typical: Mapping[str, Mapping[str, float]]) -> bool:
    """Tell whether an adapter added nothing to q, k and v of any block.

    typical  of this adapter, by EXTENTS
    """
    return typical["added_last"]["mean"] < math.log(_EPS) + 1e-3


def typical_of(measured: Mapping[str, Sequence[F64]], adapters: Sequence[str]) -> dict[str, Json]:
    """Sum up what was measured of each adapter over neutral prompts.

    measured  one of KEYS -> of each prompt float64 [n_adapter, n_layer]; of DRAFTED [n_adapter]
    returns   adapter -> one of KEYS -> a list of n_layer numbers, or mean and spread, and each
    """
    typical = {}
    for key, values in measured.items():
        if key in EXTENTS:
            typical[key] = _mean_and_spread(values)
        elif key in DRAFTED:
            typical[key] = _typical_drafts(np.stack(values))
        else:
            typical[key] = typical_divergence(values).tolist()
    by_adapter: dict[str, Json] = {}
    for ia, name in enumerate(adapters):
        by_adapter[name] = {key: values[ia] for key, values in typical.items()}
    return by_adapter


def _typical_drafts(nats: F64) -> list[dict[str, float]]:
    """Give mean and spread of one of DRAFTED [n_prompt, n_adapter], in nats."""
    # Who shares a batch with a draft moves the last digits of its logits.
    means = np.round(nats.mean(axis=0), 4)  # [n_adapter]
    spreads = np.maximum(nats.std(axis=0), _SPREAD_MIN)
    spreads = np.round(spreads, 4)
    typical = []
    for mean, spread in zip(means.tolist(), spreads.tolist(), strict=True):
        numbers = {"mean": mean, "spread": spread}
        typical.append(numbers)
    return typical


def _mean_and_spread(measured: Sequence[F64]) -> list[Json]:
    """Give mean and spread of each adapter's extent, and each prompt's distance from the mean."""
    by_prompt = [extent(of_prompt) for of_prompt in measured]
    extents = np.stack(by_prompt)  # [n_prompt, n_adapter]
    means = extents.mean(axis=0)  # [n_adapter]
    spreads = np.maximum(extents.std(axis=0), _SPREAD_MIN)
    distances = (extents - means) / spreads
    by_adapter = np.round(distances, 3).T.tolist()  # [n_adapter][n_prompt]
    typical = []
    for mean, spread, of_adapter in zip(means.tolist(), spreads.tolist(), by_adapter, strict=True):
        numbers = {"mean": mean, "spread": spread, "each": of_adapter}
        typical.append(numbers)
    return typical
