"""From divergences to fusion weights: arithmetic only, no files and no library.

The method is qa-FLoRA (AAAI 2026, arXiv 2512.11366). Divergences come out of the quantised head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import WeightsError
from qaflora_edge.formats.inputs import Json
from qaflora_edge.weighing.drafted import BASE

if TYPE_CHECKING:
    from qaflora_edge.weighing.drafted import Relay
    from qaflora_edge.weighing.strategy import Measured, Reason

DEFAULT_STRATEGY = "qa-flora"
DEFAULT_LENS = "norm"
DEFAULT_POOL = "last"

N_TAIL = 16  # tokens of a prompt that the mix reads, where the base prefills the others
# Below this nothing in float32 states is an adapter's effect; the formula itself keeps its digits.
DIVERGENCE_FLOOR = 1e-30
_TYPICAL_EPS = 1e-12  # nats, see typical_divergence


@dataclass(frozen=True)
class FusionWeights:
    """Hold what adapters weigh for one query, and the measure behind it.

    adapters       names, in the order of the first axis
    weights        float32 [n_adapter, n_layer]
    divergence     float32 [n_adapter, n_layer] in the strategy's measure (KL in nats), or None
    prompt_tokens  tokens of the query
    probe_ms       time of the probe in milliseconds, 0 without one
    because, why   what decided where no layer differs: in words, and by adapter
    relay          who drafts, where these are the weights of who writes; else None
    begun          tokens with which a greedy answer begins, where a draft told: guesses
    """

    adapters: tuple[str, ...]
    weights: F32
    divergence: F32 | None = None
    strategy: str = "manual"
    lens: str = DEFAULT_LENS
    pool: str = DEFAULT_POOL
    prompt_tokens: int = 0
    probe_ms: float = 0.0
    because: str = ""
    why: "Mapping[str, Reason]" = field(default_factory=dict)
    relay: "Relay | None" = None
    begun: tuple[int, ...] = ()

    def to_dict(self) -> Json:
        """Give the object that `qaflora weights --json` prints."""
        divergence = None
        if self.divergence is not None:
            divergence = self.divergence.tolist()
        fields = {
            "adapters": list(self.adapters),
            "strategy": self.strategy,
            "lens": self.lens,
            "pool": self.pool,
            "n_layer": int(self.weights.shape[1]),
            "prompt_tokens": self.prompt_tokens,
            "divergence": divergence,
            "weights": self.weights.tolist(),
            "probe_ms": round(self.probe_ms, 3),
        }
        return fields | self.why_dict() | self.relay_dict()

    def relay_dict(self) -> Json:
        """Give `relay` for JSON: knower, writer, draft and how sure each was; else nothing."""
        if self.relay is None:
            return {}
        relay = self.relay
        sureness = {name: round(mean, 4) for name, mean in relay.sureness.items()}
        fields = {
            "knower": relay.knower,
            "writer": relay.writer,
            "draft": relay.draft.text,
            "draft_tokens": len(relay.draft.tokens),
            "draft_ms": round(relay.draft_ms, 3),
            "sureness": sureness,
        }
        return {"relay": fields}

    def why_dict(self) -> Json:
        """Give `because` and `why` for JSON; nothing where there are none."""
        if not self.because:
            return {}
        reasons = {name: asdict(reason) for name, reason in self.why.items()}
        return {"because": self.because, "why": reasons}

    @property
    def measured(self) -> "Measured":
        """Give name and unit of `divergence`: what the strategy measures."""
        from qaflora_edge.weighing.strategy import measured_by

        return measured_by(self.strategy)

    @property
    def means(self) -> dict[str, float]:
        """Map each adapter to its mean weight over layers."""
        means = self.weights.mean(axis=1)
        return {name: float(mean) for name, mean in zip(self.adapters, means, strict=True)}

    @property
    def chosen(self) -> tuple[str, ...]:
        """Name the adapters with a mean weight above 0, heaviest first."""
        means = self.means
        heaviest_first = sorted(means, key=means.__getitem__, reverse=True)
        return tuple(name for name in heaviest_first if means[name] > 0)

    def __repr__(self) -> str:
        from qaflora_edge.show.text import who_spoke

        n_layer = self.weights.shape[1]
        return f"<FusionWeights {self.strategy}, {n_layer} layers: {who_spoke(self)}>"


def check_weights(
    weights: ArrayLike, adapters: Sequence[str], n_layer: int, *, source: str = ""
) -> F32:
    """Check weights, and give them as float32 [n_adapter, n_layer].

    source  what messages begin with

    Raises WeightsError for another shape, or for values that are NaN or infinite.
    """
    try:
        array = np.asarray(weights, dtype=np.float32)
    except (TypeError, ValueError) as err:
        raise WeightsError(f"{source}Weights are not an array of numbers: {err}.") from err
    if array.shape != (len(adapters), n_layer):
        raise WeightsError(
            f"{source}Weights have the shape {list(array.shape)}, expected "
            f"[{len(adapters)}, {n_layer}]: one row for each of "
            f"{', '.join(adapters) or 'no adapters'}, one column per layer."
        )
    is_wrong = ~np.isfinite(array)
    if is_wrong.any():
        first = np.argwhere(is_wrong)[0]
        ia, il = first.tolist()
        raise WeightsError(
            f"{source}The weight of {adapters[ia]!r} at layer {il} is {array[ia, il]}, "
            "expected a finite number."
        )
    return array


def n_base_of(n_prompt: int) -> int:
    """Count the tokens of a prompt that the base prefills, where it prefills.

    The mix reads the last ones: benchmarks/one_reading.py compares other numbers of them.
    """
    return max(0, n_prompt - N_TAIL)


def alone_weights(name: str, adapters: Sequence[str], n_layer: int) -> F32:
    """Give float32 [n_adapter, n_layer] of one adapter at 1, or of BASE."""
    weights = np.zeros((len(adapters), n_layer), np.float32)
    if name != BASE:
        weights[adapters.index(name)] = 1
    return weights


def normalise(divergence: ArrayLike) -> F32:
    """Weigh each adapter by its share of a layer's divergence.

    divergence  [n_adapter, n_layer]  >= 0
    returns     [n_adapter, n_layer]  >= 0; each column sums to 1, to 1/n_adapter each where
                                      all divergences are below the numerical floor
    """
    div = np.asarray(divergence, dtype=np.float64)
    div = np.where(div < DIVERGENCE_FLOOR, 0.0, div)
    total = div.sum(axis=0, keepdims=True)
    n_adapter = max(1, div.shape[0])
    is_measured = total > 0.0
    divisor = np.where(is_measured, total, 1.0)
    with np.errstate(invalid="ignore"):
        shares = div / divisor
    weights = np.where(is_measured, shares, 1.0 / n_adapter)
    return weights.astype(np.float32)


def softmax(values: ArrayLike) -> F64:
    """Compute exp(values) / sum exp(values) over the first axis: float64 of the same shape."""
    z = np.asarray(values, np.float64)
    largest = z.max(axis=0, keepdims=True)
    p = np.exp(z - largest)
    total = p.sum(axis=0, keepdims=True)
    return np.asarray(p / total)


def calibrate(divergence: ArrayLike, typical: ArrayLike) -> F64:
    """Divide divergences by each adapter's typical ones.

    divergence  [n_adapter, n_layer]
    typical     [n_adapter, n_layer]  > 0, geometric mean over neutral prompts
    returns     [n_adapter, n_layer]; 0 where the divergence is below the numerical floor
    """
    div = np.asarray(divergence, dtype=np.float64)
    relative = div / np.asarray(typical, dtype=np.float64)
    return np.where(div < DIVERGENCE_FLOOR, 0.0, relative)


def typical_divergence(divergences: ArrayLike) -> F64:
    """Take the geometric mean over prompts: exp(mean log(div + 1e-12)).

    divergences  [n_prompt, n_adapter, n_layer]
    returns      [n_adapter, n_layer]  > 0
    """
    div = np.asarray(divergences, dtype=np.float64)
    logs = np.log(div + _TYPICAL_EPS)
    return np.asarray(np.exp(logs.mean(axis=0)))


def cosine_distance(base: ArrayLike, adapted: ArrayLike) -> F64:
    """Measure 1 - cos of states: base [n_layer, n_embd], adapted [n_adapter, n_layer, n_embd].

    returns  float64 [n_adapter, n_layer], as |a/|a| - b/|b||^2 / 2: close states do not cancel
    """
    difference = _unit(base) - _unit(adapted)
    squares = (difference**2).sum(axis=-1)
    return np.asarray(squares / 2.0)


def _unit(states: ArrayLike) -> F64:
    wide = np.asarray(states, np.float64)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.asarray(wide / lengths)


def euclidean_distance(base: ArrayLike, adapted: ArrayLike) -> F64:
    """Measure |h_j - h|: base [n_layer, n_embd], adapted [n_adapter, n_layer, n_embd]."""
    wide_base = np.asarray(base, np.float64)
    difference = np.asarray(adapted, np.float64) - wide_base
    return np.asarray(np.linalg.norm(difference, axis=-1))
