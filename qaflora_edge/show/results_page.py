"""Results of an evaluation as one HTML page that stands alone: bars, and every item to open.

The page has no script and asks no host. Texts of files and models are escaped.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qaflora_edge.show.text import crop, spelt

WIDTH, MARGIN = 110, 6  # of a bar, in pixels
TITLE_CHARS = 160  # of a question, in the list of items
_STYLE = """
:root { --ink: #1f2328; --quiet: #656d76; --line: #d0d7de; --paper: #fff; --good: #1a7f37;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --line: #3d444d;
  --paper: #0d1117; --good: #56d364; --bad: #ff8a80; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 75rem; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
p { color: var(--quiet); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .15rem .6rem; border-top: 1px solid var(--line); vertical-align: top;
  text-align: left; font-weight: 400; }
.bars td, .bars th { white-space: nowrap; }
.answer { white-space: pre-wrap; }
svg { stroke: var(--ink); fill: var(--ink); vertical-align: middle; }
svg.better { stroke: var(--good); fill: var(--good); }
svg.worse { stroke: var(--bad); fill: var(--bad); }
svg .zero { stroke: var(--line); }
.item { border-top: 1px solid var(--line); }
.items:has(input:checked) .same { display: none; }
"""
_NOTE = """Scores and differences with 95 % intervals. A difference is paired, and above 0 where the
strategy is better. The best single adapter was found on these items, in hindsight."""


@dataclass(frozen=True)
class Bar:
    """A mean with its interval, and how it is written; low and high may be NaN."""

    text: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AnswerShown:
    """One strategy's answer to an item."""

    strategy: str
    score: str
    mix: str
    text: str | None


@dataclass(frozen=True)
class ItemShown:
    """One item under every strategy."""

    index: int
    question: str
    expected: object
    answers: Sequence[AnswerShown]


@dataclass(frozen=True)
class TaskShown:
    """One task.

    heads  of the columns: the score first, then differences
    lines  strategy -> a bar for each column, None where there is none
    """

    name: str
    metric: str
    heads: Sequence[str]
    lines: Mapping[str, Sequence[Bar | None]]
    items: Sequence[ItemShown]


def results_page(title: str, facts: Mapping[str, object], tasks: Sequence[TaskShown]) -> str:
    """Write the page; facts say how the evaluation was run."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    told = "".join(f"<tr><th>{_text(key)}<td>{_text(value)}" for key, value in facts.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
<h1 dir="auto">{_text(title)}</h1>
<p>{_NOTE}</p>
<details><summary>How it was run</summary><table>{told}</table></details>
{"".join(map(_task, tasks))}</html>
"""


def _text(value: object) -> str:
    """Write a value as text of a page: a text as it is, others as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(spelt(text))


def _task(task: TaskShown) -> str:
    columns = list(zip(*task.lines.values(), strict=True))
    ends = [_ends(column, is_difference=at > 0) for at, column in enumerate(columns)]
    heads = "".join(f'<th colspan="2">{_text(head)}' for head in task.heads)
    lines = []
    for strategy, bars in task.lines.items():
        cells = (_bar(bar, *ends[at], is_difference=at > 0) for at, bar in enumerate(bars))
        lines.append(f"<tr><th>{_text(strategy)}{''.join(cells)}\n")
    return f"""<section>
<h2 dir="auto">{_text(task.name)}</h2>
<p>{_text(task.metric)}, {len(task.items)} items</p>
<div class="wide"><table class="bars"><tr><th>strategy{heads}
{"".join(lines)}</table></div>
<details class="items"><summary>Every item</summary>
<p><label><input type="checkbox"> only where they differ</label></p>
{"".join(map(_item, task.items))}</details>
</section>
"""


def _ends(bars: Iterable[Bar | None], *, is_difference: bool) -> tuple[float, float]:
    """Find the range of a column: from 0 for scores, around 0 for differences."""
    known = [end for bar in bars if bar for end in (bar.value, bar.low, bar.high)]
    most = max((abs(end) for end in known if not math.isnan(end)), default=0.0) or 1.0
    return (-most if is_difference else 0.0), most


def _bar(bar: Bar | None, start: float, end: float, *, is_difference: bool) -> str:
    """Draw the interval as a line, the mean as a dot, and a bar from 0 to it."""
    if bar is None or math.isnan(bar.value):
        return "<td>-<td>"

    def at(value: float) -> float:
        return round(MARGIN + (value - start) / (end - start) * (WIDTH - 2 * MARGIN), 1)

    low, high = (bar.value if math.isnan(side) else side for side in (bar.low, bar.high))
    kind = ""
    if is_difference:
        kind = "better" if bar.low > 0 else "worse" if bar.high < 0 else ""
    left, right = sorted((at(0.0), at(bar.value)))
    return f"""<td>{_text(bar.text)}
<td><svg class="{kind}" width="{WIDTH}" height="16" aria-hidden="true">
<rect x="{left}" y="5" width="{right - left:.1f}" height="6" stroke="none" opacity=".35"/>
<line class="zero" x1="{at(0.0)}" x2="{at(0.0)}" y1="0" y2="16"/>
<line x1="{at(low)}" x2="{at(high)}" y1="8" y2="8"/>
<circle cx="{at(bar.value)}" cy="8" r="3"/></svg>"""


def _item(item: ItemShown) -> str:
    title = crop(item.question, TITLE_CHARS)
    is_same = len({answer.score for answer in item.answers}) == 1
    rows = "".join(
        f"<tr><th>{_text(each.strategy)}<td>{_text(each.score)}<td>{_text(each.mix)}"
        f'<td class="answer" dir="auto">{_text(each.text or "")}\n'
        for each in item.answers
    )
    return f"""<details class="item{" same" if is_same else ""}"><summary>{item.index}
<span dir="auto">{_text(title)}</span></summary>
<p class="answer" dir="auto">{_text(item.question)}</p>
<p>Expected: <span dir="auto">{_text(item.expected)}</span></p>
<div class="wide"><table>{rows}</table></div></details>
"""
