"""Fusion weights in words, on a terminal, as SVG and in a notebook."""

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.cells import cell_len

from qaflora_edge.show import text as show
from qaflora_edge.show.pages import notebook_html, picture
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import Reason

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</title></svg></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b]"
)
Weighed = tuple[str, FusionWeights]
SUBJECT = "demo on tiny"


def weighed(text: str = "How many?", *names: str, seed: int = 0, n_layer: int = 12) -> Weighed:
    names = names or ("math", "es", "med")
    divergence = np.random.default_rng(seed).gamma(1.0, size=(len(names), n_layer))
    weights = (divergence / divergence.sum(axis=0)).astype(np.float32)
    more = {"strategy": "qa-flora", "prompt_tokens": 7}
    return text, FusionWeights(names, weights, divergence.astype(np.float32), **more)  # type: ignore[arg-type]


def exact(*rows: list[float]) -> FusionWeights:
    names = ("math", "es", "med")[: len(rows)]
    return FusionWeights(names, np.array(rows, np.float32), None, "manual")


def printed(items: list[Weighed], encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    show.print_heatmap(items, stream)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.5], [0.5]], "math ×0.5 · es ×0.5"),
        ([[0.0], [0.81]], "es ×0.81"),
        ([[0.0], [0.0]], "base"),
        ([[0.2, 0.4], [0.8, 0.6]], "es ×0.7 · math ×0.3"),
        ([[1.5], [-0.5]], "math ×1.5 · es ×-0.5"),
    ],
)
def test_who_spoke(rows: list[list[float]], expected: str) -> None:
    assert show.who_spoke(exact(*rows)) == expected


def test_of_many_adapters_the_heaviest_are_named() -> None:
    names = tuple(f"a{index}" for index in range(64))
    mix = FusionWeights(names, np.linspace(0.01, 0.64, 64, dtype=np.float32)[:, None], None, "m")
    assert (
        show.who_spoke(mix)
        == "a63 ×0.64 · a62 ×0.63 · a61 ×0.62 · a60 ×0.61 · a59 ×0.6 · 59 others"
    )
    _, *rows = show.reason_rows(mix)
    assert [row[0] for row in rows] == ["a59", "a60", "a61", "a62", "a63", "59 others"]
    layered = replace(mix, weights=np.repeat(mix.weights, 3, axis=1) * [0.5, 1, 1])
    lines = printed([("", layered)])
    assert [line.split()[0] for line in lines if line.startswith("a")][1:] == [*names[59:]]
    assert "59 others" in [line.strip() for line in lines]


@pytest.mark.parametrize(("width", "encoding"), [(40, "ascii"), (79, "utf-8"), (200, "utf-8")])
def test_heatmap_fits_the_terminal(
    width: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for item in (weighed(), weighed("x " * 200, "日本語", HOSTILE, n_layer=126)):
        lines = printed([item, item], encoding)
        assert max(cell_len(line) for line in lines[:-2]) <= width
        assert not [char for line in lines for char in line if ord(char) < 32]


def test_cells_show_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = [0.0, 0.13, 0.26, 0.38, 0.51, 0.63, 0.76, 1.0]
    lines = printed([("", exact(row, row[::-1]))])
    cells = {line.split()[0]: line.split()[-1] for line in lines if line[:4] in ("math", "es  ")}
    assert cells == {
        "math": "".join(3 * c for c in "▁▂▃▄▅▆▇█"),
        "es": "".join(3 * c for c in "█▇▆▅▄▃▂▁"),
    }
    assert "weight 0 ▁▂▃▄▅▆▇█ 1; layers 0 to 7" in lines


def test_base_alone_says_why() -> None:
    why = "No adapter weighs anything: the base answers alone."
    assert printed([("", exact([0.0], [0.0]))])[:2] == ["base", why]
    assert why in Page(notebook_html(exact([0.0], [0.0]))).texts


def test_what_decided_is_a_table_and_no_heatmap() -> None:
    needed = {"answer": 1.5, "question": 1.0}
    math = Reason({"answer": 3.08, "question": -0.4}, needed, "answer")
    es = Reason({"answer": 0.25, "question": 2.2}, needed, "question")
    fusion = replace(exact([0.5], [0.5]), because="So.", why={"math": math, "es": es})
    rows = [
        ["adapter", "weight", "answer", "question", "taken", "as"],
        ["math", "0.50", "3.08", "-0.40", "answer"],
        ["es", "0.50", "0.25", "2.20", "question"],
        ["threshold", "1.50", "1.00"],
    ]
    assert [line.split() for line in printed([("", fusion)])[1:7]] == [["So."], [], *rows]
    page = notebook_html(fusion)
    assert {"So.", *rows[1], *rows[3]} <= {*Page(page).texts}
    assert "<rect" not in page
    drawn = ElementTree.fromstring(picture([("", fusion)], SUBJECT))
    cells = [each[0].text for each in drawn.iter(f"{SVG}rect") if each.get("class") == "cell"]
    assert cells == ["math\nweight 0.500", "es\nweight 0.500"]


def test_what_turns_or_controls_is_spelt() -> None:
    assert show.spelt("a\u202etxt.exe\x1b[2J") == "a\\u202etxt.exe\\x1b[2J"
    assert show.visible("a\x1b[31m\r\nb") == "a?[31m\nb"
    assert show.crop("ab cd ef", 5) == "ab c…"


def test_leading_layers_and_scale() -> None:
    fusion = exact([0.5, 0.2, 0.9], [0.5, 0.7, 0.1])
    assert show.leading_layers(fusion) == [[2], [1]]
    assert show.scale([fusion]) == (0.1, 0.9)
    assert show.scale([exact([0.0], [0.0])]) == (0.0, 1.0)


def test_svg_has_a_cell_per_weight_with_its_numbers() -> None:
    item = weighed()
    root = ElementTree.fromstring(picture([item, weighed("two", seed=1)], SUBJECT))
    cells = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "cell"]
    fusion = item[1]
    assert len(cells) == 2 * 3 * 12
    low, high = show.scale([fusion, weighed(seed=1)[1]])
    for index, cell in enumerate(cells[: 3 * 12]):
        row, layer = divmod(index, 12)
        weight, divergence = fusion.weights[row, layer], fusion.divergence[row, layer]
        title = f"{fusion.adapters[row]}, layer {layer}\nweight {weight:.3f}\n"
        title += f"divergence {divergence:.3g} nats"
        assert [each.text for each in cell] == [title]
        opacity = (weight - low) / (high - low)
        assert float(cell.get("fill-opacity", "")) == pytest.approx(opacity, abs=6e-4)
    texts = {each.text for each in root.iter(f"{SVG}text")}
    assert {"math", "es", "med", "How many?", "two", SUBJECT} <= texts


class Page(HTMLParser):
    """Tags with their attributes, as a parser of the standard library sees them.

    parts  a tag without a text, or the last tag and a text; in order
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parts.append((tag, None))

    def handle_data(self, data: str) -> None:
        self.parts.append((self.tags[-1][0] if self.tags else "", data))

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.parts if text is not None]


def test_a_notebook_asks_for_nothing_from_elsewhere() -> None:
    page = Page(text := notebook_html(weighed()[1]))
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "style", "action", "data", "background"}
    assert not [name for name in names if name.startswith("on")]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    for word in ("url(", "@import", "http:", "https:"):
        assert word not in text


def test_hostile_text_stays_text() -> None:
    item = weighed(HOSTILE, HOSTILE, "b")
    page = Page(notebook_html(item[1]))
    plain = Page(notebook_html(weighed("x", "a", "b")[1]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    shown = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b")
    assert any(shown in text for text in page.texts)
    root = ElementTree.fromstring(picture([item], HOSTILE))
    assert root.find(f".//{SVG}script") is None
    assert f"{shown}, layer 0\n" in "".join(root.itertext())
