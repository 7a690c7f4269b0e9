"""Markdown on a terminal loses no digit, no sign of an operation and no backslash of a formula"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from screen import whole


def shown(text: str, columns: int = 80) -> str:
    """An answer as it stands on the screen, with single blanks between words."""
    return " ".join(" ".join(whole(text, columns)[:-1]).split())


@pytest.mark.parametrize(
    "text",
    [
        "2*3*4=24",
        "so <<5*6=30>>30 and <<5*6=30>>30",
        r"\(x\) and \[y^2\], \{1,2\}, \left[0\right)",
        r"a \\ b \, c \; d \: e \|x\|",
        "2**3 and 2**4, (a)**2*(b)**3",
        "(a)*b*(c), |x|*|y|*|z|, (*p)*(*q)",
        "x * y * z, x *5 and 5* x",
        "def f(*args, **kwargs): __init__ and __name__, a_1_b, _5_",
        r"\sum_{i=1}^{n} a_{i} \{a\}_{i} b_{j}",
        "a[0](1), x[2](y*3), ![5](6), <tag> <https://example.org/5>",
        "~5 and ~~6, 7~~8~~9",
        "24.",
        "5)",
        "-",
        "+",
        "|x| + |y| is 5",
        "a | b --|-- 1 | 2 | 3",
    ],
)
def test_these_texts_are_shown_as_they_are(text: str) -> None:
    assert shown(text) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**18** is *it*, and **bold**: *(so)*", "18 is it, and bold: (so)"),
        ("***both*** **a *b* c** ~~no~~", "both a b c no"),
        ("这是**粗体**文字 and ✅**Done**", "这是粗体文字 and ✅Done"),
        (r"\*no\* costs \$5 at 5\%", "*no* costs $5 at 5%"),
        ("[page](https://example.org/a^b)", "page (https://example.org/a^b)"),
    ],
)
def test_markup_is_still_markup(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_items_keep_the_numbers_that_were_written() -> None:
    assert whole("3. three\n5. five\n5. again\n\n100. more", 40)[:-1] == [
        "  3 three",
        "  5 five",
        "  5 again",
        "100 more",
    ]
    assert whole("007. Bond", 40)[:-1] == ["007 Bond"]


TABLE = """\
| Country | Population | Share |
|---------|-----------:|-------|
| USA | 331,449,281 | 4*2 % |
| Liechtenstein | 38,747 | `0` |
"""


@pytest.mark.parametrize("columns", [12, 20, 30, 40, 80])
def test_a_table_in_a_narrow_window_loses_nothing_and_breaks_no_number(columns: int) -> None:
    rows = whole(TABLE, columns)
    for word in ("331,449,281", "38,747", "4*2", "0", "USA"):
        assert any(word in row for row in rows), word
    if columns == 20:
        assert rows[:3] == ["Country: USA", "Population:", "331,449,281"]
    if columns == 40:
        assert rows[2] == " USA            331,449,281  4*2 %"


def test_a_row_with_more_cells_than_the_head_loses_none() -> None:
    text = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 | 5 |"
    assert whole(text, 40)[:-1] == text.split("\n")
    escaped = whole("| a | b |\n|---|---|\n| 3 | 4 \\| 5 |", 40)
    assert escaped[2] == " 3  4 | 5"


def expressions() -> st.SearchStrategy[str]:
    """Formulas, with blanks around a sign or none."""
    leaves = st.one_of(
        st.integers(0, 9999).map(str),
        st.floats(0, 99).map("{:.2f}".format),
        st.sampled_from(["x", "ab", "-3", "|x|", "a[0]", "x_1", "f(2)", "5!", "30%", "n^2", "$4"]),
    )
    signs = ["*", "+", "-", "/", "=", "<", ">", "**", "^", " * ", " + ", " - ", " = ", "==", " ** "]

    def larger(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        around = ["({})", "[{}]", "<<{}>>", "\\({}\\)", "\\[ {} \\]", "\\{{{}\\}}", "$ {} $"]
        return st.one_of(
            st.tuples(parts, st.sampled_from(signs), parts).map("".join),
            st.tuples(st.sampled_from(around), parts).map(lambda pair: pair[0].format(pair[1])),
        )

    return st.recursive(leaves, larger, max_leaves=8)


MARKUP = st.sampled_from(
    ["so", "**bold**", "*it*", "`code`", "it is", "***so***:", "[l](http://a.b)"]
)
LINE = st.sampled_from(["", "# ", "> ", "- ", "1. ", "So "])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(LINE, MARKUP, expressions(), MARKUP, expressions()), min_size=1, max_size=4),
    st.sampled_from([24, 40, 80]),
)
def test_any_formula_among_markup_is_on_the_screen(
    lines: list[tuple[str, ...]], columns: int
) -> None:
    text = "\n".join(f"{line}{a} {one} {b} {two}." for line, a, one, b, two in lines)
    screen = "".join(row.removeprefix("▌") for row in whole(text, columns))
    place = 0
    for formula in (formula for line in lines for formula in (line[2], line[4])):
        found = re.sub(r"\s", "", screen).find(re.sub(r"\s", "", formula), place)
        assert found >= 0, formula
        place = found + len(re.sub(r"\s", "", formula))
