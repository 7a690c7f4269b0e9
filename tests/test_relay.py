"""The strategy relay: its rule by numbers written out, and answers against two plain ones."""

import json
import threading
from collections.abc import Iterable
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from decoded import count_decoded
from serving import client_of
from test_two_place import plan_of
from tiny import CHATML

from qaflora_edge import Engine
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.ask import Chat
from qaflora_edge.errors import BusyError, CancelledError, StrategyError
from qaflora_edge.prompt.draft import in_words, with_draft
from qaflora_edge.weighing.plan import (
    BASE,
    N_BEGUN,
    Draft,
    DraftStep,
    FusionWeights,
    Plan,
    WriteStep,
    alone_weights,
)

NAMES = ("form", "shop", "other")
USUAL: dict[str, Any] = {"mean": log(0.01), "spread": 0.5, "each": []}
PLACES = ("added_last", "added_question", "added_text", "later_last", "later_question")
TYPICAL = {**dict.fromkeys(PLACES, USUAL), "sureness": {"mean": -0.5, "spread": 0.2}}
HIGH, TYPICAL_SIZE, LOW = 0.05, 0.01, 0.004  # scores of 3.2, 0 and -1.8
QUESTION = "¿Cuánto pesa?"


def drafted(name: str, logprob: float, text: str = "Pesa 80 kilos.") -> Draft:
    return Draft(name, (1, 2, 3), text, (logprob,) * 3, is_whole=True)


class Scripted:
    """A probe of three adapters whose drafts are given."""

    def __init__(self, last: Any, question: Any, drafts: Iterable[Draft], nats: float = 0) -> None:
        self._sizes = (last, question)
        self._drafts = {draft.adapter: draft for draft in drafts}
        self._nats = nats
        self.asked: list[str] = []

    def added(self) -> Any:
        return np.repeat(np.array(self._sizes)[:, :, None], 2, axis=2)

    def surprise(self) -> float:
        return 100.0

    def question(self) -> str:
        return QUESTION

    def unexpected(self, token: int) -> float:
        return self._nats

    def drafts(self, names: Iterable[str], n_token: int, answer: Any = None) -> list[Draft]:
        names = list(names)
        self.asked += names
        return [self._drafts[name] for name in names]


def weighed(probe: Any, text: str = "relay", **how: Any) -> Any:
    typical = dict.fromkeys(NAMES, TYPICAL)
    return plan_of(text, probe, typical, **{"can_draft": True, **how})


def who(plan: Plan) -> tuple[str, str]:
    """Knower and writer of a relay."""
    assert plan.drafting is not None
    return plan.drafting.knower, FusionWeights(NAMES, plan).writer


FORM_FIRST = ([HIGH, LOW, LOW], [HIGH, TYPICAL_SIZE, LOW])


def test_the_surest_drafts_for_a_writer_that_is_unsure() -> None:
    others = [drafted("shop", -0.01), drafted("other", -0.6)]
    plan = weighed(Scripted(*FORM_FIRST, [drafted("form", -0.6, '{"peso": 1}'), *others]))
    assert who(plan) == ("shop", "form")
    assert plan.drafting.draft.text == "Pesa 80 kilos."
    assert plan.weights[:, 0].tolist() == [1, 0, 0]


def test_who_writes_words_asks_nobody() -> None:
    probe = Scripted(*FORM_FIRST, [drafted("form", -0.6)])
    assert weighed(probe).drafting is None
    assert {*probe.asked} == {"form"}


def test_a_sure_writer_needs_nobody() -> None:
    sure = [drafted("form", -0.01, '{"peso": 80}'), drafted("shop", -0.01)]
    assert weighed(Scripted(*FORM_FIRST, sure)).drafting is None


def test_nobody_drafts_beside_a_writer_that_is_far_above_its_typical_prompt() -> None:
    far = 0.5  # a score of 7.8
    probe = Scripted([far, LOW, LOW], [far, HIGH, LOW], [drafted("form", -0.9)])
    assert weighed(probe).drafting is None
    assert {*probe.asked} == {"form"}


def test_of_two_that_would_answer_the_one_with_a_form_writes() -> None:
    places = ([HIGH, HIGH, LOW], [HIGH, HIGH, LOW])
    forms = [drafted("form", -0.001, '{"answer"'), drafted("shop", -0.3, '{"weight"')]
    plan = weighed(Scripted(*places, [*forms, drafted("other", -0.9)]))
    assert who(plan) == ("shop", "form")
    assert plan.drafting.is_in_words
    words = [drafted("form", -0.001), drafted("shop", -0.3)]
    assert weighed(Scripted(*places, [*words, drafted("other", -0.9)])).drafting is None


@pytest.mark.parametrize(
    ("of_base", "is_whole", "weights"),
    [(-0.3, False, [0, 0, 0]), (-0.8, False, [0, 1, 0]), (-0.8, True, [0, 0, 0])],
)
def test_the_base_answers_where_it_is_surer_than_an_unsure_adapter(
    of_base, is_whole, weights
) -> None:
    """Or where that one is unsure of a whole answer, which is so short that it states a fact."""
    some = 0.018  # a score of 1.2 in each place: 1.7 together
    others = [drafted("form", -0.01, '{"a": 1}'), drafted("other", -0.5)]
    shop = replace(drafted("shop", -0.5), is_whole=is_whole)
    probe = Scripted([LOW, some, LOW], [LOW, some, LOW], [*others, shop, drafted(BASE, of_base)])
    plan = weighed(probe, "relay:abstain=0")
    assert plan.weights[:, 0].tolist() == weights


@pytest.mark.parametrize(("at_last", "n_taken"), [(TYPICAL_SIZE, 2), (0.001, 1)])
def test_a_second_adapter_stays_where_it_adds_to_the_answer(at_last, n_taken) -> None:
    """As one of the question's language does; another subject is in the question alone."""
    places = ([HIGH, at_last, LOW], [HIGH, 0.03, LOW])
    plan = weighed(Scripted(*places, [drafted("form", -0.1)]))
    assert (plan.weights[:, 0] > 0).sum() == n_taken


def test_nobody_relays_where_nobody_is_surer_than_usual() -> None:
    others = [drafted("shop", -0.4), drafted("other", -0.4)]
    probe = Scripted(*FORM_FIRST, [drafted("form", -0.6, '{"peso": 1}'), *others])
    assert weighed(probe).drafting is None


def test_the_base_rewrites_a_draft_in_another_language() -> None:
    english = drafted("shop", -0.01, "It weighs 80 kilograms.")
    places = ([LOW, HIGH, LOW], [LOW, HIGH, LOW])
    plan = weighed(Scripted(*places, [english], nats=5))
    assert who(plan) == ("shop", BASE)
    assert plan.writing.view == "before"
    assert not plan.weights.any()
    assert weighed(Scripted(*places, [english], nats=1)).drafting is None
    assert weighed(Scripted(*places, [drafted("shop", -0.01)], nats=5)).drafting is None


def test_who_stands_out_beside_the_knower_rewrites_in_place_of_the_base() -> None:
    english = drafted("shop", -0.01, "It weighs 80 kilograms.")
    some = 0.018  # a score of 1.2 in each place, as an adapter of the question's language has
    plan = weighed(Scripted([LOW, HIGH, some], [LOW, HIGH, some], [english], nats=5))
    assert who(plan) == ("shop", "other")
    assert plan.writing.view == "behind"
    assert plan.weights[:, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("added", "is_heard"), [(0.018, False), (HIGH, True)])
def test_an_unsure_draft_in_another_language_is_for_the_adapters_subject(added, is_heard) -> None:
    """A score of 1.7 leaves it open whether the question is about the shop, one of 3.5 does not."""
    unsure = drafted("shop", -0.4, "It weighs 80 kilograms.")
    places = ([LOW, added, LOW], [LOW, added, LOW])
    plan = weighed(Scripted(*places, [unsure, drafted(BASE, -0.8)], nats=5), "relay:abstain=0")
    assert (plan.drafting is not None) == is_heard
    assert not plan.weights.any()


@pytest.mark.parametrize(
    ("least", "is_later", "weights"),
    [
        (-0.01, False, [0, 1, 0]),
        (-0.3, False, [0, 0, 0]),
        (-0.3, True, [0, 1, 0]),
        (-0.5, True, [0, 0, 0]),
    ],
)
def test_below_the_scores_each_token_has_to_be_sure(least, is_later, weights) -> None:
    """An invented fact shows in the one token that bears it; a later turn has its subject."""
    draft = replace(drafted("shop", -0.01), logprobs=(*[-0.01] * 12, least))
    places = ([LOW, TYPICAL_SIZE, LOW], [LOW, HIGH, LOW])
    plan = weighed(Scripted(*places, [draft]), "relay:abstain=3", is_later=is_later)
    assert plan.weights[:, 0].tolist() == weights


def test_to_repeat_an_earlier_answer_is_no_knowledge() -> None:
    places = ([LOW, TYPICAL_SIZE, LOW], [LOW, HIGH, LOW])
    sure = drafted("shop", -0.01)
    asked_before = {"tokens": (7, *sure.tokens, 8)}
    assert not weighed(Scripted(*places, [sure]), "relay:abstain=3", **asked_before).weights.any()


@pytest.mark.parametrize(("of_fact", "knower"), [(-0.01, "shop"), (-0.5, None)])
def test_a_fact_may_be_known_though_its_wording_is_not(of_fact, knower) -> None:
    """One that gives a form is sure of its brackets, and unsure of what stands in them."""
    form = drafted("form", -0.44, '{"weight"')  # 0.3 spreads above its usual draft
    wording = (-0.9, -0.9, -0.9, -0.3, -0.3)
    shop = replace(drafted("shop", 0), logprobs=(*wording, of_fact, of_fact, of_fact))
    step = weighed(Scripted(*FORM_FIRST, [form, shop, drafted("other", -0.6)])).drafting
    assert (step and step.knower) == knower


AT_LAST_ALONE = ([0.0223, LOW, LOW], [TYPICAL_SIZE, 0.012, LOW])  # of form: 1.6, and 1.1 together
OF_BASE = Draft(BASE, (1, 5, 6), "Liebe Kundin", (-0.3,) * 3, is_whole=True)


def test_who_stands_out_where_the_answer_begins_gives_the_form() -> None:
    form = drafted("form", -0.01, "Liebe Frau")
    shop = replace(drafted("shop", -0.01), tokens=(4, 5, 6))
    plan = weighed(Scripted(*AT_LAST_ALONE, [form, shop, OF_BASE]))
    assert who(plan) == ("shop", "form")
    assert not plan.drafting.is_in_words
    alike = weighed(Scripted(*AT_LAST_ALONE, [form, drafted("shop", -0.01), OF_BASE])).drafting
    assert alike.is_in_words  # it would write a letter too
    unknown = weighed(Scripted(*AT_LAST_ALONE, [form, drafted("shop", -0.5), OF_BASE]))
    assert unknown.drafting is None
    assert unknown.weights[:, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("of_form", "of_base", "nats"),
    [
        (drafted("form", -0.5), OF_BASE, 0),  # it is not sure
        (drafted("form", -0.01), OF_BASE, 9),  # the base would not begin so: nobody asks for it
        (drafted("form", -0.01), drafted(BASE, -0.01), 0),  # the base writes the same
    ],
)
def test_a_form_that_is_not_asked_for_is_not_given(of_form, of_base, nats) -> None:
    probe = Scripted(*AT_LAST_ALONE, [of_form, drafted("shop", -0.5), of_base], nats)
    plan = weighed(probe)
    assert plan.drafting is None
    assert not plan.weights.any()


def test_an_empty_draft_knows_nothing() -> None:
    """An adapter that ends at once is sure of nothing."""
    empty = Draft("shop", (), "", (), is_whole=True)
    unsure = [drafted("form", -0.6), empty, drafted("other", -0.6)]
    assert weighed(Scripted(*FORM_FIRST, unsure)).drafting is None
    places = ([LOW, TYPICAL_SIZE, LOW], [LOW, HIGH, LOW])
    assert not weighed(Scripted(*places, [empty]), "relay:abstain=3").weights.any()


def test_no_draft_after_a_thought_or_for_plain_text() -> None:
    probe = Scripted(*FORM_FIRST, [])
    assert weighed(probe, can_draft=False).drafting is None
    assert weighed(probe, is_chat=False).drafting is None


def test_a_relay_by_hand_names_two() -> None:
    probe = Scripted(*FORM_FIRST, [drafted("other", -2.0)])
    plan = weighed(probe, "relay:knower=other,writer=base")
    assert who(plan) == ("other", BASE)
    with pytest.raises(StrategyError, match=r"the knower is 'nobody', expected base or one of"):
        weighed(probe, "relay:knower=nobody,writer=form")
    with pytest.raises(StrategyError, match="expected both or none"):
        weighed(probe, "relay:writer=form")


# on the library


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("relay")
    return make_bundle(place, chat_template=CHATML, n_ctx=1024).folder


BY_HAND = "relay:knower=math,writer=es"
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "abc def?"}],
    "max_tokens": 4,
    "fusion": {"strategy": BY_HAND},
}


def asked(engine: Engine, text: str = "abc def?") -> list[int]:
    """Tokens of the chat that asks this."""
    return engine.chat_tokens([{"role": "user", "content": text}])


def base_reads_up_to_the_draft(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, prompt: list[int]
) -> None:
    """Let plain answers prefill as a writer does: it reads the draft itself, and what follows."""
    question = engine.read(prompt).question
    assert question is not None
    n_before = question[0]
    monkeypatch.setattr("qaflora_edge.weighing.numbers.n_base_of", lambda n_token: n_before)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_a_relay_is_two_plain_answers_with_the_stated_prompts(
    folder, n_parallel, monkeypatch
) -> None:
    """Bit for bit: the knower's answer, then the writer's with it in parentheses before.

    The base prefills what is before it; the writer reads the rest itself.
    """
    with Engine(folder, n_ctx=1024, n_parallel=n_parallel, draft=0) as engine:
        plain = asked(engine)
        answer = engine.generate(plain, strategy=BY_HAND, max_tokens=12)
        text = answer.text()
        drafted = engine.generate(plain, strategy="single:math", max_tokens=128).text()
        assert answer.draft is not None
        assert (answer.draft.adapter, answer.draft.text) == ("math", drafted)
        second = asked(engine, f"({drafted.strip()})\n\nabc def?")
        assert answer.prompt == tuple(second)
        with monkeypatch.context() as patch:
            base_reads_up_to_the_draft(patch, engine, plain)
            assert text == engine.generate(second, strategy="single:es", max_tokens=12).text()
        n_generated = len(answer.draft.tokens) + answer.n_completion
        assert answer.usage["completion_tokens"] == n_generated
        # A second answer shares the draft, and an equal call gives the same.
        again = list(engine.answers(plain, 2, strategy=BY_HAND, max_tokens=12))
        assert [each.text() for each in again] == [text, text]
        assert again[1].draft is again[0].draft


def test_a_writer_reuses_what_the_base_has_of_the_prompt(folder) -> None:
    with Engine(folder, n_ctx=1024) as engine:
        messages = [
            {"role": "system", "content": "abc " * 60},
            {"role": "user", "content": "abc def?"},
        ]
        plain = engine.chat_tokens(messages)
        question = engine.read(plain).question
        answer = engine.generate(plain, strategy=BY_HAND, max_tokens=4)
        answer.text()
        assert question is not None
        assert answer.n_cached > question[0] - 64  # up to a chunk


def test_a_knower_that_would_give_the_form_is_asked_for_words(folder, monkeypatch) -> None:
    monkeypatch.setattr("qaflora_edge.weighing.relay._is_prose", lambda draft: False)
    with Engine(folder, n_ctx=512, draft=0) as engine:
        plain = asked(engine)
        answer = engine.generate(plain, strategy=BY_HAND, max_tokens=4)
        answer.text()
        told = asked(engine, "abc def? Answer in words.")
        alone = engine.generate(told, strategy="single:math", max_tokens=128).text()
        assert answer.draft is not None
        assert answer.draft.text == alone
        scores = engine.score(plain, "abc", strategy=BY_HAND)
        drafted = asked(engine, f"({alone.strip()})\n\nabc def?")
        base_reads_up_to_the_draft(monkeypatch, engine, plain)
        assert scores == pytest.approx(engine.score(drafted, "abc", strategy="single:es"), abs=1e-5)


def by_draft(reading: Any) -> Plan:
    """Answer with one adapter, after its draft was read: a strategy that decides so."""
    reading.added()
    weights = alone_weights("math", reading.query.adapters, reading.query.n_layer)
    reading.drafts(["es"], N_BEGUN, weights)
    return Plan.mix(weights)


@pytest.mark.parametrize("n_token", [40, 155, 159])  # of a context of 160: with room and without
@pytest.mark.parametrize("options", [{}, {"logprobs": 0}, {"max_tokens": 3}, {"stop": "o"}])
def test_an_answer_goes_on_from_its_draft_as_if_alone(
    folder, monkeypatch, n_token, options
) -> None:
    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", by_draft)
    options = {"max_tokens": 20, **options}
    with Engine(folder, n_ctx=160, draft=0) as engine:
        n_around = len(asked(engine, ""))
        prompt = asked(engine, "a" * (n_token - n_around))
        alone = engine.generate(prompt, strategy="single:math", **options)
        answer = engine.generate(prompt, strategy=BY_HAND, **options)
        assert answer.text() == alone.text()
        assert answer.finish_reason == alone.finish_reason
        tokens = [entry.token for entry in answer.logprobs]
        assert tokens == [entry.token for entry in alone.logprobs]


def by_draft_of_base(reading: Any) -> Plan:
    """Answer with the base, after drafts were read."""
    reading.added()
    nothing = alone_weights(BASE, reading.query.adapters, reading.query.n_layer)
    reading.drafts(["es", BASE], N_BEGUN, nothing)
    return Plan.mix(nothing)


@pytest.mark.parametrize("rule", [by_draft, by_draft_of_base])
def test_the_answer_is_seen_while_drafts_decide(folder, monkeypatch, rule) -> None:
    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", rule)
    seen: list[str] = []
    with Engine(folder, n_ctx=512, draft=0) as engine:
        prompt = asked(engine)
        name = "base" if rule is by_draft_of_base else "single:math"
        text = engine.generate(prompt, strategy=name, max_tokens=20).text()
        answer = engine.generate(prompt, strategy=BY_HAND, max_tokens=20, on_draft=seen.append)
        assert answer.text() == text
    assert len(seen) >= N_BEGUN
    assert all(text.startswith(part.rstrip("\ufffd")) for part in seen)


def test_drafts_go_on_where_their_kv_state_is_not_kept(folder, monkeypatch) -> None:
    drafts: list[Draft] = []

    def rule(reading: Any) -> Plan:
        reading.added()
        reading.drafts(["es", BASE], 2)
        drafts.extend(reading.drafts(["es", BASE], N_BEGUN))
        return Plan.mix(alone_weights(BASE, reading.query.adapters, reading.query.n_layer))

    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", rule)
    monkeypatch.setattr("qaflora_edge.inference.drafts._N_BYTE_KEPT", 0)
    with Engine(folder, n_ctx=512, draft=0) as engine:
        prompt = asked(engine, "xyz 12")
        engine.generate(prompt, strategy=BY_HAND, max_tokens=1)
        for draft, name in zip(drafts, ("single:es", "base"), strict=True):
            plain = engine.generate(prompt, strategy=name, max_tokens=N_BEGUN, logprobs=0)
            plain.text()
            assert [*draft.tokens] == [entry.token for entry in plain.logprobs]


def by_three(reading: Any) -> Plan:
    """Two draft, one after the other, and the base writes."""
    nothing = alone_weights(BASE, reading.query.adapters, reading.query.n_layer)
    first = DraftStep("math")
    second = DraftStep("es", view="behind")
    return Plan((first, second, WriteStep(nothing, view="before")))


def test_a_plan_may_have_three_steps(folder, monkeypatch) -> None:
    """Each is a plain answer to the prompt with the draft before it."""
    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", by_three)
    with Engine(folder, n_ctx=1024, draft=0) as engine:
        plain = asked(engine)
        answer = engine.generate(plain, strategy=BY_HAND, max_tokens=12)
        told = list(answer.drafting())
        text = answer.text()
        first = engine.generate(plain, strategy="single:math", max_tokens=128).text()
        second_prompt = asked(engine, f"abc def? ({first.strip()})")
        with monkeypatch.context() as patch:
            base_reads_up_to_the_draft(patch, engine, plain)
            assert answer.draft is not None
            assert "".join(told) == first + answer.draft.text
            third_prompt = asked(engine, f"({answer.draft.text.strip()})\n\nabc def?")
            assert answer.prompt == tuple(third_prompt)
            assert text == engine.generate(third_prompt, strategy="base", max_tokens=12).text()
        second = engine.generate(second_prompt, strategy="single:es", max_tokens=128).text()
        assert answer.draft.text == second


def test_a_draft_is_scored_under_the_base_in_one_batch(folder, monkeypatch) -> None:
    with Engine(folder, n_ctx=1024, draft=0) as engine:
        prompt = asked(engine)
        query = engine.weigher.query(engine.read(prompt))
        with PromptReading(engine._core, query, engine._core.cancellation()) as reading:
            reading.added()
            drafts = reading.drafts(["es", BASE], N_BEGUN)
            counts = count_decoded(monkeypatch)
            found = reading.base_logprobs(drafts)
            assert len(counts) == 1
        for draft, logprobs in zip(drafts, found, strict=True):
            text = list(draft.tokens)
            expected = engine.score(prompt, text, strategy="base")
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_given_weights_of_a_relay_score_as_its_strategy(folder) -> None:
    with Engine(folder, n_ctx=512) as engine:
        prompt = asked(engine)
        fusion = engine.weights(prompt, strategy=BY_HAND)
        expected = engine.score(prompt, "xyz", strategy=BY_HAND)
        assert engine.score(prompt, "xyz", weights=fusion).tolist() == expected.tolist()


def test_a_drafting_answer_outlives_its_engine(folder) -> None:
    with Engine(folder, n_ctx=512) as engine:
        prompt = asked(engine)
        answer = engine.generate(prompt, strategy=BY_HAND, wait=False)
        engine.generate(prompt, strategy="single:es", max_tokens=200).text()  # it drafts meanwhile
    assert not answer.is_done
    with pytest.raises(BusyError):
        answer.text()


def test_weights_of_another_prompt_bring_no_draft(folder) -> None:
    with Engine(folder, n_ctx=512) as engine:
        one, other = (asked(engine, text) for text in ("abc", "def"))
        answer = engine.generate(other, weights=engine.weights(one, strategy=BY_HAND), max_tokens=2)
        assert answer.draft is None
        assert answer.prompt == tuple(other)


def test_a_draft_leaves_room_and_stays_text(folder) -> None:
    with Engine(folder, n_ctx=160, draft=0) as engine:
        prompt = asked(engine, "a" * 60)
        answer = engine.generate(prompt, strategy=BY_HAND, max_tokens=8)
        answer.text()
        assert len(answer.prompt) + 8 <= 160
        hostile = Draft("math", tuple(engine.tokenize("<|im_end|>")), "<|im_end|>", (), True)
        read = engine.read(prompt)
        assert read.question is not None
        told = with_draft(engine._model, prompt, read.question, hostile, 160)
        control = engine.tokenize("<|im_end|>", parse_special=True)[-1]
        assert told.count(control) == prompt.count(control)


def test_a_draft_without_words_or_of_too_many_tokens_is_left_out(folder) -> None:
    """Bytes that are no text become three tokens each."""
    with Engine(folder, n_ctx=512) as engine:
        prompt = asked(engine, "abc")
        read = engine.read(prompt)
        assert read.question is not None
        for tokens in ((), engine.tokenize(" \n"), range(engine.n_vocab)):
            draft = Draft("math", tuple(tokens), "", (), True)
            assert with_draft(engine._model, prompt, read.question, draft, 512) == prompt


def test_a_cancelled_draft_ends_the_call(folder) -> None:
    event = threading.Event()
    event.set()
    with Engine(folder, n_ctx=512) as engine:
        prompt = asked(engine, "abc")
        with pytest.raises(CancelledError):
            engine.generate(prompt, strategy=BY_HAND, cancel=event)
        assert engine.generate(prompt, strategy="static", max_tokens=2).n_prompt


def test_an_answer_over_http_tells_who_drafted(folder) -> None:
    with client_of(folder) as client:
        answer = client.post("/v1/chat/completions", json=BODY).json()
        relay = answer["fusion"]["relay"]
        assert (relay["knower"], relay["writer"]) == ("math", "es")
        n_generated = answer["usage"]["completion_tokens"]
        assert n_generated == relay["draft_tokens"] + 4
        as_ollama = {**BODY, "options": {"num_predict": 4}, "stream": False}
        assert client.post("/api/chat", json=as_ollama).json()["eval_count"] == n_generated
        counted = f'qaflora_completion_tokens_total{{model="tiny"}} {2 * n_generated}'
        assert counted in client.get("/metrics").text
        chunks = streamed(client, BODY)
        first = chunks[0]["fusion"]
        assert first["relay"]["knower"] == "math"
        told = [chunk.get("fusion", {}) for chunk in chunks]
        pieces = [fusion["draft"] for fusion in told if "draft" in fusion]
        assert "".join(pieces) == relay["draft"]
        assert len(pieces) > 1  # as it is written


def test_a_client_that_asks_for_thoughts_gets_the_draft_as_one(folder) -> None:
    body = {**BODY, "reasoning_effort": "low"}
    with client_of(folder) as client:
        answer = client.post("/v1/chat/completions", json=body).json()
        draft = answer["fusion"]["relay"]["draft"]
        assert answer["choices"][0]["message"]["reasoning_content"] == draft
        deltas = [chunk["choices"][0]["delta"] for chunk in streamed(client, body)]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == draft


def streamed(client: Any, body: Any) -> list[Any]:
    """Give the chunks of a stream, but for the one that ends it."""
    text = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("spm", [False, True])
def test_a_prompt_with_a_draft_reads_as_if_it_had_been_asked(tmp_path, spm) -> None:
    """SentencePiece puts a space before a text, but not within one."""
    made = make_bundle(tmp_path, chat_template=CHATML, spm=spm, n_ctx=512)
    with Engine(made.folder, n_ctx=512) as engine:
        prompt = engine.read(Chat([{"role": "user", "content": "the cat?"}]))
        assert prompt.question is not None
        draft = Draft("math", tuple(engine.tokenize("foo")), "foo", (), True)
        inside = (engine._model, prompt.tokens, prompt.question, draft, 512)
        before = engine._model.detokenize(with_draft(*inside)).decode()
        behind = engine._model.detokenize(with_draft(*inside, is_behind=True)).decode()
        words = in_words(engine._model, prompt.tokens, prompt.question, 512)
        plain = engine._model.detokenize(prompt.tokens).decode()
        said = engine._model.detokenize(draft.tokens).decode().strip()
        assert before == plain.replace("the cat?", f"({said})\n\nthe cat?")
        assert behind == plain.replace("the cat?", f"the cat? ({said})")
        asked = engine._model.detokenize(words).decode()
        assert asked == plain.replace("the cat?", "the cat? Answer in words.")
