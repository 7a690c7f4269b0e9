"""qaflora weights: table, JSON, pictures"""

import json
import re

import numpy as np
import pytest
from bundles import TinyBundle, qaflora, said_by, snapshot
from click.testing import Result

from qaflora_edge import Engine

PROMPT = "the thing on a ring"


def weights(calibrated: TinyBundle, *args: object, stdin: str | bytes | None = None) -> Result:
    return qaflora("weights", calibrated.folder, *args, stdin=stdin)


def test_json_is_the_contract_and_the_engines(calibrated) -> None:
    result = weights(calibrated, PROMPT, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    with Engine(calibrated.folder) as engine:
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


def test_two_place_says_what_it_measured_and_why_the_base_is_alone(calibrated) -> None:
    mixed = weights(calibrated, PROMPT, "--strategy", "two-place:abstain=never").stdout
    assert "strategy two-place:abstain=never, " in mixed
    assert "deviations above its typical prompt." in " ".join(mixed.split())
    alone = weights(calibrated, PROMPT, "--strategy", "two-place:abstain=100").stdout
    assert "The base answers alone: no adapter stands out (" in " ".join(alone.split())
    for shown in (mixed, alone):
        assert not {"lens", "pool", "divergence"} & {*re.findall(r"\w+", shown)}
    plain = json.loads(weights(calibrated, PROMPT, "--strategy", "two-place", "--json").stdout)
    assert (plain["lens"], plain["pool"]) == ("norm", "last")  # the contract
    # To a base of random numbers every question is a surprise.
    assert plain["why"]["es"]["thresholds"] == {"answer": 1.25, "question": 1.25}
    assert plain["because"]


@pytest.mark.parametrize(
    "args", [(), (PROMPT, "--prompts", "prompts.txt"), (PROMPT, "--plot", "weights.png")]
)
def test_wrong_usage_is_2(calibrated, args) -> None:
    assert "Usage: " in said_by(weights(calibrated, *args), 2)


def test_plot_is_written_next_to_the_other_outputs(calibrated, tmp_path) -> None:
    path = tmp_path / "weights.svg"
    result = weights(calibrated, PROMPT, "--plot", path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown, text = json.loads(result.stdout)["weights"], path.read_text(encoding="utf-8")
    text = text.replace("&#160;", " ")
    assert "tiny on tiny llama 0" in text
    assert f"{np.mean(shown[0]):.2f}" in text


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["", "--json"], None, "The prompt is empty; give at least one character."),
        (["-"], b"\xff", "Cannot read stdin: it is not UTF-8 (invalid start byte at byte 0)"),
        (["hi", "--plot", "/no/such/folder/w.svg"], None, "Cannot write /no/such/folder/w.svg"),
    ],
)
def test_failure_says_what_is_wrong(calibrated, args, stdin, message) -> None:
    before = snapshot(calibrated.folder.parent)
    stderr = said_by(weights(calibrated, *args, stdin=stdin), 1)
    assert message in stderr
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1
    assert snapshot(calibrated.folder.parent) == before


@pytest.mark.slow
def test_demo_bundle_tells_spanish_from_medicine(smollm2, checkout) -> None:
    """The shipped adapters are the recorded ones, and the calibrated mix follows the question."""
    folder = checkout / "models/demo"
    assert qaflora("bundle", "verify", folder).exit_code == 0
    questions = {
        "es": "Escribe dos frases en español sobre un hotel tranquilo junto al mar.",
        "med": "Which organ makes insulin?\nA. Liver\nB. Kidney\nC. Pancreas\nD. Spleen",
    }
    for expected, question in questions.items():
        result = qaflora("weights", folder, question, "--strategy", "calibrated", "--json")
        shown = json.loads(result.stdout)
        means = dict(zip(shown["adapters"], np.mean(shown["weights"], axis=1), strict=True))
        assert max(means, key=lambda name: means[name]) == expected
