"""Text made safe for a terminal, a page or a picture; weights in words and as a heatmap."""

import io
import math
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console
    from rich.table import Table

    from qaflora_edge.weighing.plan import FusionWeights

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = ".:=+x*#@"
EQUAL = 1e-6  # weights are shares in float32: closer ones are one weight
TICK = 5  # a label at every fifth layer
NAME_MAX = 20  # columns of a terminal
CELL_MAX = 3  # columns of a terminal
LABEL_MAX = 100  # characters of a label of a picture
N_ALL = 12  # adapters that are all shown; of more, the first N_TOP
N_TOP = 5
CHARS_MAX = 2000  # of a text to crop that are looked at: no line has room for more
# They turn the direction of what follows: "\u202etxt.exe" would read as "exe.txt".
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def can_show(text: str, encoding: str | None) -> bool:
    """Tell whether an encoding has every sign of a text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_VISIBLE = dict.fromkeys(_CONTROLS, "?") | {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def visible(text: str) -> str:
    """Write control characters as `?`: an answer moves no cursor and changes no colour.

    Line ends and tabs stay; carriage returns go.
    """
    return text.translate(_VISIBLE)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows as lines: the first column to the left, others to the right."""
    by_column = zip_longest(*rows, fillvalue="")
    first_width, *widths = [max(map(len, column)) for column in by_column]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(first_width)]
        for cell, width in zip(others, widths, strict=False):
            cells.append(cell.rjust(width))
        lines.append("   ".join(cells).rstrip())
    return lines


def spelt(text: str) -> str:
    """Spell control characters, and those that turn a text's direction, as escapes.

    Tabs and line ends stay; so do marks inside words, such as the joiners of emoji. Surrogates and
    U+FFFE are no text, and XML has no way to write them.
    """
    if text.isprintable():  # quick: nothing of it is in most texts
        return text
    chars = []
    for char in text:
        is_control = char not in "\t\n" and unicodedata.category(char) in ("Cc", "Cs")
        is_no_text = ord(char) & 0xFFFE == 0xFFFE
        if is_control or is_no_text or char in _TURNING:
            char = ascii(char)[1:-1]
        chars.append(char)
    return "".join(chars)


def crop(text: str, width: int) -> str:
    """Put a text on one line, and cut it with a sign where it has more characters than `width`."""
    words = text[: 2 * CHARS_MAX].split()
    line = spelt(" ".join(words))
    if len(line) <= width:
        return line
    return f"{line[: width - 1].rstrip()}…"


def who_spoke(fusion: "FusionWeights") -> str:
    """Name the adapters that weigh anything, heaviest first, or the base where none does.

    As in `math ×1 · es ×0.5`, or `base`; of a relay `company → json`.
    """
    step = fusion.plan.drafting
    if step is not None and step.mix is None:
        return f"{spelt(step.knower)} → {spelt(fusion.writer)}"
    names = []
    for name, mean in sorted(fusion.means.items(), key=itemgetter(1), reverse=True):
        weight = round(mean, 2)
        if weight:
            names.append(f"{spelt(name)} ×{weight:g}")
    if len(names) > N_ALL:
        names[N_TOP:] = others(len(names) - N_TOP)
    return " · ".join(names) or "base"


def doubts(fusion: "FusionWeights") -> list[str]:
    """Say that an answer may be made up, where an adapter is not sure of it; else nothing."""
    return ["may be made up"] if fusion.is_doubtful else []


def others(n_adapter: int) -> list[str]:
    """Say how many adapters are not shown; nothing where all are."""
    return [f"{n_adapter} others"] if n_adapter else []


def top(fusion: "FusionWeights") -> list[int]:
    """List the adapters to show, in their order: all, or of many those that weigh or score most."""
    n_adapter = len(fusion.adapters)
    if n_adapter <= N_ALL:
        return [*range(n_adapter)]
    reasons = list(fusion.why.values())

    def rank(index: int) -> tuple[float, float]:
        mean = float(fusion.weights[index].mean())
        score = 0.0
        if reasons:
            scores = reasons[index].scores
            score = max(scores.values(), default=0.0)
        elif fusion.divergence is not None:
            score = float(fusion.divergence[index].mean())
        return mean, score

    highest_last = sorted(range(n_adapter), key=rank)
    return sorted(highest_last[-N_TOP:])


def why(fusion: "FusionWeights") -> str:
    """Say what decided, or that the base answers alone; "" where layers show it."""
    if fusion.because or fusion.weights.any():
        return fusion.because
    if fusion.adapters:
        return "No adapter weighs anything: the base answers alone."
    return "There are no adapters: the base answers alone."


def reason_rows(fusion: "FusionWeights") -> list[list[str]]:
    """Lay out what decided where no layer differs: heads, adapters, thresholds; else nothing."""
    reasons = list(fusion.why.values())
    is_measured = fusion.divergence is not None and not reasons
    first_layer = fusion.weights[:, :1]
    is_layered = (fusion.weights != first_layer).any()
    if is_measured or is_layered:
        return []
    places: list[str] = []
    thresholds: Mapping[str, float] = {}
    roles: dict[str, str] = {}
    if reasons:
        places = list(reasons[0].scores)
        thresholds = reasons[0].thresholds
        roles = _roles(fusion)
    digits = ".2f" if thresholds else ".3g"
    means = fusion.weights.mean(axis=1)  # [n_adapter]
    shown = top(fusion)
    rows = []
    for index in shown:
        name = fusion.adapters[index]
        row = [name, f"{means[index]:.2f}"]
        row += [f"{reasons[index].scores[place]:{digits}}" for place in places]
        if roles:
            row.append(roles.get(name, "-"))
        rows.append(row)
    rows += [[text] for text in others(len(means) - len(shown))]
    if thresholds:
        needed = [f"{thresholds[place]:.2f}" if place in thresholds else "" for place in places]
        rows.append(["threshold", "", *needed])
    heads = ["adapter", "weight", *places]
    if roles:
        heads.append("taken as")
    return [heads, *rows]


def _roles(fusion: "FusionWeights") -> dict[str, str]:
    """Map adapters to what they were taken for, where they were: a place, or a role in a relay."""
    step = fusion.plan.drafting
    if step is not None:
        return {step.knower: "knower", fusion.writer: "writer"}
    return {name: reason.taken_as for name, reason in fusion.why.items() if reason.taken_as}


def facts(fusion: "FusionWeights") -> str:
    """Say how weights came about."""
    phrases = [f"strategy {fusion.strategy}"]
    if fusion.divergence is not None:
        for option in fusion.measured.reads:
            phrases.append(f"{option} {getattr(fusion, option)}")
    phrases.append(f"{fusion.prompt_tokens} prompt tokens")
    if fusion.probe_ms > 0:
        phrases.append(f"probe {fusion.probe_ms:.0f} ms")
    phrases += doubts(fusion)
    return ", ".join(phrases)


def scale(fusion: "FusionWeights") -> tuple[float, float]:
    """Find the ends of the scale: the lowest weight rounded down, the largest rounded up.

    Both are tenths up to 1, then whole numbers; the first is not below 0. Eight adapters share a
    sum of 1, and on a scale from 0 to 1 all of them would look alike.
    """
    largest = float(fusion.weights.max(initial=0.0))
    if largest <= 0.0:
        return 0.0, 1.0
    step = 10 if largest < 1.0 else 1
    n_step_high = math.ceil((largest - EQUAL) * step) or 1
    smallest = float(fusion.weights.min())
    n_step_low = math.floor((smallest + EQUAL) * step)
    if not 0 < n_step_low < n_step_high:
        n_step_low = 0
    return n_step_low / step, n_step_high / step


def print_heatmap(
    fusion: "FusionWeights", stream: "TextIO | None" = None, *, is_plain: bool = False
) -> None:
    """Print weights to a terminal or a pipe.

    is_plain  write no escape codes; else rich decides, by the terminal, NO_COLOR and FORCE_COLOR
    """
    from rich.console import Console

    stream = stream or sys.stdout
    is_terminal = False if is_plain else None
    console = Console(file=stream, highlight=False, markup=False, force_terminal=is_terminal)
    blocks = ASCII_BLOCKS
    if can_show(f"{BLOCKS}·", stream.encoding):
        blocks = BLOCKS
    _print(fusion, console, blocks)


def picture(fusion: "FusionWeights", label: str, subject: str) -> str:
    """Draw an SVG file of what the terminal shows; nothing in it asks a host or runs.

    label    of the query
    subject  names of bundle and base, which stand above
    """
    from rich.console import Console

    n_layer = fusion.weights.shape[1]
    width = max(LABEL_MAX, NAME_MAX + CELL_MAX * n_layer + 25)
    console = Console(file=io.StringIO(), record=True, width=width, highlight=False, markup=False)
    console.print(crop(label, LABEL_MAX))
    _print(fusion, console, BLOCKS)
    drawn = console.export_svg(title=crop(subject, LABEL_MAX))
    return re.sub(r"@font-face \{.*?\}", "", drawn, count=2, flags=re.DOTALL)


def _print(fusion: "FusionWeights", console: "Console", blocks: str) -> None:
    console.print(visible(who_spoke(fusion)))
    reason = why(fusion)
    if reason:
        console.print(visible(reason))
    rows = reason_rows(fusion)
    has_table = fusion.weights.any() or fusion.why
    if has_table:
        console.print()
    if has_table and rows:
        for row in rows:
            name = visible(row[0])
            row[0] = crop(name, NAME_MAX)
        lines = columns(rows)
        console.print("\n".join(lines))
    elif has_table:
        console.print(_layers(fusion, blocks, console.width))
    console.print()
    if not rows:
        low, high = scale(fusion)
        lowest = float(fusion.weights.min(initial=0.0))
        below = f"; - below 0, down to {lowest:.3g}" if lowest < 0 else ""
        last = fusion.weights.shape[1] - 1
        console.print(f"weight {low:g} {blocks} {high:g}{below}; layers 0 to {last}")
    console.print(visible(facts(fusion)), style="dim")


def _layers(fusion: "FusionWeights", blocks: str, width: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    n_layer = fusion.weights.shape[1]
    ends = scale(fusion)
    shown = top(fusion)
    names = []
    for index in shown:
        name = visible(fusion.adapters[index])
        names.append(crop(name, NAME_MAX))
    heads = ["mean"]
    if fusion.divergence is not None:
        heads.append(fusion.measured.name)
    n_before = max(map(len, names)) + 2  # columns before the cells
    for head in heads:
        n_before += 2 + max(5, len(head))
    room = max(8, width - n_before)
    n_together = math.ceil(n_layer / room)  # layers of one cell
    n_cell = math.ceil(n_layer / n_together)
    n_column = min(CELL_MAX, room // n_cell)
    ticks = _ticks(n_layer, n_together, n_column)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="")
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(ticks, no_wrap=True)
    for index, name in zip(shown, names, strict=True):
        row = fusion.weights[index]  # [n_layer]
        numbers = [f"{row.mean():.2f}"]
        if fusion.divergence is not None:
            mean_divergence = fusion.divergence[index].mean()
            numbers.append(f"{mean_divergence:.3g}")
        cells = ""
        for at in range(0, n_layer, n_together):
            layers = row[at : at + n_together]
            block = _block(float(layers.mean()), ends, blocks)
            cells += block * n_column
        drawn = Text(cells, style="cyan")
        table.add_row(Text(name), *numbers, drawn)
    for text in others(len(fusion.adapters) - len(shown)):
        table.add_row(text)
    return table


def _block(weight: float, ends: tuple[float, float], blocks: str) -> str:
    """Give the sign for a weight: the higher it is between the ends, the later one of blocks."""
    if weight < 0:
        return "-"
    low, high = ends
    share = (weight - low) / (high - low)
    index = int(share * len(blocks) + 1e-9)
    last = len(blocks) - 1
    return blocks[max(0, min(last, index))]


def _ticks(n_layer: int, n_together: int, n_column: int) -> str:
    text = ""
    for layer in range(0, n_layer, TICK * n_together):
        text = text.ljust(layer // n_together * n_column) + str(layer)
    n_cell = math.ceil(n_layer / n_together)
    if len(text) > n_cell * n_column:
        return text.split(" ")[0]
    return text
