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
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from qaflora_edge.show import text

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

CELL_WIDTH, CELL_HEIGHT = 18, 26  # panel.svg.j2 has them too
NAME_WIDTH_MAX, MEAN_WIDTH = 180, 52
NOTEBOOK_INK = "#2f81d0"  # reads on light and on dark paper


def allowing(content: str) -> str:
    """Give the source of a content security policy that allows one inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    content = (files("qaflora_edge.show") / "assets" / name).read_text(encoding="utf-8")
    return content.replace("\r\n", "\n")


def _render(template: str, **values: Any) -> Markup:
    """Fill a template of assets: texts are escaped, signs that command spelt; others are JSON."""

    def shown(item: object) -> object:
        if hasattr(item, "__html__"):
            return item
        return text.spelt(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qaflora_edge.show", "assets"),
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
    parts = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return _render(template, **parts, **values)


# weights


def weights_page(labelled: Sequence[tuple[str, str, FusionWeights]], subject: str) -> str:
    """Draw the page of `qaflora weights`: for each query a heatmap, a table and all numbers.

    labelled  a label, the prompt and the weights of each query
    subject   names of bundle and base
    """
    fusions = [fusion for _, _, fusion in labelled]
    sections = []
    for number, (label, prompt, fusion) in enumerate(labelled, 1):
        title = text.crop(label, 90)
        section = {
            "title": f"{number}. {title}",
            "prompt": "" if title == text.spelt(" ".join(prompt.split())) else prompt,
            "fusion": fusion,
            "what": None if fusion.divergence is None else fusion.measured,
            "why": text.why(fusion),
            "rows": text.reason_rows(fusion),
            "panel": _panel(fusion, text.scale(fusions)),
            "layers": [text.layer_ranges(layers) for layers in text.leading_layers(fusion)],
        }
        sections.append(section)
    facts = {"subject": subject, "how": text.facts(fusions), "sections": sections}
    style, script = _asset("weights.css"), _asset("weights.js")
    return _page(
        "weights.html.j2", style, script, title="qaflora weights", **facts, **_scale(fusions)
    )


def _scale(fusions: Sequence[FusionWeights]) -> dict[str, Any]:
    return {"ends": text.scale(fusions), "lowest": text.min_weight(fusions), "ink": NOTEBOOK_INK}


def _panel(fusion: FusionWeights, ends: tuple[float, float]) -> dict[str, Any]:
    """Lay out rows of cells in pixels: a cell per layer, or one where no layer differs."""
    is_layered = not text.reason_rows(fusion)
    n_adapter, n_layer = fusion.weights.shape if is_layered else (len(fusion.adapters), 1)
    names = [text.crop(name, NAME_WIDTH_MAX, text.len_pixels) for name in fusion.adapters]
    left = math.ceil(max(map(text.len_pixels, names), default=30)) + 12
    right = left + n_layer * CELL_WIDTH
    leads = text.leading_layers(fusion) if is_layered else [[]] * n_adapter

    def cell(row: int, layer: int) -> dict[str, Any]:
        weight = float(fusion.weights[row, layer])
        place = f", layer {layer}" * is_layered
        title = f"{fusion.adapters[row]}{place}\nweight {weight:.3f}"
        if is_layered and fusion.divergence is not None:
            what = fusion.measured
            title += f"\n{what.name} {float(fusion.divergence[row, layer]):.3g}{what.unit}"
        share = max(0.0, min(1.0, (weight - ends[0]) / (ends[1] - ends[0])))
        return {
            "x": left + layer * CELL_WIDTH,
            "share": share,
            "title": title,
            "weight": weight,
            "is_lead": layer in leads[row],
        }

    rows = [
        {
            "name": name,
            "y": row * CELL_HEIGHT,
            "mean": f"{float(fusion.weights[row].mean()):.2f}",
            "cells": [cell(row, layer) for layer in range(n_layer)],
        }
        for row, name in enumerate(names)
    ]
    size = {"width": right + MEAN_WIDTH, "bottom": n_adapter * CELL_HEIGHT, "right": right}
    return {"rows": rows, "ticks": range(0, n_layer * is_layered, text.TICK), "left": left, **size}


def notebook_html(fusion: FusionWeights) -> str:
    """Show weights in a notebook: how they came about, and layers or what decided."""
    words = [text.facts([fusion])]
    if reason := text.why(fusion):
        words.append(reason)
    drawn = {"rows": text.reason_rows(fusion), "panel": _panel(fusion, text.scale([fusion]))}
    return _render("notebook.html.j2", words=words, **drawn, **_scale([fusion]))


def picture(labelled: Sequence[tuple[str, FusionWeights]], subject: str) -> str:
    """Draw an SVG file that stands alone: a panel per query, all on one scale.

    labelled  a label and the weights of each query
    subject   names of bundle and base, which stand above the panels
    """
    fusions = [fusion for _, fusion in labelled]
    drawn = [_panel(fusion, text.scale(fusions)) for fusion in fusions]
    width = max(460, *(panel["width"] for panel in drawn))
    y = 64
    panels = []
    for (label, _), panel in zip(labelled, drawn, strict=True):
        line = text.crop(label, width, text.len_pixels)
        panels.append({"label": line, "y": y, "panel": panel})
        y += panel["bottom"] + 56
    about = text.crop(subject, width, text.len_pixels)
    size = {"width": width + 32, "height": y + 36, "subject": about, "how": text.facts(fusions)}
    return _render("picture.svg.j2", panels=panels, **size, **_scale(fusions))
