"""Answers under a schema or grammar: who answers drafts first, unless its own form is that one."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from bundles import make_bundle
from serving import client_of
from test_relay import BY_HAND, asked, base_reads_up_to_the_draft, streamed
from tiny import CHATML, QWEN, USER, constant_logits, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.answering.answer import Writing, drafted_first, read
from qaflora_edge.ask import Ask, Chat, Sampling, Tools, Weighing
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.weighing.plan import BASE, Draft, FusionWeights, Plan, alone_weights

NUMBER = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["answer"],
    "additionalProperties": False,
}
N_MOST = 256  # tokens; the longest answer of NUMBER has fewer
ALL_AS = 'root ::= "a"+'
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "abc def?"}],
    "max_tokens": N_MOST,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}},
    "fusion": {"strategy": "single:math"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("bound")
    return make_bundle(place, chat_template=CHATML, n_ctx=1024).folder


@pytest.fixture(scope="module")
def says_a(tmp_path_factory) -> Path:
    """Make a base that writes the letter a and nothing else, on every machine."""
    replace = constant_logits(lambda token: 9 * (token == "a"))
    place = tmp_path_factory.mktemp("says-a") / "base.gguf"
    return write_tiny_base(place, "qwen2", replace=replace).path


@pytest.mark.parametrize("strategy", ["base", "single:math", "manual:math=0.5,es=0.5", "qa-flora"])
def test_who_answers_drafts_unbound_and_then_writes_bound(folder, strategy, monkeypatch) -> None:
    """Bit for bit: the plain answer of the same mix, then the bound one with it in view."""
    with Engine(folder, n_ctx=1024, guesses=0) as engine:
        plain = asked(engine)
        asks: dict[str, Any] = {"json_schema": NUMBER, "max_tokens": N_MOST}
        asks["draft"] = True if strategy == "base" else None
        answer = engine.generate(plain, strategy=strategy, **asks)
        text = answer.text()
        jsonschema.validate(json.loads(text), NUMBER)
        assert answer.draft is not None
        weights = answer.fusion.weights
        # Drafts are read as under a relay: the base prefills the prompt.
        how: dict[str, Any] = {"weights": weights, "prefill": "base"}
        unbound = engine.generate(plain, max_tokens=128, **how)
        assert answer.draft.text == unbound.text()
        assert answer.usage["completion_tokens"] == answer.n_draft + answer.n_completion
        second = asked(engine, f"({answer.draft.text.strip()})\n\nabc def?")
        assert answer.prompt == tuple(second)
        if strategy != "qa-flora":  # which prefills with the mix
            base_reads_up_to_the_draft(monkeypatch, engine, plain)
        how["prefill"] = "mix" if strategy in ("qa-flora", "manual:math=0.5,es=0.5") else "base"
        bound = {"json_schema": NUMBER, "draft": False, "max_tokens": N_MOST}
        assert text == engine.generate(second, **bound, **how).text()


def test_who_drafts_is_who_answers_at_the_end(folder, monkeypatch) -> None:
    """A strategy may have begun the answer of another mix before it decided."""

    def rule(reading: Any) -> Plan:
        names = reading.query.adapters
        reading.drafts(["es"], 8, np.full((2, reading.query.n_layer), 0.5, np.float32))
        return Plan.mix(alone_weights("math", names, reading.query.n_layer))

    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", rule)
    with Engine(folder, n_ctx=1024, guesses=0) as engine:
        answer = engine.generate(asked(engine), strategy=BY_HAND, grammar='root ::= "b"')
        assert answer.text() == "b"
        assert answer.draft is not None
        alone = engine.generate(asked(engine), strategy="single:math", max_tokens=128)
        assert answer.draft.text == alone.text()


def test_a_draft_is_off_by_name(folder) -> None:
    with Engine(folder, n_ctx=1024, guesses=0) as engine:
        plain = asked(engine)
        bound: dict[str, Any] = {"json_schema": NUMBER, "max_tokens": N_MOST, "draft": False}
        answer = engine.generate(plain, strategy="single:math", **bound)
        jsonschema.validate(json.loads(answer.text()), NUMBER)
        assert answer.draft is None
        assert answer.prompt == tuple(plain)


def test_no_draft_where_the_own_form_is_the_one_that_binds(says_a) -> None:
    with Engine(base=says_a, adapters={}, n_ctx=512) as engine:
        plain = asked(engine)
        own = engine.generate(plain, grammar=ALL_AS, max_tokens=20, draft=True)
        assert own.text() == "a" * 20
        assert own.draft is None
        assert engine.generate(plain, grammar='root ::= "b"').draft is None  # the base is not asked
        other = engine.generate(plain, grammar='root ::= "b"', max_tokens=20, draft=True)
        assert other.text() == "b"
        assert other.draft is not None
        assert other.draft.text == "a" * 128


class Begun:
    """A reading in which who answers begins with a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def drafts(self, names: Any, n_token: int, answer: Any = None) -> list[Draft]:
        return [Draft(BASE, (1, 2), self.text, (-1.0, -1.0), is_whole=False)]


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("begun", "is_own"),
    [
        ('{"answer": 80', True),
        ('```json\n{\n  "answer"', True),
        ("The Cinder rug weighs", False),
        ('{"weight": 80}', False),
    ],
)
def test_a_form_is_known_by_how_an_answer_begins(folder, begun, is_own) -> None:
    ask = Ask(Chat(BODY["messages"]), json_schema=NUMBER)
    assert is_drafting(folder, ask, begun) is not is_own


@pytest.mark.parametrize(
    ("begun", "is_own"),
    [('<tool_call>\n{"na', True), ('{"name": "weather", "arg', True), ("I cannot", False)],
)
def test_a_call_that_is_forced_is_drafted_unless_it_is_begun(tmp_path, begun, is_own) -> None:
    made = make_bundle(tmp_path, chat_template=QWEN, user_defined=("<tool_call>",), n_ctx=1024)
    ask = Ask(Chat(BODY["messages"], Tools([WEATHER], required=[WEATHER])))
    assert is_drafting(made.folder, ask, begun) is not is_own


def is_drafting(folder: Path, ask: Ask, begun: str) -> bool:
    """Tell whether who begins unbound with a text drafts before the answer to what is asked."""
    reading: Any = Begun(begun)
    fusion = FusionWeights(("math",), Plan.mix([[0.0]]))
    with Engine(folder, n_ctx=1024) as engine:
        adapters = engine.memory.current
        core = adapters.core
        ask = read(adapters, ask)
        sampler = Sampler(core.model, ask.sampling)
        writing = Writing(core, ask, sampler, core.cancellation(), is_read_by_base=True)
        return drafted_first(fusion, reading, writing.fits).plan.drafting is not None


def test_a_relay_drafts_once(folder) -> None:
    with Engine(folder, n_ctx=1024) as engine:
        answer = engine.generate(asked(engine), strategy=BY_HAND, grammar='root ::= "b"')
        assert answer.text() == "b"
        assert answer.draft is not None
        assert answer.draft.adapter == "math"
        assert len(answer.fusion.plan.steps) == 2


def test_no_draft_for_plain_text_or_behind_a_result(tmp_path, folder) -> None:
    sampling: dict[str, Any] = {"grammar": 'root ::= "b"', "max_tokens": 4}
    bound = {**sampling, "draft": True}
    with Engine(folder, n_ctx=1024) as engine:
        assert engine.generate("abc def", **bound).draft is None
    made = make_bundle(tmp_path / "tools", chat_template=QWEN, user_defined=("<tool_call>",))
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    said = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "8", "tool_call_id": "1"},
    ]
    with Engine(made.folder, n_ctx=512) as engine:
        ask = Ask(Chat(said), Weighing(drafts=True), Sampling(**sampling))
        assert engine.submit(ask).draft is None


def test_a_bound_answer_over_http_tells_its_draft(folder) -> None:
    with client_of(folder) as client:
        answer = client.post("/v1/chat/completions", json=BODY).json()
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), NUMBER)
        relay = answer["fusion"]["relay"]
        assert (relay["knower"], relay["writer"]) == ("math", "math")
        assert answer["usage"]["completion_tokens"] > relay["draft_tokens"] > 0
        told = [chunk.get("fusion", {}) for chunk in streamed(client, BODY)]
        pieces = [fusion["draft"] for fusion in told if "draft" in fusion]
        assert "".join(pieces) == relay["draft"]
        off = BODY | {"fusion": {"strategy": "single:math", "draft": False}}
        at_once = client.post("/v1/chat/completions", json=off).json()
        assert "relay" not in at_once["fusion"]
