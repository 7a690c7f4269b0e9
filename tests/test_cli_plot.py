"""Pictures of weights: what they show, that they stand alone, and that text in them stays text."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qaflora_edge.cli import plot
from qaflora_edge.cli.plot import check_can_plot, write_plot
from qaflora_edge.cli.plot_html import html
from qaflora_edge.cli.plot_svg import INK, n_columns, svg
from qaflora_edge.cli.prompts import Prompt
from qaflora_edge.errors import OutputFileError
from qaflora_edge.weighing.numbers import FusionWeights

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</title></svg></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b]"
)
Weighed = tuple[Prompt, FusionWeights]


def weighed(text: str = "How many?", *names: str, seed: int = 0, n_layer: int = 12) -> Weighed:
    names = names or ("math", "es", "med")
    divergence = np.random.default_rng(seed).gamma(1.0, size=(len(names), n_layer))
    weights = (divergence / divergence.sum(axis=0)).astype(np.float32)
    fusion = FusionWeights(
        names, weights, divergence.astype(np.float32), "qa-flora", prompt_tokens=7
    )
    return Prompt(text), fusion


def cells(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [element for element in root.iter(f"{SVG}rect") if element.get("class") == "cell"]


def test_svg_has_a_cell_per_weight_with_its_numbers() -> None:
    item = weighed()
    root = ElementTree.fromstring(svg([item]))
    found = cells(root)
    assert len(found) == 3 * 12
    fusion = item[1]
    assert fusion.divergence is not None
    assert 0.8 < fusion.weights.max() < 0.9  # so the scale ends at 0.9
    for index, cell in enumerate(found):
        row, layer = divmod(index, 12)
        weight, divergence = fusion.weights[row, layer], fusion.divergence[row, layer]
        assert float(cell.get("fill-opacity", "")) == pytest.approx(weight / 0.9, abs=6e-4)
        assert [title.text for title in cell] == [
            f"{fusion.adapters[row]}, layer {layer}\nweight {weight:.3f}\n"
            f"divergence {divergence:.3g} nats"
        ]
    dots = [element for element in root.iter(f"{SVG}circle") if element.get("class") == "lead"]
    assert len(dots) == 12  # one adapter leads each layer
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"math", "es", "med", f"{fusion.weights[1].mean():.2f}", "How many?"} <= set(texts)


def test_panels_share_one_scale() -> None:
    low = FusionWeights(("a", "b"), np.full((2, 2), 0.25, np.float32))
    high = FusionWeights(("a", "b"), np.array([[2, 0], [0, -1]], np.float32))
    text = svg([(Prompt("one"), low), (Prompt("two"), high)])
    opacities = [cell.get("fill-opacity") for cell in cells(ElementTree.fromstring(text))]
    assert opacities == ["0.125"] * 4 + ["1.000", "0.000", "0.000", "0.000"]
    assert "− below 0, down to -1" in text
    assert text.count(">−</text>") == 1


@pytest.mark.parametrize(
    ("n_panel", "n_fitting", "n"), [(1, 9, 1), (3, 9, 1), (5, 9, 1), (8, 9, 2), (200, 2, 2)]
)
def test_columns(n_panel: int, n_fitting: int, n: int) -> None:
    assert n_columns(n_panel, n_fitting) == n


class Page(HTMLParser):
    """Tags with their attributes, as a parser of the standard library sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_asks_for_nothing_from_elsewhere() -> None:
    text = html([weighed(), weighed("Another?", seed=1)])
    page = Page(text)
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "style", "action", "data", "background"}
    assert not [name for name in names if name.startswith("on")]
    assert {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base"} == set()
    assert [tag for tag, _ in page.tags].count("script") == 1
    for word in ("url(", "@import", "http:", "https:", "fetch(", "import("):
        assert word not in text
    assert sum(tag == "section" for tag, _ in page.tags) == 2


def test_html_policy_allows_only_its_own_script_and_style() -> None:
    import base64
    import hashlib

    text = html([weighed()])
    policy = next(
        attributes["content"]
        for tag, attributes in Page(text).tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    for tag in ("script", "style"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")


def test_html_tables_hold_every_number() -> None:
    prompt, fusion = weighed()
    page = Page(html([(prompt, fusion)]))
    assert fusion.divergence is not None
    shown = set(page.texts)
    assert {f"{value:.4f}" for value in fusion.weights.flat} <= shown
    assert {f"{value:.4g}" for value in fusion.divergence.flat} <= shown
    assert {f"{mean:.3f}" for mean in fusion.weights.mean(axis=1)} <= shown


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    item = weighed(HOSTILE, HOSTILE, "b")
    item = (Prompt(HOSTILE, name=HOSTILE), item[1])
    clean = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b")
    page = Page(html([item]))
    plain = Page(html([weighed("x", "a", "b")]))
    # The prompt itself is one more paragraph, for its name is the title.
    assert [tag for tag, _ in page.tags if tag != "p"] == [
        tag for tag, _ in plain.tags if tag != "p"
    ]
    assert any(clean in text for text in page.texts)
    root = ElementTree.fromstring(svg([item]))
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert len(titles) == 2 * 12
    assert titles[0].startswith(f"{clean}, layer 0\n")
    assert root.find(f".//{SVG}script") is None
    write_plot(tmp_path / "x.png", [item])  # no formula, no warning


def test_long_prompts_are_folded() -> None:
    assert "The whole prompt" not in html([weighed("short")])
    text = html([weighed("word " * 200)])
    assert "<summary>The whole prompt</summary>" in text
    assert "word " * 200 in text


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))


def test_png_shows_the_weights(tmp_path: Path) -> None:
    """Cells are found again in the picture, by their colour."""
    fusion = FusionWeights(("a", "b"), np.array([[1, 0], [1, 0]], np.float32), None, "manual")
    write_plot(tmp_path / "w.png", [(Prompt("p"), fusion)])
    picture = pixels(tmp_path / "w.png")[:, :, :3]
    ink = np.array([int(INK[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    is_ink = np.abs(picture - ink).max(axis=2) < 0.02
    rows, columns = np.nonzero(is_ink)
    height, width = is_ink.shape
    # The left half of the panel is full ink, the right half is paper; the rest is thin lines.
    assert is_ink.sum() > 0.1 * height * width
    left = is_ink[:, : width // 2].sum()
    assert left > 0.95 * is_ink.sum()
    assert rows.size == columns.size


def test_png_of_many_prompts_and_layers_stays_in_bounds(tmp_path: Path) -> None:
    items = [weighed(f"prompt {i} $x$", "a$b", "日本", seed=i, n_layer=126) for i in range(3)]
    write_plot(tmp_path / "w.png", items)
    height, width, _ = pixels(tmp_path / "w.png").shape
    assert max(height, width) < 30_000
    assert height > 700
    assert width > 126 * 20


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_same_weights_same_bytes(suffix: str, tmp_path: Path) -> None:
    items = [weighed(), weighed("Another?", seed=1)]
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        write_plot(path, items)
    assert first.read_bytes() == second.read_bytes()


def test_probe_time_changes_no_picture() -> None:
    prompt, fusion = weighed()
    from dataclasses import replace

    slow = (prompt, replace(fusion, probe_ms=99.0))
    assert svg([slow]) == svg([(prompt, fusion)])
    assert html([slow]) == html([(prompt, fusion)])


def test_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.svg"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputFileError, match="the disk is full"):
        write_plot(path, [weighed()])
    assert [item.name for item in tmp_path.iterdir()] == ["w.svg"]
    assert path.read_text() == "old"


def test_what_cannot_be_drawn_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(path: Path, n_prompt: int = 1) -> str:
        with pytest.raises(OutputFileError) as caught:
            check_can_plot(path, n_prompt)
        return str(caught.value)

    check_can_plot(tmp_path / "w.svg", 200)
    assert message(tmp_path / "w.svg", 201) == (
        f"Cannot draw {tmp_path / 'w.svg'}: there are 201 prompts, expected at most 200, a panel "
        "each. Take fewer prompts, or --json or --csv and a tool of your own."
    )
    assert message(tmp_path / "no/w.svg") == (
        f"Cannot write {tmp_path / 'no/w.svg'}: there is no folder {tmp_path / 'no'}. Create it, "
        "or choose another."
    )
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    check_can_plot(tmp_path / "w.html", 1)
    check_can_plot(tmp_path / "w.svg", 1)
    assert message(tmp_path / "w.png") == (
        f"Cannot write {tmp_path / 'w.png'}: PNG needs matplotlib, which is not installed. Install "
        "it with `pip install 'qaflora-edge[plot]'`, or name a file that ends in .svg or .html."
    )


def test_nothing_to_draw(tmp_path: Path) -> None:
    empty = FusionWeights((), np.zeros((0, 3), np.float32), None, "base")
    with pytest.raises(OutputFileError) as caught:
        write_plot(tmp_path / "w.svg", [(Prompt("p"), empty)])
    assert str(caught.value) == (
        f"Cannot draw {tmp_path / 'w.svg'}: the bundle has no adapters, expected one or more. Add "
        "one with `qaflora bundle add`."
    )
    assert list(tmp_path.iterdir()) == []
