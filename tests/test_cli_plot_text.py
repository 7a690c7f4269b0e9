"""Titles and names in pictures: cut by how wide they are, turned by nothing, in existing fonts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_cli_plot import SUBJECT, ElementTree, html, pixels, svg, texts, weighed

from qaflora_edge.cli.plot import write_plot
from qaflora_edge.cli.plot_figure import LAYER_INCHES, TITLE_POINTS
from qaflora_edge.cli.plot_fonts import fonts_for
from qaflora_edge.show.picture_text import crop, spelt, wrap

TURNED = "abc\u202etxt.exe\u2066"
CHINESE = "\u3400\u3401"  # of an extension that hardly a font has: drawn by the one below


@pytest.fixture
def chinese_font(tmp_path: Path) -> Iterator[str]:
    """A family with a filled square for each of `CHINESE`, known to matplotlib."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib.font_manager import fontManager

    def square() -> object:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 900), (1000, 900), (1000, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", "one", "two"]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, CHINESE), names[1:], strict=True)))
    builder.setupGlyf({name: square() for name in names})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Qaflora Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100, usWeightClass=400)
    builder.setupPost()
    path = tmp_path / "squares.ttf"
    builder.save(path)
    before = list(fontManager.ttflist)
    fontManager.addfont(path)
    yield "Qaflora Squares"
    fontManager.ttflist[:] = before


def test_what_turns_text_is_spelt() -> None:
    assert spelt(TURNED) == "abc\\u202etxt.exe\\u2066"
    assert spelt("a\tb\nc é 👩\u200d🚀 \u200f") == "a\tb\nc é 👩\u200d🚀 \u200f"
    assert spelt("\x1b[0m\x00\x9b\ufffe") == "\\x1b[0m\\x00\\x9b\\ufffe"


@pytest.mark.parametrize("kind", [svg, html])
def test_a_direction_override_turns_no_title(kind: object) -> None:
    prompt, fusion = weighed(TURNED, TURNED, "b")
    text = kind([(prompt, fusion)])  # type: ignore[operator]
    assert not {"\u202e", "\u2066"} & set(text)
    assert text.count("abc\\u202etxt.exe\\u2066") > 12  # the title, the name, every cell


def test_wrap_and_crop() -> None:
    def wide(text: str) -> int:
        return sum(2 if ord(char) > 0x2E80 else 1 for char in text)

    assert wrap("one two three four", 9, wide, n_line=2) == ["one two", "three fo…"]
    assert wrap("日本語日本語", 6, wide, n_line=2) == ["日本語", "日本語"]
    assert wrap("日本語日本語日", 6, wide, n_line=2) == ["日本語", "日本…"]
    assert wrap("a\n b", 9, wide, n_line=2) == ["a b"]
    assert crop("日本語", 5, wide) == "日本…"
    assert crop("日本語", 6, wide) == "日本語"
    assert crop("x" * 10, 1, wide) == "…"


@pytest.mark.parametrize("char", ["W", "i", "😀"])
def test_svg_titles_end_within_their_panel(char: str) -> None:
    """Oracle: no font draws a wide character much wider than its size, nor a W."""
    items = [weighed(char * 300, "a", "b", n_layer=24, seed=seed) for seed in range(3)]
    lines = [text for text in texts(ElementTree.fromstring(svg(items))) if char * 9 in text]
    assert sum(text.endswith("…") for text in lines) == 1  # all second lines are the same
    assert sorted(line[:4] for line in lines if not line.startswith(char)) == [
        f"{n}. {char}" for n in range(1, 4)
    ]
    for line in lines:
        assert len(line) > 20
        if char != "i":
            assert line.count(char) * TITLE_POINTS / 72 <= LAYER_INCHES * 24 + 0.2


def ink_right_of(path: Path, share: float) -> int:
    """Dark pixels in the right end of a picture."""
    picture = pixels(path)[:, :, :3]
    return int((picture[:, int(picture.shape[1] * share) :].max(axis=2) < 0.3).sum())


@pytest.mark.slow
@pytest.mark.parametrize("text", ["W" * 300, "palabras " * 60])
def test_png_titles_end_within_the_picture(text: str, tmp_path: Path) -> None:
    path = tmp_path / "w.png"
    assert write_plot(path, [weighed(text, "a" * 30, "b")], SUBJECT) == ""
    assert ink_right_of(path, 0.995) == 0
    assert ink_right_of(path, 0.5) > 100  # and two lines of it are there


@pytest.mark.slow
def test_png_draws_with_a_font_that_has_the_characters(tmp_path: Path, chinese_font: str) -> None:
    path = tmp_path / "w.png"
    fonts = fonts_for(f"a{CHINESE}")
    assert (fonts.families[-1], fonts.missing) == (chinese_font, frozenset())
    assert write_plot(path, [weighed(CHINESE * 10, "a", "b")], SUBJECT) == ""
    is_black = pixels(path)[:, :, :3].max(axis=2) < 0.15
    height, width = is_black.shape
    title = is_black[: height // 3].sum(axis=1)
    assert title.max() > width / 3  # a line of squares, each beside the next


def test_png_says_which_characters_no_font_has(tmp_path: Path) -> None:
    nowhere = "\u0378\u0379"  # not assigned
    path = tmp_path / "w.png"
    fonts = fonts_for(f"a{nowhere}\u200b")
    assert fonts.missing >= set(nowhere)
    assert fonts.shown(f"a{nowhere}") == "a□□"
    assert write_plot(path, [weighed(f"a{nowhere}", "a", "b")], SUBJECT) == (
        f"Note: no font found here has 2 of the characters in {path} (\u0378\u0379); □ "
        "stands for them. Install one that has, such as Noto Sans CJK, or write .html or .svg, "
        "which leave fonts to the viewer."
    )
    assert path.is_file()


def test_weights_shows_the_note_on_stderr(tmp_path: Path) -> None:
    from bundles import make_bundle

    from qaflora_edge.cli import main

    arguments = [str(make_bundle(tmp_path).folder), "a \u0378", "--raw-prompt", "--json"]
    result = CliRunner().invoke(main, ["weights", *arguments, "--plot", str(tmp_path / "w.png")])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Note: no font found here has 1 of the characters in ")
    assert "Note" not in result.stdout


def test_names_in_png_are_cut(tmp_path: Path) -> None:
    write_plot(tmp_path / "w.png", [weighed("p", "W" * 60, "b", n_layer=4)], SUBJECT)
    left = pixels(tmp_path / "w.png")[:, :3, :3]
    assert np.all(left > 0.9)  # nothing is cut off by the picture's edge
