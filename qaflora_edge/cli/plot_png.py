"""Fusion weights as PNG, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.cli.heatmap import scale_top
from qaflora_edge.cli.plot_fonts import fonts_for
from qaflora_edge.cli.plot_svg import INK, PAPER, QUIET, facts, n_columns, panel_title, short_name
from qaflora_edge.cli.plot_text import one_line, wrap
from qaflora_edge.cli.show import leading_layers, mean_weights

if TYPE_CHECKING:
    from qaflora_edge.cli.prompts import Prompt
    from qaflora_edge.weighing.numbers import FusionWeights

DPI, PIXELS_MAX = 150, 30_000  # the second is what common viewers still open
LAYER_INCHES, ROW_INCHES, LINE_INCHES, WIDTH_INCHES_MAX = 0.15, 0.3, 0.17, 22.0
TITLE_LINES, TITLE_POINTS, NAME_POINTS = 2, 9, 8


def png(weighed: Sequence[tuple[Prompt, FusionWeights]]) -> tuple[bytes, str]:
    """A panel per prompt, all on one scale; and the characters that no font here has."""
    from matplotlib import rc_context

    fusions = [fusion for _, fusion in weighed]
    titles = [
        one_line(panel_title(index, prompt, len(weighed)))
        for index, (prompt, _) in enumerate(weighed)
    ]
    names = [short_name(name) for name in fusions[0].adapters]
    fonts = fonts_for("".join([*titles, *names, "…"]))
    titles, names = [fonts.shown(title) for title in titles], [fonts.shown(name) for name in names]
    with rc_context({"font.family": list(fonts.families)}):
        data = _draw(fusions, titles, names)
    return data, "".join(sorted(fonts.missing))


def _draw(fusions: list[FusionWeights], titles: list[str], names: list[str]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    top = scale_top(fusions)
    n_adapter, n_layer = fusions[0].weights.shape
    width = max(4.5, 2.0 + LAYER_INCHES * n_layer)
    figure = Figure(layout="constrained", facecolor=PAPER, dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    names_width = max(_inches(canvas, name, NAME_POINTS) for name in names)
    wrapped = [
        wrap(
            title,
            width - names_width - 0.3,
            lambda text: _inches(canvas, text, TITLE_POINTS),
            n_line=TITLE_LINES,
        )
        for title in titles
    ]
    n_line = max(len(lines) for lines in wrapped)
    height = 0.9 + ROW_INCHES * n_adapter + LINE_INCHES * (n_line - 1)
    n_column = n_columns(len(fusions), int(WIDTH_INCHES_MAX // width))
    n_row = math.ceil(len(fusions) / n_column)
    size = width * n_column, height * n_row + 1.2
    figure.set_size_inches(size)
    grid = list(figure.subplots(n_row, n_column, squeeze=False).flat)
    colours = LinearSegmentedColormap.from_list("weights", [PAPER, INK])
    images = [
        _panel(axes, "\n".join(lines), names, fusion, top, colours)
        for axes, lines, fusion in zip(grid, wrapped, fusions, strict=False)
    ]
    for axes in grid[len(fusions) :]:
        axes.set_axis_off()
    figure.suptitle(f"Weight of each adapter at each layer\n{facts(fusions)}", fontsize=11)
    bar = figure.colorbar(
        images[0], ax=grid, orientation="horizontal", fraction=0.02, aspect=40, shrink=0.4
    )
    bar.set_label("weight; a dot: weighs most at this layer", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    dpi = min(DPI, PIXELS_MAX / max(size))
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _inches(canvas: Any, text: str, points: int) -> float:
    """How wide a text is drawn."""
    from matplotlib.font_manager import FontProperties

    renderer = canvas.get_renderer()
    width, _, _ = renderer.get_text_width_height_descent(
        text, FontProperties(size=points), ismath=False
    )
    return float(width) / DPI


def _panel(
    axes: Any, title: str, names: list[str], fusion: FusionWeights, top: float, colours: Any
) -> Any:
    n_adapter, n_layer = fusion.weights.shape
    image = axes.imshow(
        fusion.weights, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(n_adapter), names)
    axes.set_xticks(range(0, n_layer, 5))
    axes.set_yticks(np.arange(n_adapter + 1) - 0.5, minor=True)
    axes.set_xticks(np.arange(n_layer + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1)
    axes.tick_params(which="both", length=0, labelsize=NAME_POINTS)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=TITLE_POINTS, loc="left", parse_math=False)
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
