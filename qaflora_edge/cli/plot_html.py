"""Fusion weights as one HTML file that stands alone: no file, font or host beside it is asked.

Pointing at a cell, tapping it or walking to it with the arrow keys shows weight and divergence;
without scripts the cells' titles and the tables still say everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaflora_edge.cli.html_file import asset, html_file
from qaflora_edge.cli.show import layer_ranges
from qaflora_edge.weighing.picture_text import crop, spelt
from qaflora_edge.weighing.svg_panel import (
    clean,
    facts,
    leading_layers,
    legend,
    min_weight,
    panel,
    panel_width,
    scale,
    unit,
)

if TYPE_CHECKING:
    from qaflora_edge.cli.prompts import Prompt
    from qaflora_edge.weighing.numbers import FusionWeights

TITLE_CHARS, PROMPT_CHARS = 90, 400
INK = "var(--ink)"


def html(weighed: Sequence[tuple[Prompt, FusionWeights]], subject: str) -> str:
    """The page of `qaflora weights`: for each prompt a heatmap, a table of its adapters, and all
    numbers.

    subject  names of bundle and base
    """
    fusions = [fusion for _, fusion in weighed]
    ends = scale(fusions)
    sections = [
        line
        for number, (prompt, fusion) in enumerate(weighed, 1)
        for line in _section(number, prompt, fusion, ends)
    ]
    return page("qaflora weights", subject, [], facts(fusions), fusions, sections)


def page(
    title: str,
    subject: str,
    head_lines: Sequence[str],
    how: str,
    fusions: Sequence[FusionWeights],
    sections: Sequence[str],
) -> str:
    """A page around sections of HTML, with the scale of their heatmaps.

    head_lines  HTML below the subject
    how         how the weights came about, as text
    """
    body = [
        f'<header><h1 dir="auto">{clean(subject)}</h1>',
        *head_lines,
        f"<p>Weight of each adapter at each layer: {clean(how)}. Point at a cell, tap "
        "it, or use the arrow keys.</p>",
        *legend(scale(fusions), min_weight(fusions), ink=INK),
        "</header>",
        "<main>",
        *sections,
        "</main>",
    ]
    style = f"{asset('weights.css')}main {{ --panel: {panel_width(fusions[0])}px; }}\n"
    return html_file(title, body, style=style, script=asset("weights.js"))


def _section(
    number: int, prompt: Prompt, fusion: FusionWeights, ends: tuple[float, float]
) -> list[str]:
    title = crop(prompt.label, TITLE_CHARS)
    lines = [
        "<section>",
        f'<h2 dir="auto">{number}. {clean(title)}</h2>',
    ]
    if title != spelt(" ".join(prompt.text.split())):
        shown = f'<p class="prompt" dir="auto">{clean(prompt.text)}</p>'
        if len(prompt.text) > PROMPT_CHARS:
            shown = f"<details><summary>The whole prompt</summary>{shown}</details>"
        lines.append(shown)
    lines += [
        *weights_lines(fusion, ends),
        "</section>",
    ]
    return lines


def weights_lines(fusion: FusionWeights, ends: tuple[float, float]) -> list[str]:
    """The weights of one query: a heatmap, a table of its adapters, and all numbers."""
    return [
        '<div class="wide">',
        *panel(fusion, ends, ink=INK, paper="var(--paper)"),
        "</div>",
        *_adapter_table(fusion),
        *_number_table(fusion),
    ]


def _adapter_table(fusion: FusionWeights) -> list[str]:
    head = "<th>adapter</th><th>mean weight</th>"
    if fusion.divergence is not None:
        head += f"<th>mean divergence{f',{unit(fusion)}' if unit(fusion) else ''}</th>"
    rows = []
    for row, (name, layers) in enumerate(zip(fusion.adapters, leading_layers(fusion), strict=True)):
        cells = f"<td>{float(fusion.weights[row].mean()):.3f}</td>"
        if fusion.divergence is not None:
            cells += f"<td>{float(fusion.divergence[row].mean()):.3g}</td>"
        cells += f'<td class="layers">{layer_ranges(layers, "–")}</td>'
        rows.append(f'<tr><th scope="row">{clean(name)}</th>{cells}</tr>')
    head += '<th class="layers">weighs most at layers</th>'
    return ['<div class="wide"><table>', f"<tr>{head}</tr>", *rows, "</table></div>"]


def _number_table(fusion: FusionWeights) -> list[str]:
    n_adapter, n_layer = fusion.weights.shape
    n_column = 1 if fusion.divergence is None else 2
    names = "".join(
        f'<th scope="colgroup" colspan="{n_column}">{clean(name)}</th>' for name in fusion.adapters
    )
    kinds = "<th>weight</th>" + ("<th>divergence</th>" if n_column == 2 else "")
    lines = [
        '<details class="numbers"><summary>All numbers</summary><div class="wide"><table>',
        f'<tr><th rowspan="2">layer</th>{names}</tr><tr>{kinds * n_adapter}</tr>',
    ]
    for layer in range(n_layer):
        cells = ""
        for row in range(n_adapter):
            cells += f"<td>{float(fusion.weights[row, layer]):.4f}</td>"
            if fusion.divergence is not None:
                cells += f"<td>{float(fusion.divergence[row, layer]):.4g}</td>"
        lines.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
    return [*lines, "</table></div></details>"]
