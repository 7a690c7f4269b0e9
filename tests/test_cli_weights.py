"""qaflora weights: table, JSON, pictures"""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from bundles import TinyBundle, make_bundle, snapshot
from click.testing import CliRunner, Result

from qaflora_edge import Engine
from qaflora_edge.cli import main
from qaflora_edge.cli.show import BLOCKS, strip, strips
from qaflora_edge.fusion import FusionWeights

PROMPT = "the thing on a ring"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("weights"), calibrate=True)


def weights(made: TinyBundle, *args: object, stdin: str | bytes | None = None) -> Result:
    words = ["weights", str(made.folder), *(str(arg) for arg in args)]
    return CliRunner().invoke(main, words, input=stdin)


def test_json_is_the_contract_and_the_engines(made: TinyBundle) -> None:
    result = weights(made, PROMPT, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    with Engine(made.folder) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": PROMPT}])
        fusion = engine.weights(tokens)
    assert shown.pop("probe_ms") > 0
    assert np.array_equal(np.array(shown.pop("weights"), np.float32), fusion.weights)
    assert np.array_equal(np.array(shown.pop("divergence"), np.float32), fusion.divergence)
    assert shown == {
        "adapters": ["math", "es"],
        "strategy": "qa-flora",
        "lens": "norm",
        "pool": "last",
        "n_layer": 3,
        "prompt_tokens": len(tokens),
    }


def test_options_reach_the_engine(made: TinyBundle) -> None:
    options = ("--strategy", "cosine", "--lens", "raw", "--pool", "mean", "--raw-prompt")
    more = ("--kv-type", "f32", "--no-flash-attn", "--threads", 1, "--ctx", 64)
    shown = json.loads(weights(made, PROMPT, "--json", *options, *more).stdout)
    with Engine(
        made.folder, pool="mean", kv_type="f32", flash_attn=False, threads=1, n_ctx=64
    ) as engine:
        fusion = engine.weights(PROMPT, strategy="cosine")
    assert (shown["strategy"], shown["lens"], shown["pool"]) == ("cosine", "raw", "mean")
    assert shown["prompt_tokens"] == fusion.prompt_tokens
    np.testing.assert_allclose(shown["weights"], fusion.weights, rtol=1e-5)


def test_stdin_is_the_same_prompt(made: TinyBundle) -> None:
    given = json.loads(weights(made, PROMPT, "--json").stdout)
    piped = json.loads(weights(made, "-", "--json", stdin=PROMPT + "\n").stdout)
    assert piped["weights"] == given["weights"]


def test_heatmap_is_printed(made: TinyBundle) -> None:
    result = weights(made, PROMPT, "--strategy", "manual:math=0.25,es=1")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("strategy manual:math=0.25,es=1 · ")
    assert lines[3].split() == ["math", "0.25", "▃▃▃▃▃▃▃▃▃"]
    assert lines[4].split() == ["es", "1.00", "█████████"]
    assert "es    0–2" in lines


def test_heatmap_of_a_probed_strategy_shows_divergence(made: TinyBundle) -> None:
    result = weights(made, PROMPT, "--strategy", "calibrated")
    assert "lens norm, pool last" in result.stdout
    assert "divergence" in result.stdout


def test_heatmap_fits_the_terminal(made: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    result = weights(made, PROMPT)
    assert max(len(line) for line in result.stdout.splitlines()) <= 24


def test_colour_can_be_forced_into_a_pipe(
    made: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[97;48;5;" in weights(made, PROMPT).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in weights(made, PROMPT).stdout


FUSION = FusionWeights(("math", "es"), np.array([[0, 0.5, 1], [1, 0.5, -1]], np.float32))


def test_strip_signs_from_0_to_1() -> None:
    assert strip([-1.0, 0.0, 0.124, 0.126, 0.99, 1.0, 9.0], BLOCKS) == "▁▁▁▂███"
    assert strip([0.0, 0.05, 0.15, 0.5, 1.0], "0123456789") == "00159"


def test_terminal_without_unicode_gets_digits() -> None:
    assert "059" in strips(FUSION, "ascii")[0]
    assert "▁▅█" in strips(FUSION, "utf-8")[0]


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in strips(FUSION, "utf-8")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in strips(FUSION, "utf-8")[0]


def test_plot_svg(made: TinyBundle, tmp_path: Path) -> None:
    path = tmp_path / "weights.svg"
    result = weights(made, PROMPT, "--plot", path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["adapters"] == ["math", "es"]
    root = ElementTree.parse(path).getroot()
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 3
    shown = json.loads(result.stdout)["weights"]
    assert titles[0] == f"math, layer 0: {shown[0][0]:.3f}"


def test_plot_html_stands_alone(made: TinyBundle, tmp_path: Path) -> None:
    path = tmp_path / "weights.html"
    assert weights(made, PROMPT, "--plot", path).exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert text.count("<td>") == 2 * 4
    assert "<svg" in text
    assert "src=" not in text
    assert "href=" not in text


def test_plot_png(made: TinyBundle, tmp_path: Path) -> None:
    path = tmp_path / "weights.png"
    result = weights(made, PROMPT, "--plot", path)
    if importlib.util.find_spec("matplotlib") is not None:
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: Cannot write {path}: PNG needs matplotlib, which is not installed. Install it "
        "with `pip install qaflora-edge[plot]`, or name a file that ends in .svg or .html.\n"
    )
    assert not path.exists()


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["", "--json"], None, "The prompt is empty; give at least one character."),
        (["-"], "\n", "The prompt is empty; give at least one character."),
        (["-"], b"\xff", "The prompt on stdin is not UTF-8 (invalid start byte at byte 0)"),
        (["hi", "--strategy", "best"], None, "Strategy 'best' is not known; expected one of"),
        (["hi", "--strategy", "single:no"], None, "names the adapter 'no', which is not loaded"),
        (["hi", "--strategy", "manual:es=nan"], None, "expected a finite number"),
        (["hi" * 200, "--ctx", "16"], None, "tokens, the context 16; shorten it"),
        (["hi", "--plot", "/no/such/folder/w.svg"], None, "Cannot write /no/such/folder/w.svg"),
    ],
)
def test_failure_says_what_is_wrong(
    made: TinyBundle, args: list[str], stdin: str | bytes | None, message: str
) -> None:
    before = snapshot(made.folder.parent)
    result = weights(made, *args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert snapshot(made.folder.parent) == before


def test_demo_bundle_tells_spanish_from_medicine(smollm2: Path, checkout: Path) -> None:
    """The shipped adapters are the recorded ones, and the calibrated mix follows the question."""
    folder = checkout / "models/demo"
    assert CliRunner().invoke(main, ["bundle", "verify", str(folder)]).exit_code == 0
    questions = {
        "es": "Escribe dos frases en español sobre un hotel tranquilo junto al mar.",
        "med": "Which organ makes insulin?\nA. Liver\nB. Kidney\nC. Pancreas\nD. Spleen",
    }
    for expected, question in questions.items():
        args = ["weights", str(folder), question, "--strategy", "calibrated", "--json"]
        shown = json.loads(CliRunner().invoke(main, args).stdout)
        means = dict(zip(shown["adapters"], np.mean(shown["weights"], axis=1), strict=True))
        assert max(means, key=lambda name: means[name]) == expected
