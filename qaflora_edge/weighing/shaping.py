"""Options of probed strategies: sharper and larger mixes, and few of many adapters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.numbers import normalise


def shaped(weights: F32, options: Mapping[str, Any], source: str) -> F32:
    """Apply power, layers, top and total, in this order; without any, weights stay as they are.

    weights  [n_adapter, n_layer], finite, of a strategy
    options  given ones of config.SHAPING
    source   begins messages
    returns  [n_adapter, n_layer]

    Raises StrategyError for options on weights below 0.
    """
    if not options.keys() & {"power", "layers", "top", "total"}:
        return weights
    share = np.asarray(weights, np.float64)
    if (share < 0).any():
        raise StrategyError(
            f"{source}its weights go down to {share.min():g}, expected none below 0 where power, "
            "layers, top or total shape them; leave these options out."
        )
    share = normalise(_power(share, options.get("power", 1.0))).astype(np.float64)
    if options.get("layers") == "mean":
        share = np.repeat(share.mean(axis=1, keepdims=True), share.shape[1], axis=1)
    if (top := options.get("top")) is not None:
        share = _heaviest(share, top)
    return (share * _factor(share, options.get("total", 1.0))).astype(np.float32)


def _power(share: F64, power: float) -> F64:
    """Raise each layer's shares of its largest one to a power; they cannot all underflow."""
    largest = share.max(axis=0, keepdims=True)
    powers: F64 = np.divide(share, largest, out=np.zeros_like(share), where=largest > 0) ** power
    return powers


def _heaviest(share: F64, top: int) -> F64:
    """Keep the `top` adapters of the largest mean over layers; the others get 0."""
    kept = np.argsort(-share.mean(axis=1), kind="stable")[:top]
    left = np.zeros_like(share)
    left[kept] = normalise(share[kept])
    return left


def _factor(share: F64, total: float | str) -> F64 | float:
    """Compute the factor of a layer's shares: one number, or [1, n_layer]."""
    if total == "l2":
        norms: F64 = np.sqrt((share**2).sum(axis=0, keepdims=True))
        return 1.0 / norms
    return float(total)
