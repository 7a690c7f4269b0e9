"""The heatmap for terminals: what stands where, in every width, colour and encoding."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from qaflora_edge.cli.chat.view import mix_parts
from qaflora_edge.cli.heatmap import (
    ASCII_RAMP,
    RAMP,
    RAMP_256,
    compare,
    heatmap,
    ramp_colour,
    terminal_colour,
)
from qaflora_edge.cli.show import BLOCKS, layer_ranges, mix_line, paint
from qaflora_edge.show.svg_panel import leading_layers, scale
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import Measured, strategies

HOSTILE = "es\x1b[31m\nred\r\u202eback"


def fusion(*names: str, n_layer: int = 30, seed: int = 0) -> FusionWeights:
    divergence = np.random.default_rng(seed).gamma(1.0, size=(len(names), n_layer))
    weights = divergence / divergence.sum(axis=0)
    as_f32 = np.float32
    return FusionWeights(
        names, weights.astype(as_f32), divergence.astype(as_f32), "qa-flora", prompt_tokens=42
    )


def exact(*rows: list[float]) -> FusionWeights:
    names = ("math", "es", "med")[: len(rows)]
    return FusionWeights(names, np.array(rows, np.float32), None, "manual")


def columns(line: str) -> int:
    """Width by rich's console, which draws the line as a terminal would."""
    return Text.from_ansi(line).cell_len


@pytest.mark.parametrize(
    ("encoding", "colour"),
    [
        *((encoding, colour) for encoding in ("utf-8", "ascii") for colour in ("none", "256")),
        *((encoding, "truecolor") for encoding in ("utf-8", "ascii", "latin-1", "no-such", None)),
    ],
)
@pytest.mark.parametrize("width", [20, 79, 200])
def test_every_line_fits(width: int, encoding: str | None, colour: str) -> None:
    cases = [
        fusion("math", "es", "med"),
        fusion("math", "日本語のアダプター", "a-very-long-name-of-an-adapter", n_layer=126),
        fusion(*(f"adapter{i}" for i in range(9)), n_layer=1),
        fusion(HOSTILE, "x"),
        exact([1.0], [-2.5]),
    ]
    for case in cases:
        shown = heatmap(case, width=width, encoding=encoding, colour=colour)  # type: ignore[arg-type]
        both = compare(
            [("a long question " * 9, case), (HOSTILE, case)],
            width=width,
            encoding=encoding,
            colour=colour,  # type: ignore[arg-type]
        )
        for text in (shown, both):
            text.encode("ascii" if encoding in ("no-such", None) else str(encoding))
            assert max(columns(line) for line in text.splitlines()) <= width
            assert ("\x1b" in text) == (colour != "none")


def test_cells_stand_under_their_ticks_and_show_their_weights() -> None:
    row = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0]
    shown = heatmap(exact(row, row[::-1]), width=80, encoding="utf-8")
    ticks, first, second = shown.split("\n\n")[1].splitlines()
    assert first.startswith("math  0.54  ")
    start = len("math  0.54  ")
    assert first[start::3] == "▁▁▂▃▄▅▅▆▇███"  # floor(weight * 8), three columns each
    assert second[start::3] == first[start::3][::-1]
    assert [ticks.index(tick) for tick in ("0", "5", "10")] == [start, start + 15, start + 30]


@pytest.mark.parametrize("width", [20, 33, 40, 80, 200])
def test_every_layer_is_shown_once_whatever_the_width(width: int) -> None:
    case = fusion("math", "es", n_layer=80)
    shown = heatmap(case, width=width, encoding="utf-8")
    picture = shown.split("\n\n")[1].splitlines()
    rows = [line[len("math  0.50  ") :] for line in picture if line.startswith("math")]
    cell = 2 if width == 200 else 1
    expected = "".join(BLOCKS[int(weight * 8)] for weight in case.weights[0])
    assert "".join(rows)[::cell] == expected
    heads = [line for line in picture if not line.startswith(("math", "es"))]
    at = 0
    for head, row in zip(heads, rows, strict=True):
        for tick in re.finditer(r"\d+", head):
            assert int(tick[0]) == at + (tick.start() - len("math  0.50  ")) // cell
        at += len(row) // cell


def test_ascii_ramp() -> None:
    shown = heatmap(exact([0.0, 0.5, 1.0]), width=80, encoding="ascii")
    assert shown.split("\n\n")[1].splitlines()[1].endswith("...xxx@@@")
    assert f"weight 0 {ASCII_RAMP} 1" in shown


def test_colours_are_the_ramps() -> None:
    shown = heatmap(exact([0.0, 1.0]), width=40, encoding="ascii", colour="256")
    row = shown.split("\n\n")[1].splitlines()[1]
    assert row.endswith("\x1b[97;48;5;53m   \x1b[0m\x1b[97;48;5;226m   \x1b[0m")
    shown = heatmap(exact([0.0, 1.0]), width=40, encoding="ascii", colour="truecolor")
    assert "\x1b[97;48;2;68;1;84m   \x1b[0m\x1b[97;48;2;253;231;37m   \x1b[0m" in shown


def luminance(red: int, green: int, blue: int) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in
             (red, green, blue)]  # fmt: skip
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_ramps_grow_lighter_and_stand_off_black_and_white() -> None:
    levels = (0, 95, 135, 175, 215, 255)  # xterm's cube, from colour 16 on
    cube = [
        (levels[(n - 16) // 36], levels[(n - 16) // 6 % 6], levels[(n - 16) % 6]) for n in RAMP_256
    ]
    for ramp in (list(RAMP), cube):
        lights = [luminance(*colour) for colour in ramp]
        assert lights == sorted(lights)
        assert lights[0] > 0
        assert lights[-1] < 0.95
    assert ramp_colour(0.0) == RAMP[0]
    assert ramp_colour(1.0) == RAMP[-1]
    assert ramp_colour(0.5) == (34, 144, 140)


def test_negative_weights_are_marked() -> None:
    shown = heatmap(exact([-0.5, 1.5], [0.25, 0.25]), width=80, encoding="utf-8")
    assert "---▇▇▇" in shown
    assert f"weight 0 {BLOCKS} 2\n- below 0 (the lowest is -0.5)" in shown
    coloured = heatmap(exact([-0.5, 1.5]), width=80, encoding="utf-8", colour="256")
    assert "m---\x1b[0m" in coloured


@pytest.mark.parametrize(
    ("largest", "top"),
    [(0.0, 1), (1e-9, 0.1), (0.01, 0.1), (0.1, 0.1), (0.3, 0.3), (0.31, 0.4), (0.5000001, 0.5),
     (0.95, 1), (1, 1), (1.0000001, 1), (1.1, 2), (9, 9)],
)  # fmt: skip
def test_scale_ends_at_a_round_number_that_no_weight_exceeds(largest: float, top: float) -> None:
    low, high = scale([exact([largest, 0.0]), exact([0.0, 0.0])])
    assert (low, high) == (0, pytest.approx(top, abs=1e-12))


@pytest.mark.parametrize(
    ("lowest", "largest", "low"),
    [(0.25, 0.7, 0.2), (0.2999999, 0.7, 0.3), (0.3, 0.3, 0), (-1, 0.7, 0), (1.2, 3, 1),
     (0.9, 1, 0)],
)  # fmt: skip
def test_scale_begins_at_a_round_number_below_every_weight(
    lowest: float, largest: float, low: float
) -> None:
    assert scale([exact([largest, lowest])])[0] == pytest.approx(low, abs=1e-12)


def test_terminal_uses_the_whole_scale() -> None:
    shown = heatmap(exact([0.4, 0.6], [0.6, 0.4]), width=80, encoding="utf-8")
    assert "math  0.50  ▁▁▁███" in shown
    assert f"weight 0.4 {BLOCKS} 0.6" in shown


@pytest.mark.parametrize(
    ("weight", "mean"),
    [(0.256, "0.26"), (-0.25, "-0.2"), (12.34, "12.3"), (-12.34, " -12"), (123.4, " 123"),
     (12345, ">999"), (-1234, "<-99")],
)  # fmt: skip
def test_means_keep_the_columns_straight(weight: float, mean: str) -> None:
    for shown in (
        heatmap(exact([weight] * 2), width=80, encoding="utf-8"),
        compare([("a", exact([weight] * 2)), ("b", exact([weight] * 2))], width=80, encoding=None),
    ):
        row = next(line for line in shown.splitlines() if line.startswith("math"))
        assert row.startswith(f"math  {mean}  ")


def test_layers_led() -> None:
    case = exact([0.6, 0.5, 0.1, 0.9, 0.0], [0.4, 0.5, 0.9, 0.1, 0.0])
    assert leading_layers(case) == [[0, 3], [2]]
    assert layer_ranges([0, 1, 2, 4, 7, 8], "–") == "0–2, 4, 7–8"
    assert layer_ranges([], "-") == "none"
    lines = heatmap(case, width=80, encoding="utf-8").splitlines()
    assert "math  0, 3" in lines
    assert "es    2" in lines


def test_divergence_is_shown_where_it_was_measured() -> None:
    case = fusion("math", "es")
    assert case.divergence is not None
    mean = f"{case.divergence[1].mean():.3g}"
    assert re.search(rf"^es +{mean}  \d", heatmap(case, width=80, encoding="utf-8"), re.M)
    assert f"\nes: {mean}" in heatmap(case, width=40, encoding="utf-8")
    assert "divergence" not in heatmap(exact([1.0]), width=80, encoding="utf-8")


@pytest.mark.parametrize(
    ("strategy", "read", "name"),
    [
        ("qa-flora", " · lens norm, pool last", "divergence"),
        ("calibrated:power=2", " · lens norm, pool last", "divergence"),
        ("cosine", " · pool last", "cosine distance"),
        ("two-place", "", "added to q, k, v"),
        ("two-place:answer=0.7", "", "added to q, k, v"),
        ("norm:2", "", "added to q"),
        ("centroid", "", "similarity"),
        ("of-another-package", " · lens norm, pool last", "divergence"),
    ],
)
def test_a_measure_has_its_strategys_name_and_what_it_read(
    strategy: str, read: str, name: str
) -> None:
    case = replace(fusion("math", "es"), strategy=strategy)
    head = f"strategy {strategy}{read}"
    shown = heatmap(case, width=80, encoding="utf-8")
    assert shown.startswith(f"{head} · 42 prompt tokens · ")
    assert f"\n      {name}  weighs most at layers\n" in shown
    assert f"\nmean {name}\nmath: " in heatmap(case, width=59, encoding="utf-8")
    assert compare([("a", case)] * 2, width=80, encoding="utf-8").startswith(f"{head}\n")


def test_every_strategy_of_the_package_that_measures_names_its_measure() -> None:
    def found(strategy: str) -> Measured:
        return replace(fusion("math"), strategy=strategy).measured

    ours = [each for each in strategies() if type(each).__module__.startswith("qaflora_edge.")]
    names = [each.name for each in ours if each.is_probed]
    assert {"qa-flora", "two-place", "norm"} <= {*names}
    other = found("of-another-package")
    assert [name for name in names if found(name) is other] == []


def test_no_adapters() -> None:
    empty = FusionWeights((), np.zeros((0, 30), np.float32), None, "base")
    shown = heatmap(empty, width=80, encoding="utf-8")
    assert shown.endswith("There are no adapters: the base answers alone.")
    assert compare([("a", empty)] * 2, width=80, encoding="utf-8").endswith(
        "the base answers alone."
    )


def test_base_alone_has_no_rows_of_zeros() -> None:
    none = FusionWeights(("math", "es"), np.zeros((2, 30), np.float32), None, "base")
    for shown in (
        heatmap(none, width=80, encoding="utf-8"),
        compare([("a", none), ("b", none)], width=80, encoding="utf-8"),
    ):
        assert shown.endswith("No adapter weighs anything: the base answers alone.")
        assert "math" not in shown
    assert mix_line(none) == "the base alone"
    assert mix_parts(none) == ["the base alone"]


def test_where_no_adapter_stands_out_it_says_so_and_what_to_do() -> None:
    found = fusion("math", "es")
    alone = replace(found, strategy="two-place", weights=np.zeros_like(found.weights))
    why = "No adapter stands out here: the base answers alone (two-place:abstain=never mixes all"
    for shown in (
        heatmap(alone, width=100, encoding="utf-8"),
        compare([("a", alone), ("b", alone)], width=100, encoding="utf-8"),
    ):
        assert shown.endswith(f"\n\n{why} the same).")
    mixed = replace(found, strategy="two-place")
    both = compare([("a", mixed), ("b", alone)], width=100, encoding="utf-8")
    assert "\n2 none: the base answers alone\n" in both
    asked = replace(alone, strategy="two-place:question=0,answer=0,abstain=never")
    assert "No adapter weighs anything" in heatmap(asked, width=100, encoding="utf-8")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_names_are_folded_not_cut(width: int) -> None:
    name = "a-very-long-name-of-an-adapter-for-medicine"
    shown = heatmap(fusion("math", name), width=width, encoding="utf-8")
    rows = [line for line in shown.split("\n\n")[1].splitlines() if not line.startswith(" ")]
    column = min(20, max(4, width // 4))
    parts = "".join(row[:column].strip() for row in rows if not row.startswith("math"))
    assert parts in (name, name * (len(parts) // len(name)))
    leads = shown.split("\n\n")[-2] if width >= 60 else shown
    flat = "".join(line[:column].strip() for line in leads.splitlines()[1:])
    assert name in (flat if width >= 60 else re.sub(r"\s", "", shown))
    assert "…" not in shown


def test_prompts_are_folded_to_three_lines() -> None:
    words = " ".join(f"word{i}" for i in range(15))
    for width, n_line in ((40, 3), (80, 3)):
        cases = [(words, fusion("a", "b")), ("two", fusion("a", "b", seed=1))]
        shown = compare(cases, width=width, encoding="utf-8")
        assert set(words.split()) <= set(shown.split())
        long = compare([(words * 9, case) for _, case in cases], width=width, encoding="utf-8")
        assert long.count("word1 ") >= 1
        assert sum("word" in line for line in long.splitlines()) <= 2 * n_line
        assert "…" in long


def test_names_cannot_write_to_the_terminal() -> None:
    shown = heatmap(fusion(HOSTILE, "x"), width=80, encoding="utf-8")
    assert set(re.findall(r"[^\x20-\x7e]", shown)) <= {*BLOCKS, "·", "–", "\n"}
    assert "es [31m red back" in shown


def test_prompts_stand_side_by_side_on_one_scale() -> None:
    first, second = exact([0.25, 0.0], [0.0, 0.25]), exact([1.0, 0.5], [0.0, 0.5])
    shown = compare([("one", first), ("two", second)], width=80, encoding="utf-8")
    lines = shown.splitlines()
    assert lines[2].split() == ["1", "one", "2", "two"]
    assert lines[3].split() == ["mean", "0", "mean", "0"]
    assert lines[4] == "math  0.12  ▃▃▃▁▁▁  0.75  ███▅▅▅"
    assert lines[5] == "es    0.12  ▁▁▁▃▃▃  0.25  ▁▁▁▅▅▅"
    assert lines[7:10] == [
        "The adapter that weighs most, and at which layers:",
        "1 math 0; es 1",
        "2 math 0",
    ]


def test_prompts_stand_below_each_other_where_it_is_narrow() -> None:
    cases = [("one", fusion("math", "es")), ("two", fusion("math", "es", seed=1))]
    shown = compare(cases, width=40, encoding="utf-8")
    assert re.search(r"^1 one", shown, re.M)
    assert re.search(r"^2 two", shown, re.M)
    assert sum(line.startswith("math") for line in shown.splitlines()) == 4  # two bands each


def test_a_terminal_draws_it_as_meant() -> None:
    """rich, which shares no code with us, reads the escapes as backgrounds of single cells."""
    shown = heatmap(exact([0.0, 1.0]), width=40, encoding="utf-8", colour="truecolor")
    console = Console(record=True, width=40, file=io.StringIO(), color_system="truecolor")
    console.print(Text.from_ansi(shown))
    page = console.export_html(inline_styles=True)
    assert 'background-color: #440154">   </span>' in page
    assert 'background-color: #fde725">   </span>' in page


class Stream:
    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize(
    ("environ", "is_terminal", "colour"),
    [
        ({"TERM": "xterm-256color"}, True, "256"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, True, "truecolor"),
        ({"TERM": "xterm-direct"}, True, "truecolor"),
        ({"WT_SESSION": "x"}, True, "truecolor"),
        ({"TERM": "xterm"}, True, "none"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, True, "none"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1", "FORCE_COLOR": "1"}, True, "none"),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, True, "256"),
        ({"TERM": "xterm-256color"}, False, "none"),
        ({"TERM": "xterm-256color", "FORCE_COLOR": "1"}, False, "256"),
    ],
)
def test_colour_follows_the_terminal(
    environ: dict[str, str], is_terminal: bool, colour: str
) -> None:
    assert terminal_colour(Stream(is_terminal), environ) == colour


def test_paint_respects_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint("text", "red") == "\x1b[31mtext\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("text", "red") == "text"
