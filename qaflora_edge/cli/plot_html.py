"""Fusion weights, and answers under them, as one HTML file that stands alone: it asks no host.

What a model wrote is text there, escaped; the page's policy lets nothing run but its own script.

Pointing at a cell, tapping it or walking to it with the arrow keys shows its weight and what was
measured; without scripts the cells' titles and the tables still say everything.
"""

from collections.abc import Sequence
from importlib.resources import files

from qaflora_edge.cli.answers import Answer
from qaflora_edge.cli.prompts import Prompt
from qaflora_edge.cli.show import layer_ranges
from qaflora_edge.server.page.content import allowing
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.picture_text import crop, spelt
from qaflora_edge.weighing.svg_panel import (
    clean,
    facts,
    leading_layers,
    legend,
    measured,
    min_weight,
    panel,
    panel_width,
    scale,
    why_alone,
)


def asset(name: str) -> str:
    """A text of the folder assets, after an empty line."""
    text = (files("qaflora_edge.cli") / "assets" / name).read_text(encoding="utf-8")
    return "\n" + text.replace("\r\n", "\n")


def html_file(title: str, body: Sequence[str], *, style: str, script: str) -> str:
    """A whole file.

    title  a text
    body   lines of HTML
    """
    policy = (
        f"default-src 'none'; style-src '{allowing(style)}'; script-src '{allowing(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{clean(title)}</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        *body,
        '<div id="tip" role="status" aria-live="polite" hidden></div>',
        f"<script>{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


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
    lines = ["<section>", f'<h2 dir="auto">{number}. {clean(title)}</h2>']
    if title != spelt(" ".join(prompt.text.split())):
        shown = f'<p class="prompt" dir="auto">{clean(prompt.text)}</p>'
        if len(prompt.text) > PROMPT_CHARS:
            shown = f"<details><summary>The whole prompt</summary>{shown}</details>"
        lines.append(shown)
    lines += [*weights_lines(fusion, ends), "</section>"]
    return lines


def weights_lines(fusion: FusionWeights, ends: tuple[float, float]) -> list[str]:
    """The weights of one query: a heatmap, a table of its adapters, and all numbers."""
    return [
        *_alone(fusion),
        '<div class="wide">',
        *panel(fusion, ends, ink=INK, paper="var(--paper)"),
        "</div>",
        *_adapter_table(fusion),
        *_number_table(fusion),
    ]


def _alone(fusion: FusionWeights) -> list[str]:
    return [] if fusion.weights.any() else [f"<p>{clean(why_alone(fusion))}</p>"]


def _adapter_table(fusion: FusionWeights) -> list[str]:
    head = "<th>adapter</th><th>mean weight</th>"
    if fusion.divergence is not None:
        what = measured(fusion)
        head += f"<th>mean {what.name}{',' * bool(what.unit)}{what.unit}</th>"
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
    kinds = "<th>weight</th>" + (f"<th>{measured(fusion).name}</th>" if n_column == 2 else "")
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


def answers_page(question: str, answers: Sequence[Answer], subject: str) -> str:
    """The page: the question, and for each answer its text and the weights it was given under.

    subject  names of bundle and base
    """
    fusions = [answer.fusion for answer in answers]
    sections: list[str] = []
    for answer in answers:
        sections += [
            "<section>",
            f'<h2 dir="auto">{clean(answer.strategy)}</h2>',
            f'<p class="answer" dir="auto">{clean(answer.text)}</p>',
            *(_alone(answer.fusion) or weights_lines(answer.fusion, scale(fusions))),
            "</section>",
        ]
    head = [f'<p class="answer" dir="auto">{clean(question)}</p>']
    how = f"{len(answers)} strategies, {fusions[0].prompt_tokens} prompt tokens"
    return page("qaflora compare", subject, head, how, fusions, sections)
