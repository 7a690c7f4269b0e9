"""Decisions: Engine.decide and qaflora decide."""

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from bundles import qaflora
from refusals import refused

from qaflora_edge import Engine
from qaflora_edge.answering.decide import Decision
from qaflora_edge.errors import OptionError, PromptError

QUESTION = "the thing on a ring?"
CHOICES = ("yes", "a whole ring", "no")
LISTED = "{}\n\nAnswer with one of these, and with nothing else:\n- yes\n- a whole ring\n- no"


def expected(alone: Engine, weights: Any) -> Any:
    """By `score`: how much likelier each choice is after the question than after none."""
    end = alone._model._lib.llama_vocab_eot(alone._model.vocab)
    tokenize = partial(alone._model.tokenize, add_special=False, parse_special=False)
    texts = [tokenize(choice) for choice in CHOICES]
    mix = alone.weights(QUESTION, strategy=weights)  # by the question alone
    sums = []
    for question in (QUESTION, "N/A"):
        prompt = alone.chat_tokens([{"role": "user", "content": LISTED.format(question)}])
        sums.append([alone.score(prompt, [*text, end], weights=mix).sum() for text in texts])
    shares = np.exp(np.array(sums[0], float) - np.array(sums[1], float))
    return shares / shares.sum()


def test_probabilities_are_those_of_the_scores(alone) -> None:
    decision = alone.decide(QUESTION, CHOICES, compare=True)
    np.testing.assert_allclose(decision.probabilities, expected(alone, None), rtol=1e-5)
    assert decision.probabilities.sum() == pytest.approx(1)
    assert decision.choice == CHOICES[int(np.argmax(decision.probabilities))]
    assert list(decision.by_adapter) == ["base", "math", "es"]
    for name, found in decision.by_adapter.items():
        strategy = name if name == "base" else f"single:{name}"
        np.testing.assert_allclose(found, expected(alone, strategy), rtol=1e-5)


def test_one_strategy_and_messages(alone) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    found = alone.decide(messages, CHOICES, strategy="base")
    np.testing.assert_allclose(found.probabilities, expected(alone, "base"), rtol=1e-5)
    assert (found.fusion.strategy, found.by_adapter) == ("base", {})
    found = alone.decide(messages, CHOICES, strategy="relay")  # nothing is decoded
    assert (found.fusion.strategy, found.fusion.plan.drafting) == ("two-place", None)


def test_what_a_choice_means_is_listed_with_it(alone) -> None:
    plain = alone.decide(QUESTION, ["yes", "no"])
    told = alone.decide(QUESTION, {"yes": "the thing", "no": ""})
    assert told.choices == plain.choices
    assert told.n_prompt > plain.n_prompt
    assert alone.decide(QUESTION, ["only"]).probabilities.tolist() == [1]


TEXTS = "expected 1 to 255 texts, all different and none empty."


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], f"Option choices is [], {TEXTS}"),
        (["a", "b", "a"], f"Option choices is ['a', 'b', 'a'], {TEXTS}"),
        (["a", " "], f"Option choices is ['a', ' '], {TEXTS}"),
        ("ab", f"Option choices is 'ab', {TEXTS}"),
        (range(1000), f"Option choices is range(0, 1000), {TEXTS}"),
        (["a"] * 1000, TEXTS),
    ],
)
def test_wrong_choices_are_refused(alone, choices, message) -> None:
    assert refused(OptionError, alone.decide, QUESTION, choices).endswith(message)


@pytest.mark.parametrize("prompt", ["", [], [{"role": "assistant", "content": "a"}], 3])
def test_what_is_no_question_is_refused(alone, prompt) -> None:
    assert "expected a" in refused(PromptError, alone.decide, prompt, CHOICES)


def test_many_choices_are_scored_in_parts(alone) -> None:
    choices = [chr(ord("a") + n % 26) + chr(ord("a") + n // 26) for n in range(60)]
    assert len(alone.decide("q", choices).probabilities) == 60


def test_the_command_prints_what_the_engine_decides(calibrated, alone) -> None:
    args = [word for choice in CHOICES for word in ("--choice", choice)]
    decision = alone.decide(QUESTION, CHOICES)
    result = qaflora("decide", calibrated.folder, QUESTION, *args, "--json")
    shown = json.loads(result.stdout)
    assert shown["choice"] == decision.choice
    probabilities = list(shown["probabilities"].values())
    assert probabilities == sorted(probabilities, reverse=True)
    result = qaflora("decide", calibrated.folder, "--prompts", "-", *args, "--compare", stdin="a\n")
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["  base", "  math", "  es"]
    assert "   [math ×" in lines[0]


def test_choices_after_no_question_are_scored_once(alone, monkeypatch) -> None:
    first = alone.decide(QUESTION, ["ring", "no"], compare=True)
    n_scored: list[int] = []
    scorer = alone._core.scorer
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda items: n_scored.append(len(items)) or score(items))
    again = alone.decide(QUESTION, ["ring", "no"], compare=True)
    assert n_scored == [8]  # two choices under four mixes
    assert again.probabilities.tolist() == first.probabilities.tolist()


def test_of_equal_choices_the_first_counts(alone) -> None:
    fusion = alone.weights(QUESTION, strategy="base")
    assert Decision(("a", "b"), np.array([0.5, 0.5]), fusion, {}, 0, np.zeros((2, 2))).choice == "a"
