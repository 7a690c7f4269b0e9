"""The page of `qaflora report` in a real browser: items open, heatmaps say, and nothing runs."""

from pathlib import Path

import pytest
from browser import Browser, missing
from made_results import PAIRS, drawn, header, write

from qaflora_edge.cli.eval_html import eval_html
from qaflora_edge.evaluation.results import read_results
from qaflora_edge.evaluation.summary import summarise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
SHARES = {"base": 0.1, "single:math": 0.3, "static": 0.3, "qa-flora": 0.6, "calibrated": 0.7}
ITEM = ".task:nth-of-type(2) .item:nth-of-type(3)"  # of math_ru: item 2


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    head = header(PAIRS, ["math", "es", "ru", EVIL], list(SHARES), bundle=EVIL)
    records = drawn(SHARES, head)
    for each in records:
        each |= {"answer": f"{each['answer']} {EVIL}", "question": f"{each['question']} {EVIL}"}
    results = read_results(write(folder / "results.jsonl", head, records))
    path = folder / "report.html"
    path.write_text(eval_html(summarise([("results.jsonl", results)])), encoding="utf-8")
    return path


def is_shown(window: Browser, selector: str) -> bool:
    return bool(
        window.run("return document.querySelector(arguments[0]).checkVisibility()", selector)
    )


def click(window: Browser, selector: str) -> None:
    window.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
    window.point(selector, press=True)


def test_an_item_opens_to_its_question_and_answers(window: Browser, page: Path) -> None:
    window.open(page)
    assert not is_shown(window, ITEM)
    click(window, ".task:nth-of-type(2) .items > summary")
    assert is_shown(window, f"{ITEM} > summary")
    assert not is_shown(window, f"{ITEM} .given")
    click(window, f"{ITEM} > summary")
    text = window.run("return document.querySelector(arguments[0]).innerText", ITEM)
    assert f"How many is 2? {EVIL}" in text
    assert "Expected: 2" in text
    for strategy in SHARES:
        assert f"{strategy} says 2 {EVIL}" in text
    assert text.count("right") + text.count("wrong") == len(SHARES)


def test_items_on_which_all_agree_can_be_hidden(window: Browser, page: Path) -> None:
    window.open(page)
    click(window, ".task:nth-of-type(2) .items > summary")
    count = (
        "return [...document.querySelectorAll('.task:nth-of-type(2) .item')]"
        ".filter(item => item.checkVisibility()).length"
    )
    n_same = window.run("return document.querySelectorAll('.task:nth-of-type(2) .same').length")
    assert 0 < n_same < 12
    assert window.run(count) == 12
    click(window, ".task:nth-of-type(2) .differ")
    assert window.run(count) == 12 - n_same
    click(window, ".task:nth-of-type(2) .differ")
    assert window.run(count) == 12


def test_a_cell_of_a_heatmap_says_its_weight(window: Browser, page: Path) -> None:
    window.open(page)
    cell = ".task .map .row:nth-of-type(2) .cell:nth-of-type(4)"
    window.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", cell)
    window.point(cell)
    tip = window.run("return document.getElementById('tip').innerText")
    assert tip.startswith("es, layer 3\nweight 0.")


def test_every_estimate_is_drawn_inside_its_picture(window: Browser, page: Path) -> None:
    window.open(page)
    outside = (
        "return [...document.querySelectorAll('svg.span')].filter(svg => "
        "[...svg.querySelectorAll('line, circle')].some(part => {"
        " const a = part.getBoundingClientRect(), b = svg.getBoundingClientRect();"
        " return a.left < b.left - 1 || a.right > b.right + 1 })).length"
    )
    assert window.run("return document.querySelectorAll('svg.span').length") > 30
    assert window.run(outside) == 0


def test_nothing_is_loaded_and_nothing_runs(window: Browser, page: Path) -> None:
    window.log()
    window.open(page)
    assert window.run("return document.title").startswith("Evaluation of <img src=x")
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return document.querySelectorAll('img, main script').length") == 0
    assert window.log() == []


def test_policy_holds_even_if_escaping_failed(window: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace("<main>", f"<main>{EVIL}"), "utf-8")
    window.open(broken)
    assert window.run("return document.querySelectorAll('main > img').length") == 1
    assert window.run("return document.title") != "pwned"
    assert any("Content Security Policy" in line for line in window.log())


@pytest.mark.parametrize("width", [360, 800, 1700])
def test_page_is_no_wider_than_the_window(width: int, window: Browser, page: Path) -> None:
    window.open(page, width)
    window.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")


def test_paper_has_the_facts_and_not_every_item(window: Browser, page: Path) -> None:
    window.open(page)
    window.run("dispatchEvent(new Event('beforeprint'))")
    assert is_shown(window, ".facts td")
    assert not is_shown(window, ".item")
