"""Fusion weights, and answers under them, as one HTML file that stands alone: it asks no host.

What a model wrote is escaped text; the page's policy lets nothing run but its own script. Pointing
at a cell, tapping it or walking to it with the arrow keys shows its numbers; without scripts the
cells' titles and the tables say everything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from qaflora_edge.show.svg import (
    leading_layers,
    legend,
    min_weight,
    panel,
    panel_width,
    scale,
)
from qaflora_edge.show.text import crop, facts, layer_ranges, spelt, why_alone

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

TITLE_CHARS = 90
INK, PAPER = "var(--ink)", "var(--paper)"


def allowing(text: str) -> str:
    """The source of a content security policy that allows one inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def asset(name: str) -> str:
    """Read a text of the folder assets."""
    text = (files("qaflora_edge.show") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def page(template: str, style: str, **values: Any) -> str:
    """Make a whole file.

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


def weights_page(labelled: Sequence[tuple[str, str, FusionWeights]], subject: str) -> str:
    """Draw the page of `qaflora weights`: for each query a heatmap, a table and all numbers.

    labelled  a label, the prompt and the weights of each query
    subject   names of bundle and base
    """
    fusions = [fusion for _, _, fusion in labelled]
    sections = []
    for number, (label, prompt, fusion) in enumerate(labelled, 1):
        title = crop(label, TITLE_CHARS)
        is_whole = title == spelt(" ".join(prompt.split()))
        shown = {"title": f"{number}. {title}", "prompt": "" if is_whole else prompt, "answer": ""}
        sections.append(shown | _drawn(fusion, fusions))
    return _weights_page("qaflora weights", subject, facts(fusions), fusions, sections)


def answers_page(
    question: str, answers: Sequence[tuple[str, str, FusionWeights]], subject: str
) -> str:
    """Draw the page of `qaflora compare`.

    answers  the strategy, the text and the weights of each answer
    subject  names of bundle and base
    """
    fusions = [fusion for _, _, fusion in answers]
    sections = []
    for strategy, text, fusion in answers:
        drawn = _drawn(fusion, fusions)
        if drawn["why_alone"]:
            drawn["panel"] = ""
        sections.append(drawn | {"title": strategy, "answer": text})
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
    """Take lines that are HTML already."""
    return Markup("\n".join(lines))


def _drawn(fusion: FusionWeights, others: Sequence[FusionWeights]) -> dict[str, Any]:
    """Draw the weights of one query, on the scale of all."""
    return {
        "fusion": fusion,
        "what": None if fusion.divergence is None else fusion.measured,
        "why_alone": "" if fusion.weights.any() else why_alone(fusion),
        "panel": markup(panel(fusion, scale(others), ink=INK, paper=PAPER)),
        "layers": [layer_ranges(layers) for layers in leading_layers(fusion)],
    }
