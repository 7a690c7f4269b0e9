"""Teaching: examples say who answers; the file that keeps them."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from patience import python
from refusals import refused

from qaflora_edge import Engine
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.ask import Chat, Weighing
from qaflora_edge.bundles.edit import remove_adapter
from qaflora_edge.bundles.open import verify_bundle
from qaflora_edge.bundles.taught import counts_of, read_path
from qaflora_edge.errors import BundleError, StrategyError
from qaflora_edge.weighing.examples import RIDGE, Example, fit, nuisance, ridge
from qaflora_edge.weighing.strategy import Closeness

N_EMBD = 6
RNG = np.random.default_rng(11)
EGG = "How many eggs are six and six?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("taught")).folder


def random_states(n: int) -> Any:
    states = RNG.normal(size=(n, 2, N_EMBD)).astype(np.float32)
    return states / np.linalg.norm(states, axis=2, keepdims=True)


def close_to(engine: Engine, question: str) -> dict[str, Closeness]:
    current = engine.memory.current
    core = current.core
    with core.call():
        asked = current.reader.read(Chat([{"role": "user", "content": question}]))
        query = current.weigher.choice(asked, Weighing("static")).query
        with PromptReading(core, query, core.cancellation()) as reading:
            return reading.close()


@pytest.mark.parametrize("n_row", [5, 40])
def test_ridge_is_least_squares_with_rows_that_pull_to_zero(n_row) -> None:
    rows = RNG.normal(size=(n_row, 12))
    targets = RNG.normal(size=(n_row, 3))
    row_weights = RNG.uniform(0.1, 3, n_row)
    roots = np.sqrt(row_weights)[:, None]
    more_rows = np.concatenate([rows * roots, np.sqrt(RIDGE) * np.eye(12)])
    more_targets = np.concatenate([targets * roots, np.zeros((12, 3))])
    expected, *_ = np.linalg.lstsq(more_rows, more_targets)
    np.testing.assert_allclose(ridge(rows, targets, row_weights), expected, atol=1e-9)


def test_how_many_examples_an_adapter_has_does_not_decide() -> None:
    generic = [random_states(2), random_states(2)]
    often, once = random_states(2)
    examples = [Example("math", often)] * 1000 + [Example("es", once)]
    taught = fit(examples, generic)
    assert taught.n_example == {"math": 1000, "es": 1}
    of_once = taught.close(once, ["math", "es"])
    assert of_once["es"].over_next > 0.5 > 0 > of_once["math"].over_nobody - 0.5
    assert of_once["es"].over_next == -of_once["math"].over_next
    both = fit([Example("math", once), Example("es", once)], generic).close(once, ["math", "es"])
    assert both["math"].over_next == pytest.approx(0, abs=1e-6)
    assert both["math"].over_nobody > 0
    # Ways in which a generic question differs from itself change nothing.
    moved = once + nuisance(generic)[0].reshape(2, N_EMBD).astype(np.float32)
    assert taught.close(moved, ["es"])["es"].over_nobody == pytest.approx(
        taught.close(once, ["es"])["es"].over_nobody, abs=1e-5
    )


def test_states_are_those_that_blocks_read(tmp_path) -> None:
    made = make_bundle(tmp_path)
    norm = made.base.tensors
    with Engine(made.folder, n_ctx=512, kv_type="f32") as engine:
        prompt = engine.read(Chat([{"role": "user", "content": EGG}]))
        _, end = prompt.question or (0, 0)
        before = [engine.hidden_states(prompt.tokens[:end]), engine.hidden_states(prompt.tokens)]
        engine.teach(EGG, "math")
        *_, line = map(json.loads, read_path(made.folder).read_text().splitlines())
        expected = []
        for states, layer in zip(before, (2 * 3 // 3, 2), strict=True):
            state = states[layer - 1] * norm[f"blk.{layer}.attn_norm.weight"]
            expected.append(state / np.linalg.norm(state))  # as RMSNorm divides by one number
    kept = np.frombuffer(base64.b64decode(line["state"]), np.float16).reshape(2, -1)
    np.testing.assert_allclose(kept, expected, atol=2e-3)  # float16, and rounded products


def test_what_is_taught_counts_is_kept_and_taken_back(folder) -> None:
    with Engine(folder, n_ctx=512) as engine, Engine(folder, n_ctx=512) as other:
        assert close_to(engine, EGG) == {}
        assert engine.unteach() is None
        assert engine.teach([EGG, "And seven?", EGG], "math") == 2
        close = close_to(other, EGG)["math"]  # another Engine sees it at once
        assert close.over_nobody > 0.1
        assert close.n_example == 2
        assert engine.teach(EGG, "es") == 1  # the newest label counts
        assert engine.taught == {"math": 1, "es": 1}
        assert engine.unteach() == "es"
        assert other.taught == {"math": 2}
        messages = [{"role": "user", "content": "Who, then?"}]
        assert engine.teach(messages, "base", answers=["Hello!"], keep_text=False) == 1
        assert engine.teach(messages, "base", keep_text=False) == 1  # the same state
        engine.describe("es", "Answers in Spanish.")
        engine.describe("es", "Answers always in Spanish.")
        assert close_to(engine, EGG)["es"].n_example == 0
        text = read_path(folder).read_text()
        assert EGG in text
        assert "es: Answers always" in text
        assert [word for word in (" then", "Hello!") if word in text] == []
        message = refused(StrategyError, engine.teach, EGG, "maths")
        assert message == (
            "The adapter 'maths' is not loaded; expected names out of: base, math, es."
        )
        assert engine.teach([], "es") == 0
        assert engine.forget("math") == 2
        assert engine.taught == {"base": 1}
        verify_bundle(folder)


def test_processes_that_teach_at_once_lose_nothing(tmp_path) -> None:
    folder = make_bundle(tmp_path).folder
    code = (
        "import sys\n"
        "from qaflora_edge import Engine\n"
        "with Engine(sys.argv[1], n_ctx=512) as engine:\n"
        "    for i in range(4):\n"
        "        engine.teach(f'What is {sys.argv[2]} and {i}?', sys.argv[2])\n"
    )
    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(python, "-c", code, folder, name) for name in ("math", "es")]
        assert [one.result().stderr for one in done] == ["", ""]
    with Engine(folder, n_ctx=512) as engine:
        assert engine.taught == {"math": 4, "es": 4}
    assert counts_of(folder) == {"math": 4, "es": 4}
    remove_adapter(folder, "es")
    with Engine(folder, n_ctx=512) as engine:
        assert engine.taught == {"math": 4}


def test_a_bundle_that_is_read_only_is_taught_in_the_users_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("qaflora_edge.bundles.taught.data_dir", lambda: tmp_path / "data")
    made = make_bundle(tmp_path)
    with Engine(base=made.base.path, adapters={"es": made.adapter.path}, n_ctx=512) as engine:
        engine.teach(EGG, "es")
    monkeypatch.setattr("qaflora_edge.bundles.taught.os.access", lambda path, mode: False)
    with Engine(made.folder, n_ctx=512) as engine:
        engine.teach(EGG, "math")
    with Engine(made.folder, n_ctx=512) as engine:
        assert engine.taught == {"math": 1}
    assert not (made.folder / "examples.jsonl").exists()
    assert len([*(tmp_path / "data" / "taught").iterdir()]) == 2


def test_wrong_files_are_refused_by_line(folder) -> None:
    with Engine(folder, n_ctx=512) as engine:
        engine.teach(EGG, "math")
    path = read_path(folder)
    good = path.read_text()
    first, *lines = good.splitlines()
    number = len(lines) + 1
    advice = "Teach again: remove the file, or take it from a backup."
    for broken, why in {
        '{"adapter": "math"}': "Object missing required field `state`",
        lines[-1].replace('"state":"', '"state":"AAAA'): None,
        '{"adapter": "math", "state": "AAAA"}': "buffer size must be a multiple of element size",
    }.items():
        path.write_text("\n".join([first, *lines[:-1], broken]))
        message = refused(BundleError, Engine, folder)
        assert message.startswith(f"Cannot use {path}: line {number} is damaged (")
        assert message.endswith(f"expected what `qaflora bundle teach` writes. {advice}")
        assert why is None or why in message
    header = json.loads(first)
    path.write_text("\n".join([json.dumps(header | {"base": "0" * 64}), *lines]))
    assert refused(BundleError, Engine, folder) == (
        f"Cannot use the examples in {path}: the base 000000000000 read them ({header['n_embd']} "
        f"wide), expected this one, {header['base'][:12]} ({header['n_embd']} wide); states of one "
        "base tell nothing of another. Remove the file and teach again."
    )
