"""SVG charts for docs/: legible in light and dark, drawn by report.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

# A reader's colour scheme decides; the background is drawn, so that a page may have another one.
STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.back{fill:#fff}.grid{stroke:#d8dee4}.zero{stroke:#59636e;stroke-width:1.5}
.soft{fill:#59636e}.bold{font-weight:600}
.line{fill:none;stroke-width:2.5}.range{stroke-width:2}.mark{stroke:#1f2328}
.c0{--c:#59636e}.c1{--c:#0550ae}.c2{--c:#bc4c00}.c3{--c:#1a7f37}.c4{--c:#8250df}.c5{--c:#1b7c83}
.line,.range{stroke:var(--c)}.dot,.bar{fill:var(--c)}.bar{fill-opacity:.75}
@media(prefers-color-scheme:dark){
text{fill:#e6edf3}.back{fill:#0d1117}.grid{stroke:#30363d}.zero{stroke:#9198a1}.soft{fill:#9198a1}.mark{stroke:#e6edf3}
.c0{--c:#9198a1}.c1{--c:#6cb6ff}.c2{--c:#f0883e}.c3{--c:#56d364}.c4{--c:#d2a8ff}.c5{--c:#76e3ea}}
"""

Point = tuple[float, float]
Range = tuple[float, float, float]  # a value, and the ends of its interval
LOOKS = {"two-place": "c1", "qa-flora": "c2"}  # the colours of strategies; others are grey


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, with the values that get a line and a number."""

    ticks: Sequence[float]
    start: float
    end: float
    low: float | None = None

    def at(self, value: float) -> float:
        """Give the pixel of a value; one outside is drawn at the end."""
        low = self.ticks[0] if self.low is None else self.low
        share = (value - low) / (self.ticks[-1] - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


class Svg:
    """A picture of so many pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f'<rect class="back" width="{width}" height="{height}"/>',
        ]

    def text(self, x: float, y: float, text: str, *, look: str = "", anchor: str = "start") -> None:
        """Write a text whose middle is at y."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y + 4.5:.1f}" class="{look}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def line(self, a: Point, b: Point, look: str) -> None:
        """Draw a line."""
        (x1, y1), (x2, y2) = a, b
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{look}"/>'
        )

    def path(self, points: Sequence[Point], look: str) -> None:
        """Draw lines from point to point."""
        for a, b in pairwise(points):
            self.line(a, b, f"line {look}")

    def dot(self, x: float, y: float, look: str, radius: float = 4.5) -> None:
        """Draw a dot."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot {look}"/>')

    def bar(self, x: float, y: float, width: float, height: float, look: str) -> None:
        """Draw a bar."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'class="bar {look}"/>'
        )

    def ranged(self, axis: Axis, y: float, value: Range, look: str) -> None:
        """Draw a value and its interval on a row."""
        middle, low, high = value
        self.line((axis.at(low), y), (axis.at(high), y), f"range {look}")
        self.dot(axis.at(middle), y, look)

    def columns(self, axis: Axis, top: float, bottom: float) -> None:
        """Draw a horizontal axis: a line and a number for each tick."""
        for tick in axis.ticks:
            x = axis.at(tick)
            self.line((x, top), (x, bottom), "zero" if tick == 0 else "grid")
            self.text(x, bottom + 13, f"{tick:g}", look="soft", anchor="middle")

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def verdict(value: Range) -> str:
    """Choose a colour: above 0 for sure, below 0 for sure, or neither."""
    return "c1" if value[1] > 0 else "c2" if value[2] < 0 else "c0"


def forest(title: str, rows: Sequence[str], panels: Mapping[str, Sequence[Range]]) -> str:
    """Draw differences with intervals: a row for each cell, a panel for each rival.

    The last row is the mean of the others.
    """
    n, step, left, width = len(rows), 24, 130, 196
    svg = Svg(left + width * len(panels) + 10, 92 + step * n, title)
    svg.text(10, 16, title, look="bold")
    ys = [62 + step * row + (6 if row == n - 1 else 0) for row in range(n)]
    for row, y in zip(rows, ys, strict=True):
        svg.text(10, y, row, look="bold" if y == ys[-1] else "")
    for index, (name, values) in enumerate(panels.items()):
        start = left + width * index
        axis = Axis((-60, -30, 0, 30, 60), start + 16, start + width - 16)
        svg.text(axis.at(0), 39, name, look="bold", anchor="middle")
        svg.columns(axis, 50, ys[-1] + 10)
        for y, value in zip(ys, values, strict=True):
            svg.ranged(axis, y, value, verdict(value))
    return str(svg)


def bars(title: str, rows: Sequence[str], panels: Mapping[str, Sequence[tuple[Range, str]]]) -> str:
    """Draw scores of 100 with intervals and a label: a row for each strategy, in panels."""
    step, left, width = 26, 180, 235
    svg = Svg(left + width * len(panels) + 10, 84 + step * len(rows), title)
    svg.text(10, 16, title, look="bold")
    ys = [62 + step * row for row in range(len(rows))]
    for y, row in zip(ys, rows, strict=True):
        svg.text(10, y, row)
    for index, (name, values) in enumerate(panels.items()):
        start = left + width * index
        axis = Axis((0, 25, 50, 75), start, start + width - 80)
        svg.text(start, 39, name, look="bold")
        svg.columns(axis, 48, ys[-1] + 13)
        for row, y, ((value, low, high), label) in zip(rows, ys, values, strict=True):
            svg.bar(start, y - 8, axis.at(value) - start, 16, LOOKS.get(row, "c0"))
            svg.line((axis.at(low), y), (axis.at(high), y), "mark")
            svg.text(start + width - 74, y, label, look="soft")
    return str(svg)


def costs(title: str, rows: Sequence[tuple[str, float, Range]], left: str, right: str) -> str:
    """Draw what each strategy costs and how many points it has, a row each."""
    step = 25
    svg = Svg(760, 90 + step * len(rows), title)
    svg.text(10, 16, title, look="bold")
    end = 62 + step * (len(rows) - 1) + 13
    cost, points = Axis((0, 2, 4, 6), 110, 370), Axis((20, 30, 40, 50), 460, 740)
    for axis, name in ((cost, left), (points, right)):
        svg.text(axis.start, 39, name, look="bold")
        svg.columns(axis, 48, end)
    for at, (name, prefills, value) in enumerate(rows):
        y, look = 62 + step * at, LOOKS.get(name, "c0")
        svg.text(10, y, name, look="bold" if name in LOOKS else "")
        svg.bar(cost.start, y - 8, cost.at(prefills) - cost.start, 16, look)
        svg.text(cost.at(prefills) + 6, y, f"{prefills:.1f}", look="soft")
        svg.ranged(points, y, value, look)
    return str(svg)


@dataclass(frozen=True)
class Panel:
    """Curves over one horizontal axis: series -> points."""

    name: str
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    series: Mapping[str, Sequence[Point]]


def curves(title: str, x_name: str, panels: Sequence[Panel], looks: Mapping[str, str]) -> str:
    """Draw panels of curves that share their colours.

    looks  series -> colour, in the order of the legend
    """
    width, room, x, y = 380, 10, 10.0, 38.0
    places = []
    for name in looks:
        wide = 40 + 6.6 * len(name)
        if x + wide > width * len(panels):
            x, y = room, y + 22
        places.append((x, y))
        x += wide
    top = y + 22
    height = round(top) + 290
    svg = Svg(width * len(panels) + room, height, title)
    svg.text(room, 16, title, look="bold")
    for (name, look), (x, y) in zip(looks.items(), places, strict=True):
        svg.bar(x, y - 2, 16, 4, look)
        svg.text(x + 22, y, name)
    for index, panel in enumerate(panels):
        start = room + width * index + 34
        across = Axis(panel.x_ticks, start, start + width - 64, low=0)
        up = Axis(panel.y_ticks, height - 58, top + 32)
        svg.text(start, top + 10, panel.name, look="bold")
        for tick in panel.y_ticks:
            svg.line((across.start, up.at(tick)), (across.end, up.at(tick)), "grid")
            svg.text(start - 8, up.at(tick), f"{tick:g}", look="soft", anchor="end")
        for tick in panel.x_ticks:
            svg.text(across.at(tick), up.start + 16, f"{tick:g}", look="soft", anchor="middle")
        svg.text((across.start + across.end) / 2, height - 18, x_name, look="soft", anchor="middle")
        for name, points in panel.series.items():
            found = [(across.at(x), up.at(y)) for x, y in points]
            svg.path(found, looks[name])
            for x_at, y_at in found:
                svg.dot(x_at, y_at, looks[name])
    return str(svg)


def speeds(data: Mapping[str, Any]) -> dict[str, str]:
    """Draw the charts of docs/performance.md, out of performance.json: name of the file -> SVG.

    A curve is a number, or a table and one of its columns over the first one.
    """

    def curve(of: Any, ticks: Sequence[float]) -> list[Point]:
        if not isinstance(of, list):
            return [(ticks[0], of), (ticks[-1], of)]
        table = data["tables"][of[0]]
        column = table["head"].index(of[1])
        return [(row[0], row[column]) for row in table["rows"] if row[column] is not None]

    found = {}
    for name, chart in data["charts"].items():
        panels = []
        for each in chart["panels"]:
            ticks = each["x_ticks"]
            series = {key: curve(of, ticks) for key, of in each["series"].items()}
            panels.append(Panel(each["title"], ticks, each["y_ticks"], series))
        found[name] = curves(chart["title"], chart["x"], panels, chart["colours"])
    return found
