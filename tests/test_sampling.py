"""Choosing tokens under a grammar, through the Engine."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from refusals import refused
from tiny import constant_logits, write_tiny_adapter, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.errors import BackendError, GrammarError

PROMPT = "the king is in the air"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("sampling")
    base = write_tiny_base(place / "base.gguf")
    adapters = {"a": write_tiny_adapter(place / "a.gguf", base).path}
    with Engine(base=base.path, adapters=adapters, n_ctx=256) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answer_follows_the_grammar_and_ends(engine, temperature) -> None:
    grammar = 'root ::= "[" ("ab" | "ñ你"){1,5} "]"'
    for seed in range(5):
        options = {"temperature": temperature, "top_p": 0.9, "seed": seed, "max_tokens": 100}
        answer = engine.generate(PROMPT, grammar=grammar, **options)
        assert re.fullmatch(r"\[(ab|ñ你){1,5}\]", answer.text())
        assert answer.finish_reason == "stop"
    # what the base would not say by itself
    assert not engine.generate(PROMPT, max_tokens=8).text().startswith("[")


def test_greedy_under_a_grammar_is_the_likeliest_allowed_token(engine) -> None:
    tokens = engine.tokenize(PROMPT)
    fusion = engine.weights(PROMPT)
    allowed = [engine.tokenize(char)[0] for char in "aeiou"]
    expected = ""
    for _ in range(6):
        logits = engine.logits(tokens, weights=fusion)
        best = max(allowed, key=lambda token: logits[token])
        tokens.append(best)
        expected += "aeiou"[allowed.index(best)]
    answer = engine.generate(PROMPT, grammar="root ::= [aeiou]{6}", weights=fusion)
    assert answer.text() == expected
    assert (answer.finish_reason, answer.n_completion) == ("stop", 6)


@pytest.mark.parametrize(
    ("grammar", "max_tokens", "is_whole"),
    [
        ('root ::= "ñ" [0-9]*', 1, False),  # half of a character
        ('root ::= "ñ" [0-9]*', 2, True),
        ('root ::= "ñ" [0-9] [0-9] [0-9]*', 4, True),  # more may follow, and need not
        ('root ::= "ñ" [0-9] "."', 3, False),
        ('root ::= "ñ" [0-9] "."', 4, True),
        ('root ::= "ñ" [0-9] "."', None, True),
        (None, 2, True),
    ],
)
def test_answer_is_whole_where_its_grammar_may_end(grammar, max_tokens, is_whole, engine) -> None:
    """Bytes and digits are tokens of their own in the tiny vocabulary."""
    answer = engine.generate(PROMPT, grammar=grammar, max_tokens=max_tokens or 60)
    answer.text()
    assert answer.finish_reason == ("length" if max_tokens else "stop")
    assert answer.is_whole == is_whole


@pytest.mark.parametrize("n_parallel", [1, 2])
@pytest.mark.parametrize("grammar", [None, "root ::= [A-Z]{8}"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_an_answer(
    tmp_path, temperature, grammar, n_parallel
) -> None:
    """Drawn from, they give any token, and stay in memory for the next answer."""
    base = write_tiny_base(tmp_path / "base.gguf", "qwen2", tied=False)
    replace = constant_logits(lambda token: 10.0 if token == "A" else -ord(token[0]))
    replace["token_embd.weight"] = dict(base.tensors)["token_embd.weight"].copy()
    replace["token_embd.weight"][base.tokens.index("A")] = np.nan
    path = write_tiny_base(tmp_path / "base.gguf", "qwen2", tied=False, replace=replace).path
    with Engine(base=path, n_parallel=n_parallel) as engine:
        answer = engine.generate("b", temperature=temperature, grammar=grammar, max_tokens=8)
        with pytest.raises(BackendError, match="The logits after the answer so far are NaN"):
            answer.text()
        assert engine.generate("c", max_tokens=1).text() == "A"


def test_grammar_that_no_token_can_follow_is_reported(engine) -> None:
    answer = engine.generate(PROMPT, grammar='root ::= "a" x\nx ::= x "b"')
    assert refused(BackendError, answer.text) == (
        "No token of the base's vocabulary can follow here under the grammar, expected at least "
        "one; allow other characters at this place of the grammar."
    )
    assert engine.generate(PROMPT, max_tokens=2).text()


def test_bad_grammar_is_refused_before_the_work(engine, monkeypatch) -> None:
    monkeypatch.setattr(engine._core.prober, "states", None)  # would fail
    asked = {"grammar": "root ::= (", "weights": "qa-flora"}
    reason = r"Expected ')' at line 2, 'root ::= (\n' ^ ''"
    told = refused(GrammarError, engine.generate, PROMPT, **asked)
    assert told == f"The grammar cannot be read: {reason}; correct it there."
    with pytest.raises(GrammarError, match="The JSON schema, at #: the keyword 'not'"):
        engine.generate(PROMPT, json_schema={"not": {}})
