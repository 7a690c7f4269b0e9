"""Fusion weights as PNG, by matplotlib."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.cli.heatmap import scale_top
from qaflora_edge.cli.plot_svg import INK, LABEL_MAX, PAPER, QUIET, crop, facts, n_columns
from qaflora_edge.cli.show import leading_layers, mean_weights

if TYPE_CHECKING:
    from qaflora_edge.cli.prompts import Prompt
    from qaflora_edge.fusion import FusionWeights

DPI, PIXELS_MAX = 150, 30_000  # the second is what common viewers still open
LAYER_INCHES, ROW_INCHES, WIDTH_INCHES_MAX = 0.15, 0.3, 22.0


def png(weighed: Sequence[tuple[Prompt, FusionWeights]]) -> bytes:
    """A panel per prompt, all on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    fusions = [fusion for _, fusion in weighed]
    top = scale_top(fusions)
    n_adapter, n_layer = fusions[0].weights.shape
    panel = max(4.5, 2.0 + LAYER_INCHES * n_layer), 0.9 + ROW_INCHES * max(1, n_adapter)
    n_column = n_columns(len(weighed), int(WIDTH_INCHES_MAX // panel[0]))
    n_row = math.ceil(len(weighed) / n_column)
    size = panel[0] * n_column, panel[1] * n_row + 1.2
    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(n_row, n_column, squeeze=False).flat)
    colours = LinearSegmentedColormap.from_list("weights", [PAPER, INK])
    n_char = int(panel[0] * 13)
    images = [
        _panel(axes, prompt, fusion, top, colours, n_char)
        for axes, (prompt, fusion) in zip(grid, weighed, strict=False)
    ]
    for axes in grid[len(weighed) :]:
        axes.set_axis_off()
    figure.suptitle(f"Weight of each adapter at each layer\n{facts(fusions)}", fontsize=11)
    bar = figure.colorbar(
        images[0], ax=grid, orientation="horizontal", fraction=0.02, aspect=40, shrink=0.4
    )
    bar.set_label("weight; a dot: weighs most at this layer", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, which says it as well.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        dpi = min(DPI, PIXELS_MAX / max(size))
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _panel(
    axes: Any, prompt: Prompt, fusion: FusionWeights, top: float, colours: Any, n_char: int
) -> Any:
    n_adapter, n_layer = fusion.weights.shape
    image = axes.imshow(
        fusion.weights, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(n_adapter), [crop(name, LABEL_MAX) for name in fusion.adapters])
    axes.set_xticks(range(0, n_layer, 5))
    axes.set_yticks(np.arange(n_adapter + 1) - 0.5, minor=True)
    axes.set_xticks(np.arange(n_layer + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1)
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(crop(prompt.label, n_char), fontsize=9, loc="left", parse_math=False)
    axes.set_xlabel("layer", fontsize=8, color=QUIET)
    # A dollar sign in a name is no formula.
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    for row, mean in enumerate(mean_weights(fusion).values()):
        axes.text(n_layer - 0.2, row, f"{mean:.2f}", va="center", fontsize=8)
    axes.text(1.012, -0.03, "mean", va="top", fontsize=8, transform=axes.transAxes)
    for row, layers in enumerate(leading_layers(fusion)):
        dark = [fusion.weights[row, layer] / top > 0.5 for layer in layers]
        axes.scatter(layers, [row + 0.3] * len(layers), s=4, c=[PAPER if d else INK for d in dark])
    for row, layer in np.argwhere(fusion.weights < 0):
        axes.text(layer, row, "−", ha="center", va="center", fontsize=8)
    return image
