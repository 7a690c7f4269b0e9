"""The answers of several strategies as one HTML page that stands alone.

What a model wrote is text there, escaped; the page's policy lets nothing run but its own script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaflora_edge.cli.plot_html import page, weights_lines
from qaflora_edge.weighing.svg_panel import clean, scale

if TYPE_CHECKING:
    from qaflora_edge.cli.compare import Answer


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
            *(weights_lines(answer.fusion, scale(fusions)) if answer.fusion.weights.any() else []),
            "</section>",
        ]
    head = [f'<p class="answer" dir="auto">{clean(question)}</p>']
    how = f"{len(answers)} strategies, {fusions[0].prompt_tokens} prompt tokens"
    return page("qaflora compare", subject, head, how, fusions, sections)
