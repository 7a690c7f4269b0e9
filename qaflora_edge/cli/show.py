"""Fusion weights in words and as strips with one sign per layer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qaflora_edge.fusion import FusionWeights

BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "0123456789"
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
EQUAL = 1e-6  # weights are shares in float32: closer ones are one weight


def can_show(text: str, encoding: str | None) -> bool:
    """Tell whether an encoding has every sign of a text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def strip(weights: list[float], signs: str) -> str:
    """One sign per layer: the first for 0, the last for 1 (and beyond)."""
    return "".join(signs[max(0, min(len(signs) - 1, int(w * len(signs))))] for w in weights)


def mean_weights(fusion: FusionWeights) -> dict[str, float]:
    """Adapter -> mean weight over layers."""
    means = fusion.weights.mean(axis=1)
    return {name: float(mean) for name, mean in zip(fusion.adapters, means, strict=True)}


def mix_line(fusion: FusionWeights) -> str:
    """The mean weights in one line, such as `math 0.52, es 0.26`."""
    means = mean_weights(fusion)
    return ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()) or "no adapters"


def leading_layers(fusion: FusionWeights) -> list[list[int]]:
    """The layers at which each adapter weighs more than every other: a list per adapter.

    Weights that differ by less than 1e-6 count as equal, and then no adapter leads the layer.
    """
    leads: list[list[int]] = [[] for _ in fusion.adapters]
    for layer, column in enumerate(fusion.weights.T.tolist()):
        largest = max(column, default=0.0)
        near = [index for index, weight in enumerate(column) if largest - weight < EQUAL]
        if len(near) == 1 and largest > 0:
            leads[near[0]].append(layer)
    return leads


def layer_ranges(layers: list[int], dash: str) -> str:
    """Layers in ascending order as text, such as `0–3, 7`; `none` without any."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    shown = (f"{a}" if a == b else f"{a}{dash}{b}" for a, b in runs)
    return ", ".join(shown) or "none"


def strips(fusion: FusionWeights, encoding: str | None) -> list[str]:
    """A line per adapter: name, mean weight, and a strip over the layers."""
    signs = BLOCKS if can_show(BLOCKS, encoding) else DIGITS
    width = max((len(name) for name in fusion.adapters), default=0)
    rows = zip(mean_weights(fusion).items(), fusion.weights.tolist(), strict=True)
    return [
        f"{name:<{width}}  {mean:5.2f}  "
        + paint(strip(weights, signs), COLOURS[index % len(COLOURS)])
        for index, ((name, mean), weights) in enumerate(rows)
    ]


def paint(text: str, colour: str) -> str:
    """Colour a text, unless NO_COLOR asks for none; click drops colour off a terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=colour)
