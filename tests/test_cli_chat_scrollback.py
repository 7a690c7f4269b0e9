"""Each row of an answer is on the screen or in the scrollback, at any time while it grows"""

import re

import pytest
from screen import Screen, Ticks, stream_on, whole


def words(name: str, n: int) -> str:
    return " ".join(f"{name}{i}" for i in range(n))


# No table and no emphasis across rows: their ends change what is above (docs/chat.md, limits).
TEXTS = {
    "four paragraphs": "\n\n".join(words(name, 50) for name in "abcd"),
    "rows of one paragraph": "\n".join(words(name, 25) for name in "abcd"),
    "formulas": (
        f"So 2*3*4=24, <<5*6=30>>, \\[x\\], a[0], f(x)[1](2), |x|, 2 * 3 and **bold** "
        f"{words('a', 90)}"
        f"\n\nAlso |x| is |-x|: {words('b', 90)}"
    ),
    "a list before a paragraph": (
        "Steps:\n\n"
        + "\n".join(f"- {words(name, 18)}" for name in "abcd")
        + f"\n\n{words('e', 80)}"
    ),
    "a numbered list with gaps": (
        "\n\n".join(f"{i}. **{name}**: {words(name, 25)}" for i, name in enumerate("abcd", 1))
        + f"\n\n{words('e', 80)}"
    ),
    "a list below a paragraph": (
        f"{words('a', 60)}\n- {words('b', 60)}\n  - {words('c', 60)}\n1. {words('d', 60)}"
    ),
    "a quotation": f"> {words('a', 60)}\n\n> {words('b', 60)}\n\n{words('c', 60)}",
    "code": (
        "```python\n" + "\n".join(f"x{i} = {i}" for i in range(30)) + f"\n```\n{words('e', 60)}"
    ),
    "headings": f"# h\n{words('a', 60)}\n## i\n{words('b', 60)}\n***\n{words('c', 60)}",
}


# The least for each text, where most scrolls out, and others in turn.
SIZES = [(80, 12), (80, 8), (40, 10), (120, 40)]
CASES = [
    pytest.param(text, *size, id=f"{name}-{size[0]}x{size[1]}")
    for i, (name, text) in enumerate(TEXTS.items())
    for size in ((30, 7), SIZES[i % len(SIZES)])
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "columns", "height"), CASES)
def test_each_row_is_on_the_screen_or_above_at_every_prefix(
    text: str, columns: int, height: int
) -> None:
    screen, clock, given = Screen(columns, height), Ticks(), ""
    stream = stream_on(screen, clock=clock)
    for piece in re.findall(r"\S+|\s+", text):
        clock.now += 1
        given += piece
        stream.feed(piece)
        assert re.findall(r"\w+", "\n".join(screen.lines)) == re.findall(r"\w+", given)
    stream.finish()
    screen.write("> ")
    assert screen.lines == whole(text, columns)


@pytest.mark.slow
def test_what_a_mark_could_yet_change_comes_whole_in_the_end() -> None:
    """A star without end, and a table: shown by their ends while they grow."""
    rows = "\n".join(f"| {i} | {words('c', 3)} |" for i in range(20))
    text = f"An *open star {words('a', 200)}\n\n| n | c |\n|---|---|\n{rows}\n\nDone."
    screen, clock = Screen(80, 8), Ticks()
    stream = stream_on(screen, clock=clock)
    for piece in re.findall(r"\S+|\s+", text):
        clock.now += 1
        stream.feed(piece)
    stream.finish()
    screen.write("> ")
    assert screen.lines == whole(text, 80)
