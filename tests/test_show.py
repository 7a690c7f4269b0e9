"""Fusion weights in words, on a terminal, and as SVG."""

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from rich.cells import cell_len

from qaflora_edge import show
from qaflora_edge.weighing.plan import DraftStep, FusionWeights, Plan, Reason, WriteStep

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</title></svg></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b]"
)
SUBJECT = "demo on tiny"


def weighed(*names: str, seed: int = 0, n_layer: int = 12) -> FusionWeights:
    names = names or ("math", "es", "med")
    divergence = np.random.default_rng(seed).gamma(1.0, size=(len(names), n_layer))
    weights = (divergence / divergence.sum(axis=0)).astype(np.float32)
    plan = Plan.mix(weights, divergence.astype(np.float32))
    return FusionWeights(names, plan, "qa-flora", prompt=(1,) * 7)


def exact(*rows: list[float]) -> FusionWeights:
    names = ("math", "es", "med")[: len(rows)]
    return FusionWeights(names, Plan.mix(np.array(rows, np.float32)), "manual")


def printed(fusion: FusionWeights, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    show.print_heatmap(fusion, stream)
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
def test_who_spoke(rows, expected) -> None:
    assert show.who_spoke(exact(*rows)) == expected


def test_of_many_adapters_the_heaviest_are_named() -> None:
    names = tuple(f"a{index}" for index in range(64))
    mix = FusionWeights(
        names, Plan.mix(np.linspace(0.01, 0.64, 64, dtype=np.float32)[:, None]), "m"
    )
    heaviest = "a63 ×0.64 · a62 ×0.63 · a61 ×0.62 · a60 ×0.61 · a59 ×0.6 · 59 others"
    assert show.who_spoke(mix) == heaviest
    _, *rows = show.reason_rows(mix)
    assert [row[0] for row in rows] == ["a59", "a60", "a61", "a62", "a63", "59 others"]
    layers = np.repeat(mix.weights, 3, axis=1) * [0.5, 1, 1]
    layered = replace(mix, plan=Plan.mix(layers))
    lines = printed(layered)
    assert [line.split()[0] for line in lines if line.startswith("a")][1:] == [*names[59:]]
    assert "59 others" in [line.strip() for line in lines]


def test_a_relay_shows_who_knows_and_who_writes() -> None:
    reasons = {name: Reason({"answer": 2.0}, {"answer": 1.25}) for name in ("math", "es")}
    steps = (DraftStep("math"), WriteStep([[0.0], [1.0]], "before"))
    mix = replace(exact([0.0], [1.0]), plan=Plan(steps, why=reasons))
    assert [row[-1] for row in show.reason_rows(mix)[:3]] == ["taken as", "knower", "writer"]


@pytest.mark.parametrize(("width", "encoding"), [(40, "ascii"), (79, "utf-8"), (200, "utf-8")])
def test_heatmap_fits_the_terminal(width, encoding, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for fusion in (weighed(), weighed("日本語", HOSTILE, n_layer=126)):
        lines = printed(fusion, encoding)
        assert max(cell_len(line) for line in lines[:-2]) <= width
        assert not [char for line in lines for char in line if ord(char) < 32]


def test_cells_show_their_weights(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = [0.0, 0.13, 0.26, 0.38, 0.51, 0.63, 0.76, 1.0]
    lines = printed(exact(row, row[::-1]))
    cells = {line.split()[0]: line.split()[-1] for line in lines if line[:4] in ("math", "es  ")}
    assert cells == {
        "math": "".join(3 * c for c in "▁▂▃▄▅▆▇█"),
        "es": "".join(3 * c for c in "█▇▆▅▄▃▂▁"),
    }
    assert "weight 0 ▁▂▃▄▅▆▇█ 1; layers 0 to 7" in lines


def test_base_alone_says_why() -> None:
    why = "No adapter weighs anything: the base answers alone."
    assert printed(exact([0.0], [0.0]))[:2] == ["base", why]


def test_what_decided_is_a_table_and_no_heatmap() -> None:
    needed = {"answer": 1.5, "question": 1.0}
    math = Reason({"answer": 3.08, "question": -0.4}, needed, "answer")
    es = Reason({"answer": 0.25, "question": 2.2}, needed, "question")
    plan = Plan.mix([[0.5], [0.5]], None, {"math": math, "es": es}, "So.")
    fusion = replace(exact([0.5], [0.5]), plan=plan)
    rows = [
        ["adapter", "weight", "answer", "question", "taken", "as"],
        ["math", "0.50", "3.08", "-0.40", "answer"],
        ["es", "0.50", "0.25", "2.20", "question"],
        ["threshold", "1.50", "1.00"],
    ]
    assert [line.split() for line in printed(fusion)[1:7]] == [["So."], [], *rows]


def test_what_turns_or_controls_is_spelt() -> None:
    assert show.spelt("a\u202etxt.exe\x1b[2J") == "a\\u202etxt.exe\\x1b[2J"
    assert show.visible("a\x1b[31m\r\nb") == "a?[31m\nb"
    assert show.crop("ab cd ef", 5) == "ab c…"


def test_scale() -> None:
    assert show.scale(exact([0.5, 0.2, 0.9], [0.5, 0.7, 0.1])) == (0.1, 0.9)
    assert show.scale(exact([0.0], [0.0])) == (0.0, 1.0)


def drawn(fusion: FusionWeights, label: str, subject: str) -> ElementTree.Element:
    return ElementTree.fromstring(show.picture(fusion, label, subject))


def test_svg_shows_what_the_terminal_does(monkeypatch) -> None:
    fusion = weighed()
    monkeypatch.setenv("COLUMNS", "81")
    root = drawn(fusion, "How many?", SUBJECT)
    texts = [(each.text or "").replace("\xa0", " ").strip() for each in root.iter(f"{SVG}text")]
    assert {"How many?", SUBJECT} <= {*texts}
    words = " ".join(texts)
    for line in printed(fusion):
        assert all(word in words for word in line.split()), line


def test_hostile_text_stays_text_and_no_host_is_asked() -> None:
    shown = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b")
    root = drawn(weighed("a", "b"), HOSTILE, HOSTILE)
    plain = drawn(weighed("a", "b"), "x", "x")
    assert {each.tag for each in root.iter()} == {each.tag for each in plain.iter()}
    assert shown in "".join(root.itertext()).replace("\xa0", " ")
    assert "url(" not in show.picture(weighed(), "x", "x").replace("url(#", "")
