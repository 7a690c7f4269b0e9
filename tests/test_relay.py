"""The strategy relay: its rule by numbers written out, and answers against two plain ones."""

import json
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import exp, log
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
from qaflora_edge.answering.answer import in_words, with_draft
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.ask import Chat
from qaflora_edge.dialects.dialect import Extras
from qaflora_edge.errors import BusyError, CancelledError, StrategyError
from qaflora_edge.inference.sequence import Request
from qaflora_edge.show import doubts
from qaflora_edge.weighing.known import (
    log_odds,
    probability,
    recognised,
    sureness,
    told_probability,
)
from qaflora_edge.weighing.plan import (
    BASE,
    Draft,
    DraftStep,
    FusionWeights,
    Plan,
    WriteStep,
    alone_weights,
)
from qaflora_edge.weighing.strategy import Closeness

N_DRAFT = 8
NAMES = ("form", "shop", "other")
USUAL: dict[str, Any] = {"mean": log(0.01), "spread": 0.5, "each": []}
PLACES = ("added_last", "added_question", "added_text", "later_last", "later_question")
SPEAKS = {"mean": -1.0, "spread": 1.0}
TYPICAL = {**dict.fromkeys(PLACES, USUAL), "opening": SPEAKS, "sureness": SPEAKS}
HIGH, TYPICAL_SIZE, LOW = 0.05, 0.01, 0.004  # scores of 3.2, 0 and -1.8
UNHEARD_OF = -8.0  # nats of a token under the base


@dataclass(frozen=True)
class Told:
    """A draft, and what the base thinks of its tokens."""

    draft: Draft
    by_base: tuple[float, ...]


def told(
    name: str, logprob: float, whole: bool = True, *, by_base: float = UNHEARD_OF, first: float = -1
) -> Told:
    """Let each token but the first have these log-probabilities; the base begins so or not."""
    draft = Draft(name, (1, 2, 3, 4), "It weighs 80.", (logprob,) * 4, whole)
    return Told(draft, (first, by_base, by_base, by_base))


class Scripted:
    """A reading of three adapters, whose drafts are given."""

    def __init__(
        self,
        last: Any,
        question: Any,
        drafts: Iterable[Told] = (),
        nats: float = 80.0,
        earlier: tuple[float, Any] = (0.0, None),
        goes_on: float = 9.0,
        expected: Mapping[str, float] = {},  # log p of each of the question's tokens
    ) -> None:
        self._sizes = (last, question)
        self._told = {told.draft.adapter: told for told in drafts}
        self._nats = nats
        self._earlier = earlier
        self._goes_on = goes_on
        self._expected = expected
        self.taught: dict[str, Closeness] = {}
        self.asked: list[str] = []
        self.is_compared = False  # with the same question asked first

    def close(self) -> dict[str, Closeness]:
        return self.taught

    def added(self) -> Any:
        return np.repeat(np.array(self._sizes)[:, :, None], 2, axis=2)

    def surprise(self) -> float:
        return self._nats

    def goes_on(self) -> float:
        self.is_compared = True
        return self._goes_on

    def earlier(self) -> tuple[float, Any]:
        nats, added = self._earlier
        return nats, np.repeat(np.array([added])[:, :, None], 2, axis=2)

    def question(self) -> str:
        return "Was kostet Torf?"

    def expected(self, names: Iterable[str], goes_on: bool) -> list[tuple[float, ...]]:
        return [(self._expected.get(name, -4.0),) * 3 for name in names]

    def drafts(self, names: Iterable[str], n_token: int, answer: Any = None) -> list[Draft]:
        names = list(names)
        self.asked += names
        unsure = {name: told(name, -3.0) for name in names}
        return [{**unsure, **self._told}[name].draft for name in names]

    def base_logprobs(self, drafts: Iterable[Draft]) -> list[tuple[float, ...]]:
        return [
            self._told[draft.adapter].by_base if draft.adapter in self._told else (-1.0,) * 4
            for draft in drafts
        ]


def weighed(reading: Any, text: str = "relay", typical: Any = None, **how: Any) -> Any:
    typical = typical or dict.fromkeys(NAMES, TYPICAL)
    return plan_of(text, reading, typical, **{"can_draft": True, **how})


def who(plan: Plan) -> tuple[str, str]:
    """Knower and writer of a relay."""
    assert plan.drafting is not None
    return plan.drafting.knower, FusionWeights(NAMES, plan).writer


FORM_FIRST = ([HIGH, LOW, LOW], [TYPICAL_SIZE, TYPICAL_SIZE, LOW])  # it stands out at the end
NOBODY = ([LOW, LOW, LOW], [LOW, LOW, LOW])


@pytest.mark.parametrize(
    ("logprobs", "of_base", "expected"),
    [
        ([-0.1, -0.5], [-1.0, -4.0], (1 * -0.1 + 4 * -0.5) / 5.5),
        ([-0.1, -0.5], [-1.0, -90.0], (1 * -0.1 + 6 * -0.5) / 7.5),
        ([], [], 0.0),
    ],
)
def test_sureness_is_a_mean_weighted_by_the_bases_surprise(logprobs, of_base, expected) -> None:
    assert sureness(logprobs, of_base) == pytest.approx(expected)


def test_a_probability_is_that_of_a_logistic_regression() -> None:
    odds = -8.7 + 9.2 * -0.1 + 2.4 * log(60)
    assert log_odds(-0.1, 60.0) == pytest.approx(odds)
    assert probability(odds) == pytest.approx(1 / (1 + exp(-odds)))


def test_what_is_told_is_a_logistic_regression_of_that() -> None:
    assert told_probability(0.9, 0.5) == pytest.approx(probability(1.2972246))  # ln 9 + .6 - 1.5


@pytest.mark.parametrize(("sure", "mark"), [(None, []), (0.49, ["may be made up"])])
def test_an_answer_of_which_nobody_is_sure_is_marked(sure, mark) -> None:
    plan = replace(Plan.mix(np.ones((1, 2))), sure=sure)
    fusion = FusionWeights(("shop",), plan)
    assert doubts(fusion) == mark
    assert Extras().mix(fusion)["fusion"].get("sure") == sure


def test_who_knows_drafts_for_who_gives_the_form() -> None:
    plan = weighed(Scripted(*FORM_FIRST, [told("shop", -0.01), told("form", -0.6)]))
    assert who(plan) == ("shop", "form")
    assert plan.writing.view == "before"
    assert plan.weights[:, 0].tolist() == [1, 0, 0]
    sure = sureness((-0.01,) * 4, (-1, -8, -8, -8))
    assert plan.known["shop"] == pytest.approx(probability(log_odds(sure, 80)))
    assert plan.sure == pytest.approx(told_probability(plan.known["shop"], 0.0))


def test_examples_decide_where_nobody_claims_to_know() -> None:
    reading = Scripted(*NOBODY)
    assert not weighed(reading).weights.any()
    reading.taught = {"other": Closeness(0.6, 0.4, 3)}
    plan = weighed(reading)
    assert plan.weights[:, 0].tolist() == [0, 0, 1]
    assert "the 3 example questions" in plan.because
    reading.taught = {"other": Closeness(0.6, 0.1, 3), "shop": Closeness(0.5, -0.1, 3)}
    assert not weighed(reading).weights.any()  # two are as close
    # A draft that claims to know comes before a question that is close to another's.
    surely = Scripted(*FORM_FIRST, [told("shop", -0.01), told("form", -0.6)])
    surely.taught = {"other": Closeness(0.6, 0.4, 3)}
    assert who(weighed(surely)) == ("shop", "form")
    surely.taught = {"base": Closeness(0.6, 0.4, 3)}
    asked = len(surely.asked)
    plan = weighed(surely)
    assert not plan.weights.any()
    assert len(surely.asked) == asked  # nobody drafts


def test_closeness_raises_how_probably_a_draft_is_right() -> None:
    reading = Scripted(*FORM_FIRST, [told("shop", -0.2), told("form", -0.6)])
    before = weighed(reading).known["shop"]
    reading.taught = {"shop": Closeness(0.2, 0.1, 3)}
    odds = [log(known / (1 - known)) for known in (before, weighed(reading).known["shop"])]
    assert odds[1] - odds[0] == pytest.approx(0.8)


def test_a_form_that_knows_itself_writes_alone() -> None:
    drafts = [told("shop", -0.2), told("form", -0.001)]
    plan = weighed(Scripted(*FORM_FIRST, drafts))
    assert plan.drafting is None
    assert plan.weights[:, 0].tolist() == [1, 0, 0]
    in_question = [LOW, TYPICAL_SIZE, LOW]
    assert who(weighed(Scripted(FORM_FIRST[0], in_question, drafts))) == ("shop", "form")


def test_a_knower_that_would_give_the_form_is_asked_for_words() -> None:
    alike = [told("shop", -0.01), told("form", -0.6)]
    assert weighed(Scripted(*FORM_FIRST, alike)).drafting.is_in_words
    other = replace(alike[1], draft=replace(alike[1].draft, tokens=(9, 2, 3, 4)))
    assert not weighed(Scripted(*FORM_FIRST, [alike[0], other])).drafting.is_in_words


def test_the_base_writes_where_it_would_begin_in_another_language() -> None:
    plan = weighed(Scripted(*NOBODY, [told("shop", -0.01, first=-5.0)]))
    assert who(plan) == ("shop", BASE)
    assert not plan.weights.any()


def test_a_name_of_the_question_is_no_language() -> None:
    """The second token is a word of the question too, the third one is the answer's first."""
    for third, knows_its_language in ((-1.0, True), (-8.0, False)):
        by_base = (-5.0, -8.0, third, -8.0)
        named = Draft("shop", (1, 2, 3, 4), "Torf kostet 80.", (-0.01,) * 4, is_whole=True)
        reading = Scripted(*NOBODY, [Told(named, by_base)])
        plan = weighed(reading, tokens=(7, 2, 8), question=(0, 3))
        assert (plan.drafting is None) == knows_its_language


@pytest.mark.parametrize(
    "told_by_shop",
    [
        told("shop", -0.6),  # it makes up what the base would not say
        told("shop", -0.01, by_base=-0.1, first=-0.1),  # the base says so too
    ],
)
def test_nobody_is_taken_who_does_not_know(told_by_shop) -> None:
    plan = weighed(Scripted(*NOBODY, [told_by_shop]))
    assert not plan.weights.any()
    assert plan.sure is None


def test_a_question_that_the_base_expects_is_drafted_by_nobody() -> None:
    reading = Scripted(*NOBODY, nats=5.0)
    weighed(reading)
    assert reading.asked == []


def test_a_turn_that_goes_on_is_about_what_was_asked_before() -> None:
    """Nothing stands out in it, nor surprises; the shop stood out in the question before it."""
    of_shop = [LOW, HIGH, LOW]
    for earlier, goes_on, is_compared, knows in (
        ((80.0, of_shop), 9.0, True, 1),
        ((10.0, of_shop), 9.0, False, 0),  # nobody could know that either
        ((80.0, of_shop), -1.0, True, 0),  # it changes the subject
    ):
        drafts = [told("shop", -0.01)]
        reading = Scripted(*NOBODY, drafts, 5.0, earlier, goes_on)
        plan = weighed(reading, "relay:abstain=16", is_later=True)
        assert plan.weights[1, 0] == knows
        assert reading.is_compared == is_compared


@pytest.mark.parametrize(("by_base", "tokens"), [(-0.9, ()), (UNHEARD_OF, (1, 2, 3))])
def test_who_begins_as_the_base_or_the_question_does_gives_no_form(by_base, tokens) -> None:
    drafts = [told("shop", -0.01), told("form", -0.6, by_base=by_base)]
    plan = weighed(Scripted(*FORM_FIRST, drafts), tokens=tokens, question=(0, 3))
    assert plan.drafting is None
    assert plan.weights[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("size", "now", "form"), [(HIGH, -4.0, True), (HIGH, -10.0, False), (0.03, -4.0, False)]
)
def test_who_gives_all_its_form_gives_it_where_the_base_is_less_surprised(size, now, form) -> None:
    """It may stand out in the question too, if it does so far enough."""
    typical = dict.fromkeys(NAMES, TYPICAL)
    typical["form"] = {**TYPICAL, "opening": {**SPEAKS, "mean": -10.0}}
    drafts = [told("shop", -0.01), told("form", -0.6, first=now)]
    plan = weighed(Scripted([size, LOW, LOW], [size, 0.03, LOW], drafts), typical=typical)
    assert (plan.drafting is not None) == form


@pytest.mark.parametrize(("of_form", "is_asked_for"), [(-4.0, True), (-5.0, False)])
def test_a_form_is_asked_for_where_the_base_nearly_expects_it(of_form, is_asked_for) -> None:
    """It may begin more oddly than the knower's words, by less than 3.5 nats."""
    drafts = [told("shop", -0.01, first=-1.0), told("form", -0.6, first=of_form)]
    plan = weighed(Scripted(*FORM_FIRST, drafts))
    assert (plan.drafting is not None) == is_asked_for
    assert plan.weights[:, 0].tolist() == ([1, 0, 0] if is_asked_for else [0, 1, 0])


@pytest.mark.parametrize(
    ("by_base", "is_whole", "of_first", "weight"),
    [
        (UNHEARD_OF, True, HIGH, 0),
        (UNHEARD_OF, False, HIGH, 0.5),
        (-0.1, True, HIGH, 0.5),
        (UNHEARD_OF, True, 0.03, 0.5),
    ],
)
def test_a_second_adapter_that_would_state_a_fact_is_left_out(
    by_base, is_whole, of_first, weight
) -> None:
    """A language says what the base would; who reasons comes to no end; a subject may stay."""
    drafts = [
        told("shop", -2.0, whole=is_whole, by_base=by_base),
        told("form", -0.6, first=-4.0),
    ]
    plan = weighed(Scripted([HIGH, LOW, LOW], [of_first, HIGH, LOW], drafts))
    assert plan.weights[:, 0].tolist() == [1, weight, 0]
    assert (plan.why["shop"].taken_as == "question") == bool(weight)
    assert ("shop is left out: it would say something else." in plan.because) != bool(weight)


@pytest.mark.parametrize(("usual", "gives_form"), [(-3.0, True), (-4.0, False)])
def test_a_habit_is_no_form(usual, gives_form) -> None:
    """A knower that was taught in one language often begins in it, though the base would not."""
    typical = dict.fromkeys(NAMES, TYPICAL)
    typical["form"] = {**TYPICAL, "opening": {**SPEAKS, "mean": usual}}
    drafts = [told("shop", -0.01), told("form", -0.6, first=-4.0)]
    plan = weighed(Scripted(*FORM_FIRST, drafts), typical=typical)
    assert (plan.drafting is not None) == gives_form


def test_a_form_is_no_other_language() -> None:
    typical = dict.fromkeys(NAMES, TYPICAL)
    typical["shop"] = {**TYPICAL, "opening": {"mean": -10.0, "spread": 3.0}}
    first = ([LOW, TYPICAL_SIZE, LOW], [LOW, HIGH, LOW])  # two-place takes it
    plan = weighed(Scripted(*first, [told("shop", -0.01, first=-5.0)]), typical=typical)
    assert plan.drafting is None
    assert plan.weights[:, 0].tolist() == [0, 1, 0]


def test_of_two_forms_the_one_is_given_that_stands_out_more() -> None:
    places = ([0.03, LOW, HIGH], [TYPICAL_SIZE, TYPICAL_SIZE, TYPICAL_SIZE])
    drafts = [told("shop", -0.01), told("form", -0.6), told("other", -0.6)]
    assert who(weighed(Scripted(*places, drafts))) == ("shop", "other")


def test_of_two_that_know_the_one_answers_that_has_heard_of_it() -> None:
    """The shop is less sure, but words of the question surprise it less than the base."""
    both = [told("shop", -0.05), told("other", -0.01)]
    assert weighed(Scripted(*NOBODY, both)).weights[:, 0].tolist() == [0, 0, 1]
    heard_of = Scripted(*NOBODY, both, expected={"shop": -1.0})
    assert weighed(heard_of).weights[:, 0].tolist() == [0, 1, 0]
    unsure = [told("shop", -0.2), told("other", -0.01)]  # half as probable as a claim has to be
    heard_of = Scripted(*NOBODY, unsure, expected={"shop": -1.0})
    assert weighed(heard_of).weights[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("logprobs", "of_base", "expected"),
    [
        ([-0.1, -0.5], [-1.0, -4.0], exp(-0.1) - exp(-1) + 4 * (exp(-0.5) - exp(-4))),
        ([-5.0, -0.5], [-1.0, -90.0], 6 * exp(-0.5)),  # 6 nats at most; nothing below the base
        ([], [], 0.0),
    ],
)
def test_who_recognises_a_question_adds_to_what_surprises_the_base(
    logprobs, of_base, expected
) -> None:
    assert recognised(logprobs, of_base) == pytest.approx(log(1 + expected))


def test_of_two_that_know_the_one_answers_that_is_not_always_so_sure() -> None:
    typical = dict.fromkeys(NAMES, TYPICAL)
    typical["other"] = {**TYPICAL, "sureness": {"mean": -0.1, "spread": 0.5}}
    both = [told("shop", -0.05), told("other", -0.01)]
    plan = weighed(Scripted(*NOBODY, both), typical=typical)
    assert plan.weights[:, 0].tolist() == [0, 1, 0]


def test_two_places_first_is_refused_an_answer_that_it_makes_up() -> None:
    places = ([LOW, TYPICAL_SIZE, LOW], [LOW, HIGH, LOW])
    for whole in (True, False):
        assert not weighed(Scripted(*places, [told("shop", -0.6, whole)])).weights.any()
    reading = Scripted(*places, [told("shop", -0.25, False)])  # it is not so unsure
    plan = weighed(reading)
    assert reading.asked == ["shop"]  # the others stand out far less in the question
    assert plan.weights[:, 0].tolist() == [0, 1, 0]
    assert plan.sure == told_probability(plan.known["shop"], 0.0)
    at_last = Scripted(*places[::-1], [told("shop", -0.6)])
    assert weighed(at_last).weights.any()  # it may give a form
    at_last._nats = 5.0  # nobody can know the answer, and forms are asked for in more words
    assert not weighed(at_last).weights.any()


def test_who_stands_out_far_enough_at_the_end_needs_no_draft() -> None:
    """The base expects the question, as it does a sum."""
    for size, asked in ((0.05, ["form"]), (0.06, [])):  # 3.2 and 3.6 spreads
        reading = Scripted([size, LOW, LOW], [TYPICAL_SIZE, LOW, LOW], nats=30.0)
        plan = weighed(reading)
        assert reading.asked == asked
        assert plan.weights.any() == (not asked)


def test_an_adapter_that_gives_all_its_form_is_not_asked_what_it_knows() -> None:
    typical = dict.fromkeys(NAMES, TYPICAL)
    typical["shop"] = {**TYPICAL, "opening": {"mean": -10.0, "spread": 1.0}}
    reading = Scripted(*NOBODY, [told("shop", -0.01)])
    assert not weighed(reading, typical=typical).weights.any()
    assert "shop" not in reading.asked


def own_way() -> Any:
    """Let `shop` mostly begin as the base would not, and be as unsure as it is here."""
    its = {"opening": {"mean": -5.0, "spread": 1.0}, "sureness": {"mean": -2.5, "spread": 1.0}}
    return {**dict.fromkeys(NAMES, TYPICAL), "shop": {**TYPICAL, **its}}


def test_requests_of_its_own_kind_are_left_to_who_has_learnt_them() -> None:
    """It begins in its own way whatever is asked, and may be unsure: many answers are right."""
    at_end, asked = ([LOW, TYPICAL_SIZE, LOW], [LOW, 0.03, LOW])
    own = told("shop", -2.0, first=-6)
    plan = weighed(Scripted(at_end, asked, [own]), typical=own_way())
    assert plan.weights[:, 0].tolist() == [0, 1, 0]
    assert not weighed(Scripted(at_end, asked, [own])).weights.any()  # no way of its own
    for other in (
        Scripted(at_end, asked, [told("shop", -2.0, by_base=-1.0)]),  # it begins as the base would
        Scripted(at_end, asked, [told("shop", -3.5, first=-6)]),  # less sure than it mostly is
        Scripted(at_end, asked, [own], nats=20.0),  # the question surprises nobody
        Scripted(at_end, [LOW, 0.008, LOW], [own]),  # nor is it its own
        Scripted([LOW, 0.002, LOW], asked, [own]),  # it would not begin so here
    ):
        assert not weighed(other, typical=own_way()).weights.any()


def test_of_two_that_say_something_the_question_is_one_ones_own() -> None:
    both = [told("shop", -2.0, first=-6), told("other", -2.0)]
    for of_other, expected in ((0.04, [0, 0, 0]), (0.02, [0, 1, 0])):
        reading = Scripted([LOW, TYPICAL_SIZE, LOW], [LOW, 0.03, of_other], both)
        assert weighed(reading, typical=own_way()).weights[:, 0].tolist() == expected


def test_a_form_writes_where_the_answer_begins_as_its_own_more_than_as_the_knowers() -> None:
    knows = [told("shop", -0.01), told("form", -0.3, first=-4)]
    for of_knower, drafts in ((LOW, True), (0.06, False)):
        reading = Scripted([HIGH, of_knower, LOW], [TYPICAL_SIZE, HIGH, LOW], knows)
        plan = weighed(reading)
        assert (plan.drafting is not None) == drafts


def test_a_second_form_knows_nothing() -> None:
    """Two stand out at the last token, and one is asked for: the other is as sure of its form."""
    places = ([HIGH, 0.03, LOW], [TYPICAL_SIZE, TYPICAL_SIZE, LOW])
    reading = Scripted(*places, [told("form", -0.3), told("shop", -0.01)])
    assert weighed(reading).drafting is None


def test_an_empty_draft_knows_nothing() -> None:
    empty = Told(Draft("shop", (), "", (), is_whole=True), ())
    assert not weighed(Scripted(*NOBODY, [empty])).weights.any()


def test_no_draft_after_a_thought_or_for_plain_text() -> None:
    probe = Scripted(*FORM_FIRST, [])
    assert weighed(probe, can_draft=False).drafting is None
    assert weighed(probe, is_chat=False).drafting is None


def test_a_relay_by_hand_names_two() -> None:
    probe = Scripted(*FORM_FIRST)
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


def test_an_earlier_question_reads_as_when_it_was_asked(folder, monkeypatch) -> None:
    """The base hears the one while it reads the prompt, the other in a branch, or remembers it."""
    first = [{"role": "user", "content": "abc def ghi jkl mno pqr stu?"}]
    turns = [{"role": "assistant", "content": "abc"}, {"role": "user", "content": "def ghi jkl?"}]
    with Engine(folder, n_ctx=1024) as engine, Engine(folder, n_ctx=1024) as other:
        with reading_of(engine, first) as before:
            nats, added = before.surprise(), before.added()
        with reading_of(engine, turns[1:]) as alone:
            nats_alone = alone.surprise()
        for remembers in (engine, other):
            with reading_of(remembers, first + turns) as now:
                difference = now.goes_on()
                counts = count_decoded(monkeypatch)
                nats_before, added_before = now.earlier()
                assert (not counts) == (remembers is engine)
                assert nats_before == pytest.approx(nats, rel=1e-3)
                np.testing.assert_allclose(added_before, added[1:], rtol=1e-3)
                assert difference == pytest.approx(nats_alone - now.surprise(), abs=1e-2)
            with reading_of(remembers, first + turns) as again:
                again.surprise()
                counts = count_decoded(monkeypatch)
                assert again.earlier()[0] == pytest.approx(nats, rel=1e-3)
                assert not counts


def test_a_turn_behind_empty_ones_goes_on_from_nothing(folder) -> None:
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": "abc"}]
    question = {"role": "user", "content": "def ghi jkl?"}
    with Engine(folder, n_ctx=1024) as engine, reading_of(engine, [*empty, question]) as reading:
        nats, added = reading.earlier()
        assert (nats, len(added)) == (0.0, 0)
        assert reading.goes_on() == 0.0


def reading_of(engine: Engine, messages: list[dict[str, str]]) -> PromptReading:
    query = engine.memory.current.weigher.query(engine.read(Chat(messages)))
    return PromptReading(engine._core, query, engine._core.cancellation())


@pytest.mark.parametrize("is_heard", [True, False])
def test_words_of_a_question_are_expected_as_a_prompt_that_the_base_begins(
    folder, is_heard, monkeypatch
) -> None:
    """Each adapter reads the question alone, behind what the base reads: all in one batch."""
    question = [{"role": "user", "content": "abc def ghi jkl mno pqr stu?"}]
    with Engine(folder, n_ctx=1024) as engine, reading_of(engine, question) as reading:
        core = engine._core
        start, end = reading.query.question
        tokens = reading.query.tokens
        items = []
        for name in ("es", BASE):
            request = Request(tokens[: start + 1], core.weights_of(name), n_base=start)
            items.append((request, tokens[start + 1 : end]))
        wanted = core.run(core.scorer.score(items), core.cancellation(), contexts="branch")
        if is_heard:
            reading.added()
        counts = count_decoded(monkeypatch)
        found = reading.expected(["es", BASE], goes_on=False)
        assert counts[-1] == 2 * (end - start - 1)
        assert len(counts) == 2 - is_heard
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_a_relay_is_two_plain_answers_with_the_stated_prompts(
    folder, n_parallel, monkeypatch
) -> None:
    """Bit for bit: the knower's answer, then the writer's with it in parentheses before.

    The base prefills what is before it; the writer reads the rest itself.
    """
    with Engine(folder, n_ctx=1024, n_parallel=n_parallel, guesses=0) as engine:
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


def test_who_is_asked_for_words_reads_so(folder, monkeypatch) -> None:
    in_words = "qaflora_edge.weighing.relay._takes_form"
    monkeypatch.setattr(in_words, lambda reading, knower, writer: True)
    with Engine(folder, n_ctx=512, guesses=0) as engine:
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
    reading.drafts(["es"], N_DRAFT, weights)
    return Plan.mix(weights)


@pytest.mark.parametrize("n_token", [40, 155, 159])  # of a context of 160: with room and without
@pytest.mark.parametrize("options", [{}, {"logprobs": 0}, {"max_tokens": 3}, {"stop": "o"}])
def test_an_answer_goes_on_from_its_draft_as_if_alone(
    folder, monkeypatch, n_token, options
) -> None:
    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", by_draft)
    options = {"max_tokens": 20, **options}
    with Engine(folder, n_ctx=160, guesses=0) as engine:
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
    reading.drafts(["es", BASE], N_DRAFT, nothing)
    return Plan.mix(nothing)


@pytest.mark.parametrize("rule", [by_draft, by_draft_of_base])
def test_the_answer_is_seen_while_drafts_decide(folder, monkeypatch, rule) -> None:
    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", rule)
    seen: list[str] = []
    with Engine(folder, n_ctx=512, guesses=0) as engine:
        prompt = asked(engine)
        name = "base" if rule is by_draft_of_base else "single:math"
        text = engine.generate(prompt, strategy=name, max_tokens=20).text()
        answer = engine.generate(prompt, strategy=BY_HAND, max_tokens=20, on_draft=seen.append)
        assert answer.text() == text
    assert len(seen) >= N_DRAFT
    assert all(text.startswith(part.rstrip("\ufffd")) for part in seen)


def test_drafts_go_on_where_their_kv_state_is_not_kept(folder, monkeypatch) -> None:
    drafts: list[Draft] = []

    def rule(reading: Any) -> Plan:
        reading.added()
        reading.drafts(["es", BASE], 2)
        drafts.extend(reading.drafts(["es", BASE], N_DRAFT))
        return Plan.mix(alone_weights(BASE, reading.query.adapters, reading.query.n_layer))

    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", rule)
    monkeypatch.setattr("qaflora_edge.inference.drafts._N_BYTE_KEPT", 0)
    with Engine(folder, n_ctx=512, guesses=0) as engine:
        prompt = asked(engine, "xyz 12")
        engine.generate(prompt, strategy=BY_HAND, max_tokens=1)
        for draft, name in zip(drafts, ("single:es", "base"), strict=True):
            plain = engine.generate(prompt, strategy=name, max_tokens=N_DRAFT, logprobs=0)
            plain.text()
            assert [*draft.tokens] == [entry.token for entry in plain.logprobs]


def by_three(reading: Any) -> Plan:
    """Two draft, one after the other, and the base writes."""
    nothing = alone_weights(BASE, reading.query.adapters, reading.query.n_layer)
    first = DraftStep("math")
    second = DraftStep("es", view="before")
    return Plan((first, second, WriteStep(nothing, view="before")))


def test_a_plan_may_have_three_steps(folder, monkeypatch) -> None:
    """Each is a plain answer to the prompt with the draft before it."""
    monkeypatch.setattr("qaflora_edge.weighing.relay._by_hand", by_three)
    with Engine(folder, n_ctx=1024, guesses=0) as engine:
        plain = asked(engine)
        answer = engine.generate(plain, strategy=BY_HAND, max_tokens=12)
        plan = answer.fusion.plan
        told = list(answer.drafting())
        text = answer.text()
        assert answer.fusion.plan is plan  # what was drafted stands beside it
        scores = engine.score(plain, "xyz", strategy=BY_HAND)
        first = engine.generate(plain, strategy="single:math", max_tokens=128).text()
        second_prompt = asked(engine, f"({first.strip()})\n\nabc def?")
        with monkeypatch.context() as patch:
            base_reads_up_to_the_draft(patch, engine, plain)
            assert answer.draft is not None
            assert "".join(told) == first + answer.draft.text
            third_prompt = asked(engine, f"({answer.draft.text.strip()})\n\nabc def?")
            assert answer.prompt == tuple(third_prompt)
            assert text == engine.generate(third_prompt, strategy="base", max_tokens=12).text()
            expected = engine.score(third_prompt, "xyz", strategy="base")
            assert scores == pytest.approx(expected, abs=1e-5)
        second = engine.generate(second_prompt, strategy="single:es", max_tokens=128).text()
        assert answer.draft.text == second


def test_an_interrupted_score_cancels_its_draft(folder, monkeypatch) -> None:
    with Engine(folder, n_ctx=512) as engine:
        begun: list[Any] = []
        begin, drive = engine._core.begin, engine._core.loop.drive

        def noted(*given: Any, **options: Any) -> Any:
            begun.append(begin(*given, **options))
            return begun[-1]

        def interrupted(is_ready: Any) -> None:
            if begun:
                raise KeyboardInterrupt
            drive(is_ready)

        monkeypatch.setattr(engine._core, "begin", noted)
        monkeypatch.setattr(engine._core.loop, "drive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.score(asked(engine), "abc", strategy=BY_HAND)
        assert begun[0].is_cancelled


def test_times_that_are_held_go_on_with_the_answer(folder) -> None:
    with Engine(folder, n_ctx=512) as engine:
        answer = engine.generate(asked(engine), strategy="qa-flora", max_tokens=4)
        times = answer.timings
        answer.text()
        assert times.n_decoded == answer.timings.n_decoded > 0
        assert times.probe_ms == answer.fusion.probe_ms > 0


def test_a_draft_is_scored_under_the_base_in_one_batch(folder, monkeypatch) -> None:
    with Engine(folder, n_ctx=1024, guesses=0) as engine:
        prompt = asked(engine)
        query = engine.memory.current.weigher.query(engine.read(prompt))
        with PromptReading(engine._core, query, engine._core.cancellation()) as reading:
            reading.added()
            drafts = reading.drafts(["es", BASE], N_DRAFT)
            counts = count_decoded(monkeypatch)
            found = reading.base_logprobs(drafts)
            assert counts == [sum(len(draft.tokens) for draft in drafts)]
        for draft, logprobs in zip(drafts, found, strict=True):
            text = list(draft.tokens)
            expected = engine.score(prompt, text, strategy="base")
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_prompt_that_is_read_does_not_hold_up_another(folder, monkeypatch) -> None:
    """A lock of all readings would: functools.cached_property has one before Python 3.12."""
    second_is_read = threading.Event()
    listen = PromptReading._listen

    def waiting(self: PromptReading, listener: Any) -> Any:
        if self.query.options.get("first"):
            assert second_is_read.wait(20), "the second reading waits for the first"
        return listen(self, listener)

    monkeypatch.setattr(PromptReading, "_listen", waiting)
    with Engine(folder, n_ctx=512) as engine, ThreadPoolExecutor() as threads:
        query = engine.memory.current.weigher.query(engine.read(asked(engine)))

        def surprise_of(options: dict[str, Any]) -> float:
            cancellation = engine._core.cancellation()
            with PromptReading(engine._core, replace(query, options=options), cancellation) as it:
                return it.surprise()

        first = threads.submit(surprise_of, {"first": True})
        second = threads.submit(surprise_of, {})
        expected = second.result(20)
        second_is_read.set()
        assert first.result(20) == expected


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
    with Engine(folder, n_ctx=160, guesses=0) as engine:
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
        words = in_words(engine._model, prompt.tokens, prompt.question, 512)
        plain = engine._model.detokenize(prompt.tokens).decode()
        said = engine._model.detokenize(draft.tokens).decode().strip()
        assert before == plain.replace("the cat?", f"({said})\n\nthe cat?")
        asked = engine._model.detokenize(words).decode()
        assert asked == plain.replace("the cat?", "the cat? Answer in words.")
