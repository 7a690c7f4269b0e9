"""The page of `qaflora eval --html` in a real browser: items open, bars fit, and nothing runs."""

from pathlib import Path

import pytest
from browser import Browser, missing

from qaflora_edge.show.results_page import AnswerShown, Bar, ItemShown, TaskShown, results_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
NAN = float("nan")
LINES = {
    "base": (Bar("20.0", 20, 5, 40), None, Bar("-60.0", -60, -80, -20)),
    EVIL: (Bar("100.0", 100, 80, 100), Bar("+5.0", 5, NAN, NAN), Bar("+20.0", 20, 10, 30)),
}
ITEMS = [
    ItemShown(
        i,
        f"How many is {i}?\n{EVIL}",
        str(i),
        [
            AnswerShown("base", "0.0", "base", f"base says {i} {EVIL}"),
            AnswerShown(EVIL, "0.0" if i else "100.0", "math 0.50", None),
        ],
    )
    for i in range(3)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "results.html"
    task = TaskShown(EVIL, "number", ("score, points", "over static", "over math"), LINES, ITEMS)
    path.write_text(results_page(f"Evaluation of {EVIL}\x1b[2J", {"base": EVIL}, [task]))
    return path


def test_an_item_opens_to_its_question_and_answers(window: Browser, page: Path) -> None:
    window.open(page)
    shown = "return document.querySelector(arguments[0]).innerText"
    opened = "for (const each of document.querySelectorAll(arguments[0])) each.open = true"
    assert "How many is 2?" not in window.run("return document.body.innerText")
    window.run(opened, ".items, .item")
    text = window.run(shown, ".item:last-of-type")
    assert f"How many is 2?\n{EVIL}" in text
    assert "Expected: 2" in text
    assert f"base says 2 {EVIL}" in text
    count = "return [...document.querySelectorAll('.item')].filter(e => e.checkVisibility()).length"
    assert window.run(count) == 3
    window.run("document.querySelector('input').click()")  # only where they differ
    assert window.run(count) == 1


def test_every_bar_is_drawn_inside_its_picture(window: Browser, page: Path) -> None:
    window.open(page)
    outside = (
        "return [...document.querySelectorAll('svg')].filter(svg => "
        "[...svg.querySelectorAll('line, circle, rect')].some(part => {"
        " const a = part.getBoundingClientRect(), b = svg.getBoundingClientRect();"
        " return a.left < b.left - 1 || a.right > b.right + 1 })).length"
    )
    assert window.run("return document.querySelectorAll('svg').length") == 5
    assert window.run("return document.querySelectorAll('svg.better').length") == 1
    assert window.run("return document.querySelectorAll('svg.worse').length") == 1
    assert window.run(outside) == 0


def test_nothing_is_loaded_and_nothing_runs(window: Browser, page: Path, tmp_path: Path) -> None:
    window.log()
    window.open(page)
    title = window.run("return document.title")
    assert title.startswith("Evaluation of <img src=x")
    assert title.endswith("\\x1b[2J")
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return document.querySelectorAll('img, script').length") == 0
    assert window.log() == []  # the policy allows the page's own style
    broken = tmp_path / "broken.html"  # as if escaping had failed
    broken.write_text(page.read_text("utf-8").replace("<section>", f"<section>{EVIL}"), "utf-8")
    window.open(broken)
    assert window.run("return document.querySelectorAll('img').length") == 1
    assert window.run("return document.title") != "pwned"
    assert any("Content Security Policy" in line for line in window.log())


@pytest.mark.parametrize("width", [360, 1700])
def test_page_is_no_wider_than_the_window(width: int, window: Browser, page: Path) -> None:
    window.open(page, width)
    window.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")
