"""qaflora run"""

import json
from pathlib import Path

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result

from qaflora_edge import Engine, hub
from qaflora_edge.cli import main

PROMPT = "the thing on a ring"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("run"))


def run(folder: object, *args: object) -> Result:
    return CliRunner().invoke(main, ["run", str(folder), *(str(arg) for arg in args)])


def answer(made: TinyBundle, prompt: str | None = None, **options: object) -> str:
    with Engine(made.folder) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": PROMPT}])
        return engine.generate(prompt or tokens, **options).text()  # type: ignore[arg-type]


def test_answer_on_stdout_the_rest_on_stderr(made: TinyBundle) -> None:
    result = run(made.folder, PROMPT, "--max-tokens", 8)
    assert result.exit_code == 0
    assert result.stdout == answer(made, max_tokens=8) + "\n"
    assert result.stderr.startswith("[math 0.")
    assert "8 tokens at" in result.stderr
    assert result.stderr.endswith("cut at the limit of tokens]\n")


def test_raw_prompt_takes_no_template(made: TinyBundle) -> None:
    result = run(made.folder, PROMPT, "--raw-prompt", "--max-tokens", 8)
    assert result.stdout == answer(made, PROMPT, max_tokens=8) + "\n"
    assert result.stdout != run(made.folder, PROMPT, "--max-tokens", 8).stdout


def test_json_is_the_contract(made: TinyBundle) -> None:
    result = run(made.folder, PROMPT, "--max-tokens", 8, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    with Engine(made.folder) as engine:
        n_prompt = len(engine.chat_tokens([{"role": "user", "content": PROMPT}]))
    assert shown["text"] == answer(made, max_tokens=8)
    assert shown["finish_reason"] == "length"
    assert shown["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 8}
    assert shown["fusion"]["adapters"] == ["math", "es"]
    assert shown["fusion"]["prompt_tokens"] == n_prompt
    assert set(shown["timings"]) == {"probe_ms", "prefill_ms", "decode_ms", "tokens_per_second"}
    assert min(shown["timings"].values()) > 0
    assert set(shown) == {"text", "finish_reason", "usage", "fusion", "timings"}


def test_stop_ends_the_answer(made: TinyBundle) -> None:
    text = answer(made, max_tokens=12)
    stop = text[4:6]
    shown = json.loads(
        run(made.folder, PROMPT, "--max-tokens", 12, "--stop", stop, "--json").stdout
    )
    assert shown["text"] == text[: text.index(stop)]
    assert shown["finish_reason"] == "stop"


def test_seed_repeats_a_sampled_answer(made: TinyBundle) -> None:
    sampled = ("--temp", 1.5, "--top-p", 0.9, "--max-tokens", 12, "--seed")
    texts = [run(made.folder, PROMPT, *sampled, seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_strategies_give_different_answers_and_none_changes_the_base(made: TinyBundle) -> None:
    def text(strategy: str) -> str:
        return run(made.folder, PROMPT, "--max-tokens", 12, "--strategy", strategy).stdout

    assert text("base") == text("manual:math=0,es=0")
    assert text("single:es") == text("manual:es=1")
    assert len({text("base"), text("single:es"), text("single:math")}) == 3


def test_base_without_template_needs_raw_prompt(tmp_path: Path) -> None:
    made = make_bundle(tmp_path, chat_template=None)
    result = run(made.folder, PROMPT, "--max-tokens", 4)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: The base base.gguf has no chat template (tokenizer.chat_template is missing); "
        "give the prompt as plain text (--raw-prompt), or use an instruct model.\n"
    )
    assert run(made.folder, PROMPT, "--max-tokens", 4, "--raw-prompt").exit_code == 0


def test_calibrated_needs_a_calibrated_bundle(made: TinyBundle) -> None:
    result = run(made.folder, PROMPT, "--strategy", "calibrated")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "needs typical divergences, missing for math, es" in result.stderr


def test_missing_base_is_told(tmp_path: Path) -> None:
    made = make_bundle(tmp_path)
    made.base.path.unlink()
    result = run(made.folder, PROMPT)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{made.base.path} does not exist; put a file with the SHA-256" in result.stderr


def test_dir_may_be_a_pulled_hub_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))
    made = make_bundle(tmp_path)
    assert run("owner/name", PROMPT).exit_code == 1
    place = hub.hub_dir(hub.parse_hub_ref("owner/name"))
    place.parent.mkdir(parents=True)
    made.folder.rename(place)
    assert run("owner/name", PROMPT, "--max-tokens", 2).exit_code == 0
