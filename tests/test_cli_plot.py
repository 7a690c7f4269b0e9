"""Pictures of weights: what they show, that they stand alone, and that text in them stays text."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qaflora_edge.cli import plot
from qaflora_edge.cli.plot import check_can_plot, write_plot
from qaflora_edge.cli.plot_figure import DARK, LIGHT, Palette, figure, n_columns
from qaflora_edge.cli.plot_html import html as html_of
from qaflora_edge.cli.prompts import Prompt
from qaflora_edge.errors import OutputFileError
from qaflora_edge.weighing.numbers import FusionWeights

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</title></svg></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b]"
)
Weighed = tuple[Prompt, FusionWeights]
SUBJECT = "demo on tiny"


def html(items: list[Weighed], subject: str = SUBJECT) -> str:
    return html_of(items, subject)


def svg(items: list[Weighed], subject: str = SUBJECT) -> str:
    return figure(items, subject, kind="svg")[0].decode("utf-8")


def weighed(text: str = "How many?", *names: str, seed: int = 0, n_layer: int = 12) -> Weighed:
    names = names or ("math", "es", "med")
    divergence = np.random.default_rng(seed).gamma(1.0, size=(len(names), n_layer))
    weights = (divergence / divergence.sum(axis=0)).astype(np.float32)
    fusion = FusionWeights(
        names, weights, divergence.astype(np.float32), "qa-flora", prompt_tokens=7
    )
    return Prompt(text), fusion


def cells(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [path for path in root.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]


def texts(root: ElementTree.Element) -> set[str]:
    return {element.text or "" for element in root.iter(f"{SVG}text")}


def fill(cell: ElementTree.Element) -> list[float]:
    """Red, green and blue of a cell, 0 to 1."""
    found = re.search(r"fill: #(..)(..)(..);", cell.get("style", ""))
    assert found
    return [int(part, 16) / 255 for part in found.groups()]


def test_svg_has_a_cell_per_weight_with_its_numbers() -> None:
    item = weighed()
    root = ElementTree.fromstring(svg([item]))
    found = cells(root)
    assert len(found) == 3 * 12
    fusion = item[1]
    assert fusion.divergence is not None
    for index, cell in enumerate(found):
        row, layer = divmod(index, 12)
        weight, divergence = fusion.weights[row, layer], fusion.divergence[row, layer]
        assert [title.text for title in cell] == [
            f"{fusion.adapters[row]}, layer {layer}\nweight {weight:.3f}\n"
            f"divergence {divergence:.3g} nats"
        ]
    means = {f"{mean:.2f}" for mean in fusion.weights.mean(axis=1)}
    assert {"math", "es", "med", "How many?", SUBJECT, *means} <= texts(root)


@pytest.mark.parametrize(("palette", "is_dark"), [(LIGHT, False), (DARK, True)])
def test_cells_take_the_ramps_colours(palette: Palette, is_dark: bool) -> None:
    steps = len(palette.ramp)
    row = np.linspace(0, 1, steps, dtype=np.float32)
    data, _, _ = figure(
        [(Prompt("p"), FusionWeights(("a", "b"), np.array([row, row[::-1]])))],
        SUBJECT,
        kind="svg",
        is_dark=is_dark,
    )
    expected = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in palette.ramp]
    shown = [fill(cell) for cell in cells(ElementTree.fromstring(data))]
    assert np.allclose(shown, expected + expected[::-1], atol=0.02)
    lightness = [sum(colour) for colour in expected]
    assert lightness == sorted(lightness, reverse=not is_dark)


def test_panels_share_one_scale_that_uses_its_range() -> None:
    low = FusionWeights(("a", "b"), np.full((2, 2), 0.25, np.float32))
    high = FusionWeights(("a", "b"), np.array([[2, 0], [0, -1]], np.float32))
    text = svg([(Prompt("one"), low), (Prompt("two"), high)])
    fills = [fill(cell) for cell in cells(ElementTree.fromstring(text))]
    assert fills[:4] == [fills[0]] * 4
    assert fills[5:] == [[1.0] * 3] * 3  # 0 and below
    assert sum(fills[4]) < sum(fills[0]) < 3
    assert "− below 0, down to -1" in text
    assert text.count(">−</text>") == 1
    narrow = FusionWeights(("a", "b"), np.array([[0.4, 0.5], [0.6, 0.5]], np.float32))
    least, _, most, _ = (
        fill(cell) for cell in cells(ElementTree.fromstring(svg([(Prompt(""), narrow)])))
    )
    assert (sum(least), sum(most) < 0.5) == (3, True)


@pytest.mark.slow
def test_pictures_keep_prompts_and_names(tmp_path: Path) -> None:
    from PIL import Image

    long = "日本 word " * 900
    items = [weighed(long), weighed("two\nlines", seed=1)]
    subject = "my 日本 bundle on base"
    for suffix in ("svg", "png", "html"):
        write_plot(tmp_path / f"w.{suffix}", items, subject)
    root = ElementTree.fromstring((tmp_path / "w.svg").read_bytes())
    (description,) = root.iter("{http://purl.org/dc/elements/1.1/}description")
    with Image.open(tmp_path / "w.png") as picture:
        kept = picture.text  # type: ignore[attr-defined]
    expected = f"strategy qa-flora, lens norm, pool last\n1. {long[:4000]}…\n2. two\nlines"
    assert description.text == kept["Description"] == expected
    assert kept["Title"] == root.findtext(f"{SVG}title") == f"Weights of {subject}"
    assert subject in texts(root)
    assert subject in (tmp_path / "w.html").read_text("utf-8")


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


def test_html_and_svg_name_what_the_strategy_measured() -> None:
    prompt, fusion = weighed()
    page = Page(html([(prompt, fusion)]))
    assert {"mean divergence, nats", "divergence"} <= {*page.texts}
    item = (prompt, replace(fusion, strategy="two-place"))
    page = Page(html([item]))
    assert {"mean added to q, k, v", "added to q, k, v"} <= {*page.texts}
    assert "divergence" not in html([item]) + svg([item])
    assert "strategy two-place, 7 prompt tokens\n1. How many?" in svg([item])
    assert not any("stands out" in text for text in page.texts)


def test_html_says_why_the_base_answers_alone() -> None:
    prompt, fusion = weighed()
    none = replace(fusion, strategy="two-place", weights=np.zeros_like(fusion.weights))
    texts = Page(html([(prompt, none)])).texts
    assert any(text.startswith("No adapter stands out here: the base") for text in texts)


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
    root = ElementTree.fromstring(svg([item], HOSTILE))
    titles = [element.text or "" for element in root.iter(f"{SVG}title")][1:]
    assert len(titles) == 2 * 12
    assert titles[0].startswith(f"{clean}, layer 0\n")
    assert root.find(f".//{SVG}script") is None
    write_plot(tmp_path / "x.png", [item], HOSTILE)  # no formula, no warning


def test_long_prompts_are_folded() -> None:
    assert "The whole prompt" not in html([weighed("short")])
    text = html([weighed("word " * 200)])
    assert "<summary>The whole prompt</summary>" in text
    assert "word " * 200 in text


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))


@pytest.mark.slow
@pytest.mark.parametrize(("palette", "is_dark"), [(LIGHT, False), (DARK, True)])
def test_png_shows_the_weights(palette: Palette, is_dark: bool, tmp_path: Path) -> None:
    """Cells are found again in the picture, by their colour."""
    fusion = FusionWeights(("a", "b"), np.array([[1, 0], [1, 0]], np.float32), None, "manual")
    write_plot(tmp_path / "w.png", [(Prompt("p"), fusion)], SUBJECT, is_dark=is_dark)
    picture = pixels(tmp_path / "w.png")[:, :, :3]
    ink, paper = (
        np.abs(picture - [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]).max(axis=2) < 0.02
        for c in (palette.ramp[-1], palette.paper)
    )
    height, width = ink.shape
    # The left half of the panel is full ink, the right half is paper.
    assert ink.sum() > 0.1 * height * width
    assert ink[:, : width // 2].sum() > 0.95 * ink.sum()
    assert paper.sum() > 0.5 * height * width


@pytest.mark.slow
def test_dots_per_inch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.png"
    sizes = []
    for dpi in (75, 300):
        assert write_plot(path, [weighed()], SUBJECT, dpi=dpi) == ""
        sizes.append(np.array(pixels(path).shape[:2]))
    assert np.allclose(sizes[1] / sizes[0], 4, rtol=0.01)
    monkeypatch.setattr("qaflora_edge.cli.plot_figure.PIXELS_MAX", 1000)
    inches = max(sizes[0]) / 75
    assert write_plot(path, [weighed()], SUBJECT, dpi=300) == (
        f"Note: {path} has {int(1000 / inches)} dots per inch instead of 300, so that it is at "
        "most 1,000 pixels wide and high, as viewers expect."
    )
    assert 980 < max(pixels(path).shape) <= 1000


@pytest.mark.slow
def test_png_of_many_prompts_and_layers_stays_in_bounds(tmp_path: Path) -> None:
    items = [weighed(f"prompt {i} $x$", "a$b", "日本", seed=i, n_layer=126) for i in range(3)]
    write_plot(tmp_path / "w.png", items, SUBJECT)
    height, width, _ = pixels(tmp_path / "w.png").shape
    assert max(height, width) < 30_000
    assert height > 700
    assert width > 126 * 20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_same_weights_same_bytes(suffix: str, tmp_path: Path) -> None:
    items = [weighed(), weighed("Another?", seed=1)]
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        write_plot(path, items, SUBJECT)
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
        write_plot(path, [weighed()], SUBJECT)
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
    for name in ("w.png", "w.svg"):
        assert message(tmp_path / name) == (
            f"Cannot write {tmp_path / name}: PNG and SVG need matplotlib, which is not installed. "
            "Install it with `pip install 'qaflora-edge[plot]'`, or name a file that ends in .html."
        )


def test_nothing_to_draw(tmp_path: Path) -> None:
    empty = FusionWeights((), np.zeros((0, 3), np.float32), None, "base")
    with pytest.raises(OutputFileError) as caught:
        write_plot(tmp_path / "w.svg", [(Prompt("p"), empty)], SUBJECT)
    assert str(caught.value) == (
        f"Cannot draw {tmp_path / 'w.svg'}: the bundle has no adapters, expected one or more. Add "
        "one with `qaflora bundle add`."
    )
    assert list(tmp_path.iterdir()) == []
