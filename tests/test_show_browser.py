"""The HTML plot in a real browser: mouse, finger, keyboard, light and dark, and nothing runs."""

from pathlib import Path

import numpy as np
import pytest
from browser import Browser, missing

from qaflora_edge.show.pages import weights_page
from qaflora_edge.weighing.numbers import FusionWeights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
N_LAYER = 30
LEFT, UP, RIGHT, DOWN, TAB, END, ESCAPE = (
    *("\ue012", "\ue013", "\ue014", "\ue015", "\ue004", "\ue010", "\ue00c"),
)


def fusion(seed: int = 0) -> FusionWeights:
    divergence = np.random.default_rng(seed).gamma(1.0, size=(3, N_LAYER)).astype(np.float32)
    weights = (divergence / divergence.sum(axis=0)).astype(np.float32)
    return FusionWeights(("math", EVIL, "med"), weights, divergence, "qa-flora")


def expected(row: int, layer: int, seed: int = 0) -> str:
    item = fusion(seed)
    assert item.divergence is not None
    return (
        f"{item.adapters[row]}, layer {layer}\nweight {item.weights[row, layer]:.3f}\n"
        f"divergence {item.divergence[row, layer]:.3g} nats"
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plot") / "weights.html"
    items = [(EVIL, EVIL, fusion()), ("two", "two", fusion(1))]
    path.write_text(weights_page(items, EVIL), "utf-8")
    return path


def cell(row: int, layer: int, panel: int = 1) -> str:
    return (
        f"section:nth-of-type({panel}) .row:nth-of-type({row + 1}) .cell:nth-of-type({layer + 1})"
    )


def tip(window: Browser) -> str | None:
    """The text of the tip as it is rendered, or None while it is hidden."""
    shown: str | None = window.run(
        "const tip = document.getElementById('tip');"
        "return tip.checkVisibility() ? tip.innerText : null"
    )
    return shown


def is_tip_inside(window: Browser) -> bool:
    return bool(
        window.run(
            "const b = document.getElementById('tip').getBoundingClientRect();"
            "return b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight"
        )
    )


def test_mouse_shows_weight_and_divergence(window: Browser, page: Path) -> None:
    window.open(page)
    assert tip(window) is None
    for row, layer, panel in ((0, 0, 1), (1, 7, 1), (2, N_LAYER - 1, 1), (0, 3, 2)):
        window.point(cell(row, layer, panel))
        assert tip(window) == expected(row, layer, panel - 1)
        assert is_tip_inside(window)
    window.point("h1")
    assert tip(window) is None


def test_keyboard_walks_over_the_cells(window: Browser, page: Path) -> None:
    window.open(page, 420, 800)  # too narrow for all layers: the picture scrolls
    window.press(TAB)
    assert tip(window) == expected(0, 0)
    window.press(RIGHT, RIGHT, DOWN, LEFT)
    assert tip(window) == expected(1, 1)
    window.press(UP, UP)  # there is nothing above
    assert tip(window) == expected(0, 1)
    window.press(END)
    assert tip(window) == expected(0, N_LAYER - 1)
    assert is_tip_inside(window)
    assert window.run(
        "const b = document.activeElement.getBoundingClientRect();"
        "return b.left >= 0 && b.right <= innerWidth"
    )
    window.press(ESCAPE)
    assert tip(window) is None


def test_nothing_is_loaded_and_nothing_runs(window: Browser, page: Path) -> None:
    window.log()
    window.open(page)
    assert window.run("return document.title") == "qaflora weights"
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return document.querySelectorAll('img, section script').length") == 0
    assert window.log() == []


def test_policy_holds_even_if_escaping_failed(window: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace("<main>", f"<main>{EVIL}"), "utf-8")
    window.open(broken)
    assert window.run("return document.querySelectorAll('main > img').length") == 1
    assert window.run("return document.title") == "qaflora weights"
    assert any("Content Security Policy" in line for line in window.log())
    window.point(cell(0, 0))
    assert tip(window) == expected(0, 0)


PAPER_AND_TEXT = (
    "const s = getComputedStyle(document.body);"
    "const c = getComputedStyle(document.querySelector('.cell')).fill;"
    "return [s.backgroundColor, s.color, c].map(x => x.match(/\\d+/g).slice(0, 3).map(Number))"
)


@pytest.mark.parametrize("is_dark", [False, True])
def test_light_and_dark(window: Browser, is_dark: bool, page: Path) -> None:
    window.prefer(is_dark=is_dark)
    window.open(page)
    paper, text, ink = (sum(colour) for colour in window.run(PAPER_AND_TEXT))
    window.point(cell(0, 0))
    assert tip(window) == expected(0, 0)
    assert (paper < text) == (paper < ink) == is_dark
    assert min(abs(paper - text), abs(paper - ink)) > 380  # of 765


def test_page_is_no_wider_than_the_window(window: Browser, page: Path) -> None:
    for width in (420, 800, 1700):
        window.open(page, width)
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")
