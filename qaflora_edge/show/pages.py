"""Weights, answers and results as HTML files that stand alone: they ask no host.

The texts of a page are in the folder assets. What a model wrote is escaped text; a page's policy
lets nothing run but its own script. Pointing at a cell of weights, tapping it or walking to it with
the arrow keys shows its numbers; without scripts the cells' titles and the tables say everything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from qaflora_edge.show.svg import leading_layers, legend, min_weight, panel, panel_width, scale
from qaflora_edge.show.text import crop, facts, layer_ranges, spelt, why_alone

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

TITLE_CHARS = 90
INK, PAPER = "var(--ink)", "var(--paper)"


def allowing(text: str) -> str:
    """Give the source of a content security policy that allows one inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    text = (files("qaflora_edge.show") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _page(template: str, style: str, script: str = "", **values: Any) -> str:
    """Make a whole file.

    template  of the folder assets, which fills the body of page.html.j2
    values    of its names: texts are escaped and signs that command are spelt; others are JSON
    """

    def shown(value: object) -> object:
        return value if hasattr(value, "__html__") else spelt(_plain(value))

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    policy = (
        f"default-src 'none'; style-src '{allowing(style)}'; script-src '{allowing(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    own = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return environment.get_template(template).render(**own, **values) + "\n"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# weights


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
    style = f"{_asset('weights.css')}main {{ --panel: {panel_width(fusions[0])}px; }}\n"
    key = Markup("\n".join(legend(scale(fusions), min_weight(fusions), ink=INK)))
    told = {"subject": subject, "how": how, "question": question, "sections": sections}
    return _page("weights.html.j2", style, _asset("weights.js"), title=title, legend=key, **told)


def _drawn(fusion: FusionWeights, others: Sequence[FusionWeights]) -> dict[str, Any]:
    """Draw the weights of one query, on the scale of all."""
    return {
        "fusion": fusion,
        "what": None if fusion.divergence is None else fusion.measured,
        "why_alone": "" if fusion.weights.any() else why_alone(fusion),
        "panel": Markup("\n".join(panel(fusion, scale(others), ink=INK, paper=PAPER))),
        "layers": [layer_ranges(layers) for layers in leading_layers(fusion)],
    }


# results


@dataclass(frozen=True)
class Bar:
    """A mean with its interval, and how it is written; low and high may be NaN."""

    text: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskShown:
    """One task of an evaluation.

    heads  of the columns: the score first, then differences
    lines  strategy -> a bar for each column, None where there is none
    items  `index`, `question`, `expected`, and `answers`: `strategy`, `score`, `mix`, `text`
    """

    name: str
    metric: str
    heads: Sequence[str]
    lines: Mapping[str, Sequence[Bar | None]]
    items: Sequence[Mapping[str, Any]]


def results_page(title: str, told: Mapping[str, object], tasks: Sequence[TaskShown]) -> str:
    """Draw the page of `qaflora eval`: bars, and every item to open.

    told  how the evaluation was run
    """
    sections = []
    for task in tasks:
        columns = enumerate(zip(*task.lines.values(), strict=True))
        bars = zip(*(_places(bars, is_difference=at > 0) for at, bars in columns), strict=True)
        items = [{**item, "title": crop(item["question"], TITLE_CHARS)} for item in task.items]
        shown = {"name": task.name, "metric": task.metric, "heads": task.heads, "items": items}
        sections.append(shown | {"lines": dict(zip(task.lines, bars, strict=True))})
    return _page("results.html.j2", _asset("results.css"), title=title, facts=told, tasks=sections)


def _places(bars: Iterable[Bar | None], *, is_difference: bool) -> list[dict[str, Any]]:
    """Place a column's bars in per cent of its width: from 0 for scores, around 0 for others."""
    bars = [None if bar is None or math.isnan(bar.value) else bar for bar in bars]
    ends = [end for bar in bars if bar for end in (bar.value, bar.low, bar.high)]
    most = max((abs(end) for end in ends if not math.isnan(end)), default=0.0) or 1.0
    start = -most if is_difference else 0.0

    def place(bar: Bar) -> dict[str, Any]:
        kind = "better" if bar.low > 0 else "worse" if bar.high < 0 else ""
        low, high = (bar.value if math.isnan(end) else end for end in (bar.low, bar.high))
        ends = {"zero": 0.0, "value": bar.value, "low": low, "high": high}
        at = {key: round(4 + 92 * (x - start) / (most - start), 1) for key, x in ends.items()}
        return {"text": bar.text, "kind": kind if is_difference else "", **at}

    return [{"text": ""} if bar is None else place(bar) for bar in bars]
