"""Markdown on a terminal while it streams: whole, exactly once, at every size"""

import io
import random
import re

import pytest
from rich.console import Console
from screen import Screen, Ticks, stream_on, whole

from qaflora_edge.cli.chat.markdown import THEME, render_block
from qaflora_edge.cli.chat.stream import LiveLines
from qaflora_edge.cli.show import to_ascii
from qaflora_edge.show.text import visible

ANSWER = """\
# Adding numbers

Two numbers are **added** like `a + b`, as in this function with a rather long
line of text that wraps:

```python
def add(a, b):
    # <b>no tag</b>
    return a + b
```

Advantages:
- it is short
- it is *clear*
  - even nested

1. first

2. second

| name | meaning |
|------|---------|
| a | the first |
| b | the second |

A poem
keeps its lines.

> quoted

<div>tags are text</div> and <|im_end|> too, and [a link](https://example.org/x).

[note]: https://example.org is no definition
"""
LONG_CODE = "Here:\n\n```\n" + "".join(f"line {i}\n" for i in range(40)) + "```\n\nDone."
LONG_TEXT = " ".join(f"word{i}" for i in range(120))
LONG_LIST = "".join(f"- item {i}\n" for i in range(30)) + "\nEnd."
LONG_WORD = "x" * 150 + " 漢字" * 20 + " 🙂👍🏽" * 10


def pieces(text: str, seed: int) -> list[str]:
    """The text in pieces of random lengths, as tokens come."""
    chance = random.Random(seed)
    found = []
    while text:
        n = chance.randint(1, 20)
        found.append(text[:n])
        text = text[n:]
    return found


def streamed(text: str, columns: int, height: int, *, seed: int = 0, above: int = 0) -> Screen:
    """A screen after an answer that was redrawn with every piece; a prompt follows it."""
    screen = Screen(columns, height)
    screen.write("> question\n" * above)
    clock = Ticks()
    stream = stream_on(screen, clock=clock)
    for piece in pieces(text, seed):
        clock.now += 1
        stream.feed(piece)
    stream.finish()
    screen.write("> ")
    return screen


@pytest.mark.parametrize(("columns", "height", "above"), [(20, 24, 27), (40, 5, 0), (80, 10, 13)])
@pytest.mark.parametrize(
    "text", [ANSWER, LONG_CODE, LONG_TEXT, LONG_LIST, LONG_WORD, "", "\n\n", "ends\n\n\n"]
)
def test_an_answer_comes_out_whole_and_once_however_it_arrives(
    text: str, columns: int, height: int, above: int
) -> None:
    """On a screen that is empty, and at the end of one that is full."""
    screen = streamed(text, columns, height, seed=columns, above=above)
    assert screen.lines == ["> question"] * above + whole(text, columns)


def test_the_rendering_of_an_answer() -> None:
    assert whole(ANSWER, 60) == [
        "Adding numbers",
        "",
        "Two numbers are added like a + b, as in this function with",
        "a rather long",
        "line of text that wraps:",
        "",
        "─── python",
        "def add(a, b):",
        "    # <b>no tag</b>",
        "    return a + b",
        "───",
        "",
        "Advantages:",
        "",
        " • it is short",
        " • it is clear",
        "    • even nested",
        "",
        "  1 first",
        "  2 second",
        "",
        " name  meaning",
        " ────────────────",
        " a     the first",
        " b     the second",
        "",
        "A poem",
        "keeps its lines.",
        "",
        "▌ quoted",
        "",
        "<div>tags are text</div> and <|im_end|> too, and a link",
        "(https://example.org/x).",
        "",
        "[note]: https://example.org is no definition",
        ">",
    ]


def test_every_word_of_a_long_answer_is_there() -> None:
    for text, pattern in (
        (LONG_CODE, r"line \d+"),
        (LONG_TEXT, r"word\d+"),
        (LONG_LIST, r"item \d+"),
    ):
        found = re.findall(pattern, "\n".join(streamed(text, 40, 10).lines))
        assert found == re.findall(pattern, text)


WORDS = [
    *(
        "a",
        "of",
        "**bold**",
        "*it*",
        "`code`",
        "_u_",
        "~~no~~",
        "[link](http://a.b)",
        "2*3",
        "\\\\*",
    ),
    *("snake_case", "**two", "words**", "a|b", "**", "*", "_", "`", "[", "]", "(", ")", "&amp;"),
    *(
        "&copy",
        "<b>",
        "http://x.y",
        "漢字",
        "🙂",
        "`a*b`",
        "*a",
        "**b**",
        "c*",
        "internationalisation",
    ),
    "https://example.org/a/very/long/path-that-is-wider/than-the-screen-is",
]


def some_block(chance: random.Random) -> str:
    def text(n: int) -> str:
        return "".join(
            chance.choice(WORDS) + chance.choice(["  \n" if n > 20 else " ", " ", " ", " "])
            for _ in range(chance.randint(1, n))
        )

    kind = chance.choice(["text", "text", "code", "bullets", "numbers", "table", "quote", "head"])
    if kind == "code":
        rows = [chance.choice(["", "  ", "\t"]) + text(12) for _ in range(chance.randint(0, 12))]
        return "\n".join(["```" + chance.choice(["", "python", "nonsense"]), *rows, "```"])
    if kind in ("bullets", "numbers"):
        first = chance.choice([0, 1, 7, 97])
        gap = chance.choice(["\n", "\n", "\n\n"])
        return gap.join(
            (f"{first + i}. " if kind == "numbers" else "- ")
            + text(15)
            + chance.choice(["", "", "\n    - " + text(6), "\n    ```\n    x = 1\n    ```"])
            for i in range(chance.randint(1, 14))
        )
    if kind == "table":
        rows = [f"| {text(2)} | {text(3)} |" for _ in range(chance.randint(0, 9))]
        return "\n".join(["| a | b |", "|---|---|", *rows])
    return {"text": "", "quote": "> ", "head": "## "}[kind] + text(8 if kind == "head" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_answer_comes_out_whole_and_once_on_a_low_screen(seed: int) -> None:
    """What is printed before its block is complete stays right whatever comes behind it."""
    chance = random.Random(seed)
    text = "\n\n".join(some_block(chance) for _ in range(chance.randint(1, 6)))
    columns, height = chance.randint(12, 60), chance.randint(3, 12)
    lines = streamed(text, columns, height, seed=seed).lines
    expected = whole(text, columns)
    assert lines[: len(expected)] == expected
    assert not any(lines[len(expected) :])  # rows that were erased


@pytest.mark.parametrize(
    ("text", "pattern"),
    [(LONG_CODE, r"line \d+"), (LONG_TEXT, r"word\d+"), (LONG_LIST, r"item \d+")],
)
def test_a_block_taller_than_the_screen_is_there_from_its_beginning(
    text: str, pattern: str
) -> None:
    """Also while it grows: what scrolled out can be read above."""
    screen = Screen(40, 10)
    clock = Ticks()
    stream = stream_on(screen, clock=clock)
    for piece in pieces(text[: len(text) * 3 // 4], seed=1):
        clock.now += 1
        stream.feed(piece)
    found = re.findall(pattern, "\n".join(screen.lines))
    assert len(found) > 20
    assert found[:-1] == re.findall(pattern, text)[: len(found) - 1]


def test_a_narrower_window_leaves_no_torn_copy_of_a_tall_block() -> None:
    """Its lines that are not for good still fit on the screen, where they can be erased."""
    screen = Screen(60, 10)
    clock = Ticks()
    stream = stream_on(screen, clock=clock)
    stream.feed(LONG_TEXT[:700])
    assert len(stream._live._drawn) == 5
    rows = [row for line in screen.lines for row in (line[:30], line[30:]) if row]
    narrow = Screen(30, 10)
    narrow.write("\n".join(rows))
    screen.columns = 30  # what the stream asks for
    stream._console.file = stream._live._file = narrow
    clock.now += 1
    stream.feed(LONG_TEXT[700:])
    stream.finish()
    assert "".join(narrow.lines).replace(" ", "") == LONG_TEXT.replace(" ", "")


@pytest.mark.parametrize("seed", range(40))
def test_live_lines_leave_what_was_for_good(seed: int) -> None:
    chance = random.Random(seed)
    screen = Screen(chance.randint(4, 30), chance.randint(3, 12))
    live = LiveLines(screen, lambda: (screen.columns, screen.height))  # type: ignore[arg-type]
    expected: list[str] = []

    def line() -> str:
        return chance.choice("abcdef") * chance.randint(0, screen.columns)

    current: list[str] = []
    for _ in range(60):
        n_good = chance.choice([0, 0, 0, 1, 2, 20])
        grown = [*current, line()] if chance.random() < 0.5 else [line() for _ in range(9)]
        good, current = grown[:n_good], grown[n_good:]
        live.update(good, current)
        expected += good
        shown = current[-max(1, screen.height - 2) :]
        rows = screen.lines[: len(expected) + len(shown)]
        assert rows == expected + shown
        assert not any(screen.lines[len(rows) :])
    live.update(current, [])
    assert [row for row in screen.lines if row] == [row for row in expected + current if row]


def test_live_lines_that_a_narrower_terminal_wrapped_are_erased_whole() -> None:
    screen = Screen(20, 10)
    columns = [40]
    live = LiveLines(screen, lambda: (columns[0], 10))  # type: ignore[arg-type]
    live.update([], ["a" * 30, "b"])  # 20 columns now: the first line takes two rows
    columns[0] = 20
    live.update(["c"], [])
    assert screen.lines == ["c", "", ""]


def test_an_answer_can_neither_move_the_cursor_nor_hide() -> None:
    hostile = "a\x1b[2Jb\x07c\x9b31md\r\ne\tf\x7f\x00"
    assert visible(hostile, has_signs=True) == "a␛[2Jb␇c\ufffd31md\ne\tf␡␀"
    assert visible(hostile, has_signs=False) == "a?[2Jb?c?31md\ne\tf??"
    screen = streamed(f"before\n\n{hostile}\n\nafter", 40, 10)
    assert screen.lines[0] == "before"
    assert screen.lines[-2] == "after"


def test_ascii_terminals_get_ascii_signs() -> None:
    screen = Screen(40, 10**6)
    stream = stream_on(screen, ascii_only=True)
    stream.feed(ANSWER.replace("Â", ""))
    stream.finish()
    text = "\n".join(screen.lines)
    assert text.isascii()
    assert " * it is short" in text
    assert to_ascii("─│•…·") == "-|*...-"


def test_no_color_keeps_the_text_uncoloured(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours(text: str) -> list[str]:
        console = Console(file=io.StringIO(), theme=THEME, force_terminal=True, width=60)
        out = "\n".join(render_block(console, text, 60, ascii_only=False))
        return re.findall(r"\x1b\[[\d;]*3\d[\d;]*m", out)

    code = "```python\nreturn 'x'\n```"
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colours(code)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours(code)
