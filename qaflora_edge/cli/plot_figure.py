"""Fusion weights as PNG or SVG, by matplotlib: a panel per prompt, all on one scale."""

import io
import math
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qaflora_edge.cli.plot_fonts import Fonts, fonts_for
from qaflora_edge.cli.prompts import Prompt
from qaflora_edge.cli.show import mean_weights
from qaflora_edge.show.picture_text import beginning, crop, spelt, wrap
from qaflora_edge.show.svg_panel import (
    TICK,
    cell_title,
    facts,
    leading_layers,
    legend_words,
    min_weight,
    scale,
    short_name,
)
from qaflora_edge.weighing.numbers import FusionWeights

DPI, PIXELS_MAX = 150, 30_000  # the second is what common viewers still open
LAYER_INCHES, ROW_INCHES, LINE_INCHES, WIDTH_INCHES_MAX = 0.22, 0.36, 0.2, 30.0
TITLE_LINES, HEADING_POINTS, TITLE_POINTS, NAME_POINTS = 2, 15, 12, 11
PROMPT_CHARS = 4000  # of each prompt, kept in the file
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Palette:
    """Colours of a picture; ramp is what weights are drawn in, lowest first."""

    paper: str
    text: str
    quiet: str
    line: str
    ramp: tuple[str, ...]


LIGHT = Palette(
    "#ffffff", "#1b1f24", "#57606a", "#d0d7de", ("#ffffff", "#7fb2dc", "#0b4f8a", "#05203d")
)
DARK = Palette(
    "#14181d", "#e6edf3", "#9aa4af", "#333b44", ("#14181d", "#1f5f96", "#5aaef2", "#e3f3ff")
)


def figure(
    weighed: Sequence[tuple[Prompt, FusionWeights]],
    subject: str,
    *,
    kind: str,
    dpi: int = DPI,
    is_dark: bool = False,
) -> tuple[bytes, int, str]:
    """The picture, the dpi it has, and the characters that no font of this machine has.

    subject  names of bundle and base
    kind     png or svg; an SVG leaves fonts to the viewer, so that nothing is missing there
    """
    from matplotlib import rc_context

    palette = DARK if is_dark else LIGHT
    texts = [subject, *weighed[0][1].adapters, *(prompt.label for prompt, _ in weighed)]
    fonts = fonts_for("".join([*map(beginning, texts), "…"]))
    settings = {
        "font.family": [*fonts.families, *(["sans-serif"] if kind == "svg" else [])],
        "text.color": palette.text,
        "text.parse_math": False,  # a dollar sign in a name is no formula
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "qaflora",
    }
    buffer = io.BytesIO()
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # only SVG has what no font here has
        drawn = _draw(weighed, subject, palette, fonts, can_miss=kind == "svg")
        dpi = min(dpi, math.floor(PIXELS_MAX / max(drawn.get_size_inches())))
        kept = _metadata(weighed, subject)
        kept |= {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        drawn.savefig(buffer, format=kind, dpi=dpi, metadata=kept)
    if kind == "png":
        return buffer.getvalue(), dpi, "".join(sorted(fonts.missing))
    return _with_cell_titles(buffer.getvalue(), [fusion for _, fusion in weighed]), dpi, ""


def n_columns(n_panel: int, n_fitting: int) -> int:
    """Columns for panels about three times as wide as high, so that the whole is about square."""
    return max(1, min(n_fitting, round(math.sqrt(n_panel / 3))))


def _metadata(weighed: Sequence[tuple[Prompt, FusionWeights]], subject: str) -> dict[str, Any]:
    """What the file says of itself: names, how the weights came about, and the prompts."""
    prompts = [
        f"{number}. {spelt(prompt.text[:PROMPT_CHARS])}{'…' * (len(prompt.text) > PROMPT_CHARS)}"
        for number, (prompt, _) in enumerate(weighed, 1)
    ]
    return {
        "Title": f"Weights of {spelt(subject)}",
        "Description": "\n".join([facts([fusion for _, fusion in weighed]), *prompts]),
    }


def _draw(
    weighed: Sequence[tuple[Prompt, FusionWeights]],
    subject: str,
    palette: Palette,
    fonts: Fonts,
    *,
    can_miss: bool,
) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    def shown(text: str) -> str:
        return text if can_miss else fonts.shown(text)

    def measure(points: int) -> Callable[[str], float]:
        return lambda text: _inches(fonts.shown(text), points)

    fusions = [fusion for _, fusion in weighed]
    n_adapter, n_layer = fusions[0].weights.shape
    names = [shown(short_name(name)) for name in fusions[0].adapters]
    names_width = max(map(measure(NAME_POINTS), map(short_name, fusions[0].adapters)))
    room = max(5.0, LAYER_INCHES * n_layer)
    titles = [
        prompt.label if len(weighed) == 1 else f"{number}. {prompt.label}"
        for number, (prompt, _) in enumerate(weighed, 1)
    ]
    wrapped = [wrap(title, room, measure(TITLE_POINTS), n_line=TITLE_LINES) for title in titles]
    n_line = max(map(len, wrapped))
    width = room + names_width + 0.9
    height = 0.9 + ROW_INCHES * n_adapter + LINE_INCHES * (n_line - 1)
    n_column = n_columns(len(fusions), int(WIDTH_INCHES_MAX // width))
    n_row = math.ceil(len(fusions) / n_column)
    size = width * n_column, height * n_row + 1.5
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    drawn = Figure(size, layout=layout, facecolor=palette.paper)
    grid = list(drawn.subplots(n_row, n_column, squeeze=False).flat)
    colours = LinearSegmentedColormap.from_list("weights", palette.ramp)
    ends = scale(fusions)
    meshes = [
        _panel(axes, "\n".join(map(shown, lines)), names, fusion, ends, colours, palette)
        for axes, lines, fusion in zip(grid, wrapped, fusions, strict=False)
    ]
    for index, mesh in enumerate(meshes):
        mesh.set_gid(f"cells-{index}")
    for axes in grid[len(fusions) :]:
        axes.set_axis_off()
    heading = crop(subject, size[0] - 0.4, measure(HEADING_POINTS))
    drawn.suptitle(shown(heading), fontsize=HEADING_POINTS)
    bar = drawn.colorbar(
        meshes[0],
        ax=grid,
        orientation="horizontal",
        fraction=0.02,
        aspect=40,
        shrink=0.5,
        ticks=[ends[0], sum(ends) / 2, ends[1]],
        format="%g",
    )
    words = f"weight; a dot: {legend_words(min_weight(fusions))} ({facts(fusions)})"
    lines = wrap(words, size[0] - 0.4, measure(NAME_POINTS), n_line=4)
    drawn.supxlabel("\n".join(lines), fontsize=NAME_POINTS)
    bar.ax.tick_params(labelsize=NAME_POINTS, colors=palette.text)
    bar.outline.set_edgecolor(palette.quiet)
    return drawn


def _inches(text: str, points: int) -> float:
    """How wide a text is drawn."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    properties = FontProperties(size=points)
    width, _, _ = text_to_path.get_text_width_height_descent(text, properties, ismath=False)
    return float(width) / 72


def _panel(
    axes: Any,
    title: str,
    names: list[str],
    fusion: FusionWeights,
    ends: tuple[float, float],
    colours: Any,
    palette: Palette,
) -> Any:
    n_adapter, n_layer = fusion.weights.shape
    low, high = ends
    mesh = axes.pcolormesh(
        fusion.weights, cmap=colours, vmin=low, vmax=high, edgecolors=palette.line, linewidth=0.8
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(n_adapter) + 0.5, names)
    axes.set_xticks(np.arange(0, n_layer, TICK) + 0.5, range(0, n_layer, TICK))
    axes.tick_params(length=0, labelsize=NAME_POINTS, colors=palette.text)
    axes.spines[:].set_visible(False)
    axes.set_facecolor(palette.paper)
    axes.set_title(title, fontsize=TITLE_POINTS, loc="left")
    axes.set_xlabel("layer", fontsize=NAME_POINTS, color=palette.quiet)
    for row, mean in enumerate(mean_weights(fusion).values()):
        axes.text(n_layer + 0.3, row + 0.5, f"{mean:.2f}", va="center", fontsize=NAME_POINTS)
    axes.text(n_layer + 0.3, n_adapter + 0.1, "mean", va="top", fontsize=NAME_POINTS)

    def against(row: int, layer: int) -> str:
        """A colour that is seen on a cell."""
        is_strong = fusion.weights[row, layer] - low > (high - low) / 2
        return palette.paper if is_strong else palette.text

    for row, layers in enumerate(leading_layers(fusion)):
        dots = [against(row, layer) for layer in layers]
        axes.scatter(np.add(layers, 0.5), [row + 0.78] * len(layers), s=8, c=dots, linewidths=0)
    for row, layer in np.argwhere(fusion.weights < 0):
        axes.text(layer + 0.5, row + 0.5, "−", ha="center", va="center", fontsize=NAME_POINTS)
    return mesh


def _with_cell_titles(data: bytes, fusions: Sequence[FusionWeights]) -> bytes:
    """An SVG of matplotlib whose cells say their numbers when they are pointed at."""
    for prefix, space in (
        ("", SVG[1:-1]),
        ("xlink", "http://www.w3.org/1999/xlink"),
        ("cc", "http://creativecommons.org/ns#"),
        ("dc", "http://purl.org/dc/elements/1.1/"),
        ("rdf", "http://www.w3.org/1999/02/22-rdf-syntax-ns#"),
    ):
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(data)
    groups = {group.get("id"): group for group in root.iter(f"{SVG}g")}
    for index, fusion in enumerate(fusions):
        cells = groups[f"cells-{index}"].iter(f"{SVG}path")
        for at, cell in zip(np.ndindex(fusion.weights.shape), list(cells), strict=True):
            title = ElementTree.SubElement(cell, f"{SVG}title")
            title.text = spelt(cell_title(fusion, *at))
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
