"""Fusion weights, and answers under them, as one HTML file that stands alone: it asks no host.

What a model wrote is text there, escaped; the page's policy lets nothing run but its own script.

Pointing at a cell, tapping it or walking to it with the arrow keys shows its weight and what was
measured; without scripts the cells' titles and the tables still say everything.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from qaflora_edge.cli.answers import Answer
from qaflora_edge.cli.prompts import Prompt
from qaflora_edge.cli.show import layer_ranges
from qaflora_edge.server.page.content import allowing
from qaflora_edge.show.picture_text import crop, spelt
from qaflora_edge.show.svg_panel import (
    facts,
    leading_layers,
    legend,
    min_weight,
    panel,
    panel_width,
    scale,
    why_alone,
)
from qaflora_edge.weighing.numbers import FusionWeights

TITLE_CHARS = 90
INK, PAPER = "var(--ink)", "var(--paper)"


def asset(name: str) -> str:
    """A text of the folder assets."""
    text = (files("qaflora_edge.cli") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def page(template: str, style: str, **values: Any) -> str:
    """A whole file.

    template  of the folder assets, which fills the body of page.html.j2
    values    of its names: texts are escaped, and signs that command are spelt
    """

    def shown(value: object) -> object:
        return value if hasattr(value, "__html__") else spelt(str(value))

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    style, script = f"\n{style}", f"\n{asset('weights.js')}"
    policy = (
        f"default-src 'none'; style-src '{allowing(style)}'; script-src '{allowing(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    own = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return environment.get_template(template).render(**own, **values)


def html(weighed: Sequence[tuple[Prompt, FusionWeights]], subject: str) -> str:
    """The page of `qaflora weights`: for each prompt a heatmap, a table of its adapters, and all
    numbers.

    subject  names of bundle and base
    """
    fusions = [fusion for _, fusion in weighed]
    sections = []
    for number, (prompt, fusion) in enumerate(weighed, 1):
        title = crop(prompt.label, TITLE_CHARS)
        is_whole = title == spelt(" ".join(prompt.text.split()))
        shown = {"prompt": "" if is_whole else prompt.text, "answer": ""}
        shown["title"] = f"{number}. {title}"
        sections.append(shown | _drawn(fusion, fusions))
    return _weights_page("qaflora weights", subject, facts(fusions), fusions, sections)


def answers_page(question: str, answers: Sequence[Answer], subject: str) -> str:
    """The page of `qaflora compare`: for each answer its text and the weights it was given under.

    subject  names of bundle and base
    """
    fusions = [answer.fusion for answer in answers]
    sections = []
    for answer in answers:
        drawn = _drawn(answer.fusion, fusions)
        if drawn["why_alone"]:
            drawn["panel"] = ""
        sections.append(drawn | {"title": answer.strategy, "answer": answer.text})
    how = f"{len(answers)} strategies, {fusions[0].prompt_tokens} prompt tokens"
    return _weights_page("qaflora compare", subject, how, fusions, sections, question)


def _weights_page(
    title: str,
    subject: str,
    how: str,
    fusions: Sequence[FusionWeights],
    sections: Sequence[Mapping[str, Any]],
    question: str = "",
) -> str:
    style = f"{asset('weights.css')}main {{ --panel: {panel_width(fusions[0])}px; }}\n"
    key = legend(scale(fusions), min_weight(fusions), ink=INK)
    told = {"subject": subject, "how": how, "question": question, "sections": sections}
    return page("weights.html.j2", style, title=title, legend=markup(key), **told)


def markup(lines: Sequence[str]) -> Markup:
    """Lines that are HTML already."""
    return Markup("\n".join(lines))


def _drawn(fusion: FusionWeights, others: Sequence[FusionWeights]) -> dict[str, Any]:
    """The weights of one query, on the scale of all."""
    return {
        "fusion": fusion,
        "what": None if fusion.divergence is None else fusion.measured,
        "why_alone": "" if fusion.weights.any() else why_alone(fusion),
        "panel": markup(panel(fusion, scale(others), ink=INK, paper=PAPER)),
        "layers": [layer_ranges(layers, "–") for layers in leading_layers(fusion)],
    }
