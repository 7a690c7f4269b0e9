"""The example scripts are short, and run."""

import json
import runpy
from pathlib import Path

import pytest
from bundles import make_bundle
from huggingface_hub import InferenceClient
from patience import python
from serving import listening
from tiny import CHATML, constant_logits

from qaflora_edge.dialects.dialect import registered

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.slow
def test_offline_assistant_fills_a_form_and_answers(tmp_path, checkout) -> None:
    first_in_ascii = constant_logits(lambda token: -ord(token[0]))
    made = make_bundle(tmp_path, arch="qwen2", replace=first_in_ascii)
    script = checkout / "examples/offline_assistant.py"
    result = python(script, made.folder, "the thing?")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "form: {'language': 'English', 'urgent': False}",
        "mix: math 0.50, es 0.50",
        "!" * 64,
    ]
    result = python(script, tmp_path / "gone", "the thing?")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")


@pytest.mark.slow
def test_a_strategy_of_somebody_else_drafts(tmp_path, checkout) -> None:
    """One draft is read for how sure it is, and the base writes with it in view."""
    made = make_bundle(tmp_path, chat_template=CHATML, n_ctx=512)
    script = checkout / "examples/own_relay.py"
    source = script.read_text(encoding="utf-8").replace("SURE = -0.5", "SURE = -50")
    anywhere = tmp_path / "own_relay.py"
    anywhere.write_text(source, encoding="utf-8")
    how = ("--strategy", "surest", "-n", "4", "--json")
    shown = json.loads(python(anywhere, "run", made.folder, "abc def?", *how).stdout)
    relay = shown["relay"] if "relay" in shown else shown["fusion"]["relay"]
    assert relay["knower"] in ("math", "es")
    assert relay["writer"] == "base"
    assert relay["draft_tokens"] > 8


def test_a_dialect_of_somebody_else_is_served(alone, served, checkout, monkeypatch) -> None:
    """By the client of its API, whole and as a stream."""
    monkeypatch.setitem(registered, "/generate", None)  # until the end of the test
    monkeypatch.setattr("qaflora_edge.cli.main", lambda: None)
    runpy.run_path(str(checkout / "examples/own_dialect.py"))
    expected = alone.generate("the thing", max_tokens=5).text()
    with listening(served.folder) as url:
        client = InferenceClient(f"{url}/generate")
        assert client.text_generation("the thing", max_new_tokens=5) == expected
        streamed = client.text_generation("the thing", max_new_tokens=5, stream=True)
        assert "".join(streamed) == expected
