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

from qaflora_edge.show.heatmap import TICK, leading_layers, min_weight, scale
from qaflora_edge.show.text import crop, facts, layer_ranges, len_pixels, spelt, why_alone

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

TITLE_CHARS = 90
CELL_WIDTH, CELL_HEIGHT = 18, 26  # panel.svg.j2 has them too
NAME_WIDTH_MAX, MEAN_WIDTH, PANEL_MIN = 180, 52, 240
NOTEBOOK_INK = "#2f81d0"  # reads on light and on dark paper


def allowing(text: str) -> str:
    """Give the source of a content security policy that allows one inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    text = (files("qaflora_edge.show") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _render(template: str, **values: Any) -> Markup:
    """Fill a template of assets: texts are escaped, signs that command spelt; others are JSON."""

    def shown(value: object) -> object:
        if hasattr(value, "__html__"):
            return value
        return spelt(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return Markup(environment.get_template(template).render(**values))


def _page(template: str, style: str, script: str = "", **values: Any) -> str:
    """Fill a template that extends page.html.j2."""
    policy = (
        f"default-src 'none'; style-src '{allowing(style)}'; script-src '{allowing(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    own = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return _render(template, **own, **values)


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
    width = _panel(fusions[0], scale(fusions))["width"]
    style = f"{_asset('weights.css')}main {{ --panel: {width}px; }}\n"
    told = {"subject": subject, "how": how, "question": question, "sections": sections}
    told |= _scale(fusions)
    return _page("weights.html.j2", style, _asset("weights.js"), title=title, **told)


def _scale(fusions: Sequence[FusionWeights]) -> dict[str, Any]:
    return {"ends": scale(fusions), "lowest": min_weight(fusions), "ink": NOTEBOOK_INK}


def _drawn(fusion: FusionWeights, others: Sequence[FusionWeights]) -> dict[str, Any]:
    """Draw the weights of one query, on the scale of all."""
    return {
        "fusion": fusion,
        "what": None if fusion.divergence is None else fusion.measured,
        "why_alone": "" if fusion.weights.any() else why_alone(fusion),
        "panel": _panel(fusion, scale(others)),
        "layers": [layer_ranges(layers) for layers in leading_layers(fusion)],
    }


def _panel(fusion: FusionWeights, ends: tuple[float, float]) -> dict[str, Any]:
    """Lay out rows of cells between the adapters' names and their means, in pixels."""
    n_adapter, n_layer = fusion.weights.shape
    names = [crop(name, NAME_WIDTH_MAX, len_pixels) for name in fusion.adapters]
    left = math.ceil(max(map(len_pixels, names), default=30)) + 12
    right = left + n_layer * CELL_WIDTH
    leads = leading_layers(fusion)

    def cell(row: int, layer: int) -> dict[str, Any]:
        weight = float(fusion.weights[row, layer])
        title = f"{fusion.adapters[row]}, layer {layer}\nweight {weight:.3f}"
        if fusion.divergence is not None:
            what = fusion.measured
            title += f"\n{what.name} {float(fusion.divergence[row, layer]):.3g}{what.unit}"
        share = max(0.0, min(1.0, (weight - ends[0]) / (ends[1] - ends[0])))
        x, is_lead = left + layer * CELL_WIDTH, layer in leads[row]
        return {"x": x, "share": share, "title": title, "weight": weight, "is_lead": is_lead}

    rows = [
        {
            "name": name,
            "y": row * CELL_HEIGHT,
            "mean": f"{float(fusion.weights[row].mean()):.2f}",
            "cells": [cell(row, layer) for layer in range(n_layer)],
        }
        for row, name in enumerate(names)
    ]
    ticks = [i for i in range(n_layer) if i % TICK == 0 or (i == n_layer - 1 and i % TICK > 1)]
    return {
        "rows": rows,
        "ticks": ticks,
        "left": left,
        "right": right,
        "width": max(right + MEAN_WIDTH, PANEL_MIN),
        "bottom": n_adapter * CELL_HEIGHT,
    }


def notebook_html(fusion: FusionWeights) -> str:
    """Show weights in a notebook: how they came about, the cells, the scale."""
    words = [facts([fusion])] + ([] if fusion.weights.any() else [why_alone(fusion)])
    shown = _panel(fusion, scale([fusion]))
    return _render("notebook.html.j2", words=words, panel=shown, **_scale([fusion]))


def picture(labelled: Sequence[tuple[str, FusionWeights]], subject: str) -> str:
    """Draw an SVG file that stands alone: a panel per query, all on one scale.

    labelled  a label and the weights of each query
    subject   names of bundle and base, which stand above the panels
    """
    fusions = [fusion for _, fusion in labelled]
    shown = [_panel(fusion, scale(fusions)) for fusion in fusions]
    width, y = max(460, *(each["width"] for each in shown)), 64
    panels = []
    for (label, _), each in zip(labelled, shown, strict=True):
        panels.append({"label": crop(label, width, len_pixels), "y": y, "panel": each})
        y += each["bottom"] + 56
    size = {"width": width + 32, "height": y + 36, "subject": crop(subject, width, len_pixels)}
    how = facts(fusions)
    return _render("picture.svg.j2", panels=panels, how=how, **size, **_scale(fusions))


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
