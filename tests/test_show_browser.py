"""Pages of weights in a real browser: what they show, and that nothing runs."""

from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from desk import DOWN, ESCAPE, LEFT, NEEDS_CHROMIUM, RIGHT, TAB, UP

from qaflora_edge.show.pages import weights_page
from qaflora_edge.weighing.numbers import FusionWeights

pytestmark = NEEDS_CHROMIUM

EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
N_LAYER = 30
END = "\ue010"


def fusion(seed: int = 0) -> FusionWeights:
    divergence = np.random.default_rng(seed).gamma(1.0, size=(3, N_LAYER)).astype(np.float32)
    weights = (divergence / divergence.sum(axis=0)).astype(np.float32)
    return FusionWeights(("math", EVIL, "med"), weights, divergence, "qa-flora")


def expected(row: int, layer: int, seed: int = 0) -> str:
    item = fusion(seed)
    return (
        f"{item.adapters[row]}, layer {layer}\nweight {item.weights[row, layer]:.3f}\n"
        f"divergence {item.divergence[row, layer]:.3g} nats"
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plot") / "weights.html"
    items = [(EVIL, EVIL, fusion()), ("two", "two", fusion(1))]
    path.write_text(weights_page(items, EVIL), "utf-8")
    return path


def test_nothing_is_loaded_and_nothing_runs(window: Browser, weights: Path, tmp_path: Path) -> None:
    window.log()
    window.open(weights)
    title = window.run("return document.title")
    assert title == "qaflora weights"
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return document.querySelectorAll('img, section script').length") == 0
    assert window.log() == []  # the policy allows the page's own style and script
    broken = tmp_path / "broken.html"  # as if escaping had failed
    broken.write_text(
        weights.read_text("utf-8").replace("<section>", f"<section>{EVIL}", 1), "utf-8"
    )
    window.open(broken)
    assert window.run("return document.querySelectorAll('section > img').length") == 1
    assert window.run("return document.title") == title
    assert any("Content Security Policy" in line for line in window.log())


@pytest.mark.parametrize("width", [420, 1700])
def test_page_is_no_wider_than_the_window(width: int, window: Browser, weights: Path) -> None:
    window.open(weights, width)
    window.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")


def cell(row: int, layer: int, panel: int = 1) -> str:
    return (
        f"section:nth-of-type({panel}) .row:nth-of-type({row + 1}) .cell:nth-of-type({layer + 1})"
    )


def tip(window: Browser) -> str | None:
    """The text of the tip as it is rendered inside the window, or None while it is hidden."""
    return window.run(
        "const tip = document.getElementById('tip'), b = tip.getBoundingClientRect();"
        "if (b.left < 0 || b.top < 0 || b.right > innerWidth || b.bottom > innerHeight) return '';"
        "return tip.checkVisibility() ? tip.innerText : null"
    )


def test_mouse_shows_weight_and_divergence(window: Browser, weights: Path) -> None:
    window.open(weights)
    assert tip(window) is None
    for row, layer, panel in ((1, 7, 1), (2, N_LAYER - 1, 1), (0, 3, 2)):
        window.point(cell(row, layer, panel))
        assert tip(window) == expected(row, layer, panel - 1)
    window.point("h1")
    assert tip(window) is None


def test_keyboard_walks_over_the_cells(window: Browser, weights: Path) -> None:
    window.open(weights, 420, 800)  # too narrow for all layers: the picture scrolls
    window.press(TAB)
    assert tip(window) == expected(0, 0)
    window.press(RIGHT, RIGHT, DOWN, LEFT)
    assert tip(window) == expected(1, 1)
    window.press(UP, UP)  # there is nothing above
    assert tip(window) == expected(0, 1)
    window.press(END)
    assert tip(window) == expected(0, N_LAYER - 1)
    window.press(ESCAPE)
    assert tip(window) is None
