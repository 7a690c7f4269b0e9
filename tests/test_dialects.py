"""Dialects without a server: bodies become an Ask, and a generation events."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tiny import USER

from qaflora_edge.ask import Ask, Chat, Sampling, Weighing
from qaflora_edge.dialects import ollama, openai_chat, openai_responses, texts
from qaflora_edge.dialects.dialect import Reply
from qaflora_edge.dialects.options import Weighed, read_body, weighing_of
from qaflora_edge.errors import OptionError
from qaflora_edge.inference.sequence import Timings

DEFAULTS = Ask((), Weighing("static"), Sampling(temperature=0.5, seed=3))


class Spoken(SimpleNamespace):
    """A generation that has ended."""

    calls = draft = fusion = None
    timings = Timings()
    usage: ClassVar = {"completion_tokens": 2}
    wants_logprobs, finish_reason, reasoning = False, "stop", ""
    n_prompt = n_cached = n_completion = n_draft = n_thought = 2

    def __iter__(self) -> Any:
        return iter(("Yes", "."))

    def drafting(self) -> Any:
        return iter(())

    def thoughts(self) -> Any:
        return iter(("Hm",))


def test_one_question_is_one_ask_in_every_dialect() -> None:
    expected = Ask(Chat(USER), Weighing("static"), Sampling(9, 0.5, seed=3))
    chat = openai_chat.ChatBody(messages=USER, max_tokens=9)
    assert openai_chat.asks(chat, DEFAULTS) == [expected]
    response = openai_responses.ResponsesBody(input="the thing?", max_output_tokens=9)
    assert openai_responses.asks(response, DEFAULTS) == [expected]
    theirs = ollama.OllamaChatBody(model="", messages=USER, options={"num_predict": 9})
    assert ollama.chat_asks(theirs, DEFAULTS) == [expected]


def test_texts_are_taken_as_they_are() -> None:
    for ask in (
        *texts.asks(texts.TextBody(prompt=["a", [5]]), DEFAULTS),
        *texts.completion_asks(texts.CompletionBody(prompt="a", n_predict=16), DEFAULTS),
    ):
        assert (ask.parse_special, ask.sampling.max_tokens, ask.sampling.seed) == (True, 16, 3)


def test_an_answer_in_every_dialect() -> None:
    answer: Any = Spoken()
    deltas = [choice["delta"] for choice in openai_chat.SHAPE.choices(answer)]
    told = {"reasoning_content": "Hm"}, {"content": "Yes"}, {"content": "."}
    assert deltas == [{"role": "assistant"}, *told, {}]
    facts = {"start_s": 0.0, "wait_ms": 0.0}
    reply = Reply(ollama.OllamaTextBody(model="tiny"), "tiny", [DEFAULTS], facts=facts)
    lines = ollama.GENERATE.pieces(reply, iter([answer]))
    assert [line["response"] for line in lines] == ["", "Yes", ".", ""]
    reply = Reply(texts.CompletionBody(prompt="a"), "tiny", [DEFAULTS])
    events = texts.COMPLETION.pieces(reply, iter([answer]))
    assert [event["content"] for event in events] == ["Yes", ".", ""]
    assert texts.COMPLETION.whole(reply, iter([answer]))["content"] == "Yes."


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"fusion": {"strategy": "manual:math=1e30"}}, "fusion.strategy"),
        ({"fusion": {"weights": [[True]]}}, "fusion.weights"),
        ({"fusion": {"weights": {"es": 1e3}}}, "fusion.weights"),
        ({"fusion": {"weights": {"es": 1}, "strategy": "base"}}, "fusion.weights"),
        ({"lora": [{"id": 2, "scale": 1.0}]}, "lora"),
        ({"lora": [{"id": 0, "scale": 1.0}], "fusion": {"weights": {"es": 1}}}, "lora"),
    ],
)
def test_weights_that_contradict_or_are_too_large_are_refused(body, field) -> None:
    with pytest.raises(OptionError, match=f"^The field {field} is ") as caught:
        weighing_of(read_body(Weighed, body), None, ("math", "es"))
    assert caught.value.option == field
