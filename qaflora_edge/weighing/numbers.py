"""From divergences to fusion weights: arithmetic only, no files and no library.

The method is qa-FLoRA (AAAI 2026, arXiv 2512.11366). Divergences come out of the quantised head.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import QafloraError, WeightsError

N_TAIL = 16  # tokens of a prompt that the mix reads, where the base prefills the others
# Below this nothing in float32 states is an adapter's effect; the formula itself keeps its digits.
DIVERGENCE_FLOOR = 1e-30
_TYPICAL_EPS = 1e-12  # nats, see typical_divergence


def check_weights(
    weights: ArrayLike,
    adapters: Sequence[str],
    n_layer: int,
    *,
    source: str = "",
    error_type: type[QafloraError] = WeightsError,
) -> F32:
    """Check weights, and give them as float32 [n_adapter, n_layer].

    source  what messages begin with

    Raises an error of this type for another shape, or for values that are NaN or infinite.
    """
    try:
        array = np.asarray(weights, dtype=np.float32)
    except (TypeError, ValueError) as err:
        raise error_type(f"{source}Weights are not an array of numbers: {err}.") from err
    if array.shape != (len(adapters), n_layer):
        raise error_type(
            f"{source}Weights have the shape {list(array.shape)}, expected "
            f"[{len(adapters)}, {n_layer}]: one row for each of "
            f"{', '.join(adapters) or 'no adapters'}, one column per layer."
        )
    is_wrong = ~np.isfinite(array)
    if is_wrong.any():
        first = np.argwhere(is_wrong)[0]
        ia, il = first.tolist()
        raise error_type(
            f"{source}The weight of {adapters[ia]!r} at layer {il} is {array[ia, il]}, "
            "expected a finite number."
        )
    return array


def n_base_of(n_prompt: int) -> int:
    """Count the tokens of a prompt that the base prefills, where it prefills.

    The mix reads the last ones: benchmarks/one_reading.py compares other numbers of them.
    """
    return max(0, n_prompt - N_TAIL)


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
