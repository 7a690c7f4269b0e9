"""The plugin for the program `llm`: its own command line, run on a tiny bundle."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from bundles import TinyBundle
from click.testing import CliRunner, Result
from patience import python
from test_cli_run import SCHEMA

llm = pytest.importorskip("llm", reason="the extra llm is not installed")
from llm.cli import cli  # noqa: E402

from qaflora_edge import Engine  # noqa: E402
from qaflora_edge.llm_plugin import close_all  # noqa: E402

Run = Callable[..., Result]


@pytest.fixture
def run(made, tmp_path) -> Iterator[Run]:
    """Run `llm` with a home of its own and the tiny bundle in the setting `bundles`."""

    def call(*args: str, **more: str) -> Result:
        environment = {
            "LLM_USER_PATH": str(tmp_path / "llm"),
            "QAFLORA_BUNDLES": str(made.folder.parent),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "QAFLORA_CTX": "256",
            **more,
        }
        return CliRunner().invoke(cli, args, env=environment)

    yield call
    close_all()


def logged(run: Run) -> dict[str, Any]:
    """The last answer as `llm` has logged it."""
    (entry,) = json.loads(run("logs", "--json", "-n", "1").stdout)
    return dict(entry)


def own_answer(made: TinyBundle, messages: list[dict[str, str]], **options: Any) -> str:
    with Engine(made.folder, n_ctx=256) as engine:
        return engine.generate(engine.chat_tokens(messages), **options).text()


def test_bundles_are_models(run) -> None:
    listed = run("models", "--options", "-m", "qaflora/bundle")
    assert listed.exit_code == 0, listed.stderr
    assert "BundleModel: qaflora/bundle" in listed.stdout
    assert "Choose how to weigh" in listed.stdout


def test_answer_is_the_engines_and_its_weights_are_logged(made, run) -> None:
    done = run("-m", "qaflora/bundle", "the thing", "-o", "max_tokens", "6")
    assert done.exit_code == 0, done.stderr
    user = {"role": "user", "content": "the thing"}
    assert done.stdout == own_answer(made, [user], max_tokens=6) + "\n"
    entry = logged(run)
    answer = entry["response_json"]
    assert entry["model"] == "qaflora/bundle"
    assert answer["finish_reason"] == "length"
    assert answer["fusion"]["adapters"] == ["math", "es"]
    assert len(answer["fusion"]["weights"][0]) == made.base.n_layer
    assert entry["output_tokens"] == 6
    assert entry["input_tokens"] == answer["fusion"]["prompt_tokens"]


def test_system_prompt_and_options_reach_the_engine(made, run) -> None:
    options = {"temperature": 0.9, "seed": 5, "max_tokens": 8, "top_k": 9, "repeat_penalty": 1.5}
    given = {**options, "strategy": "single:es", "stop": "xyzzy"}
    flags = [part for name, value in given.items() for part in ("-o", name, str(value))]
    done = run("-m", "qaflora/bundle", "the thing", "-s", "on and on", *flags)
    assert done.exit_code == 0, done.stderr
    messages = [
        {"role": "system", "content": "on and on"},
        {"role": "user", "content": "the thing"},
    ]
    expected = own_answer(made, messages, weights="single:es", stop="xyzzy", **options)
    assert done.stdout == expected + "\n"
    assert logged(run)["response_json"]["fusion"]["strategy"] == "single:es"


def test_conversation_goes_on(made, run) -> None:
    first = run("-m", "qaflora/bundle", "the thing", "-o", "max_tokens", "4").stdout
    second = run("-c", "and on", "-o", "max_tokens", "4")
    assert second.exit_code == 0, second.stderr
    messages = [
        {"role": "user", "content": "the thing"},
        {"role": "assistant", "content": first.removesuffix("\n")},
        {"role": "user", "content": "and on"},
    ]
    assert second.stdout == own_answer(made, messages, max_tokens=4) + "\n"


def test_schema_shapes_the_answer(run) -> None:
    done = run("-m", "qaflora/bundle", "the thing", "--schema", json.dumps(SCHEMA))
    assert done.exit_code == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), SCHEMA)


def test_failure_is_told(run) -> None:
    done = run("-m", "qaflora/bundle", "the thing", "-o", "strategy", "single:nobody")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_start_of_llm_loads_no_engine(made) -> None:
    code = (
        "import json, sys, llm\n"
        "names = [model.model_id for model in llm.get_models()]\n"
        "heavy = {'gguf.gguf_writer', 'llama_cpp', 'qaflora_edge.engine'} & set(sys.modules)\n"
        "print(json.dumps(['qaflora/bundle' in names, sorted(heavy)]))\n"
    )
    done = python("-c", code, env={"QAFLORA_BUNDLES": str(made.folder)})
    assert json.loads(done.stdout) == [True, []], done.stderr
