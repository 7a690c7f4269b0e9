"""`relay`: one adapter drafts an answer, another writes it with the draft in view.

A sum of two adapters loses what each has learnt: `company` and `json` together write wrong numbers
as JSON. Text carries it without loss. two-place's scores say who gives the answer its form, and who
may know more. Drafts decide: an adapter that is far surer of its draft than it is of its answers to
neutral prompts knows something. docs/strategies.md has the rule in words.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qaflora_edge.arrays import F32
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.drafted import BASE, N_BEGUN, UNSURE, Draft, Relay
from qaflora_edge.weighing.strategy import Mix, Probe, Query
from qaflora_edge.weighing.two_place import TWO_PLACE_OPTIONS, TwoPlace

ALONE = 5.0  # score `answer` above which an adapter answers, and no other may give a form
SUBJECT = 2.75  # score `answer` from which an adapter that is unsure of a draft is heard
STRONG = 2.5  # score `answer` below which an adapter that is unsure is compared with the base
ANSWERS = 2.0  # score `answer` from which a second adapter would answer too
SPEAKS = 0.0  # score `answer` from which a second adapter may be the question's language
MAY_KNOW = 0.0  # score in the question above which an adapter may know more
PROPOSED = 0.3  # the same, where no adapter answers
N_OPENING = 1  # tokens of a draft that tell whether it gives a form
N_CANDIDATE = 2  # adapters that draft beside who answers, at most
SURENESS = "sureness"  # of calibration.KEYS
SURE = 1.0  # spreads above its typical sureness an adapter is sure of its draft
UNSURE_FORM = 0.5  # spreads above it, below which who gives a form lets another draft
SURE_OF_EACH = -0.1  # nats: the least sure token of an answer that is known
SURE_LATER = -0.45  # the same, in a later turn, whose subject is known already
N_WORDING = 5  # tokens that a draft begins with; the fact comes behind them
FORM = 1.25  # score at the place where the answer begins, and how far it is above the question's
N_SHORT = 12  # tokens of an answer that says nothing but a fact, at most
N_FACT = 32  # tokens of an answer that states a fact, at most
FOREIGN = 3.5  # nats: the base would not begin its answer so
LANGUAGE = 0.8  # score `answer` from which an adapter writes what another one drafts in English

_AT_LAST = {False: "added_last", True: "later_last"}  # of calibration.EXTENTS, by Query.is_later
_MARKUP = ("{", "[", "<", "`")
_FORMS = ("{", "[", "<", "`", "#", "*", "-", "|")
_ENGLISH = re.compile(
    r"\b(the|is|are|was|were|of|and|to|what|which|who|how|when|where|why|does|do|did|it|that|this"
    r"|with|you|your|for|can|could|please|tell|give|my|from|at)\b",
    re.IGNORECASE,
)

# fmt: off
_OPTIONS = (
    *TWO_PLACE_OPTIONS,
    Option("knower", str, metavar="NAME", help="who drafts: an adapter, or base"),
    Option("writer", str, metavar="NAME", help="who writes with the draft in view"),
)
# fmt: on


class RelayStrategy(TwoPlace):
    name = "relay"
    help = "two-place, and where one adapter knows and another writes: one after the other"
    options = _OPTIONS
    needs_typical = (*TwoPlace.needs_typical, SURENESS)

    def check(self, argument: Any, query: Query) -> None:
        for role in ("knower", "writer"):
            name = query.options.get(role, BASE)
            if name != BASE and name not in query.adapters:
                raise StrategyError(
                    f"Strategy relay: the {role} is {name!r}, expected base or one of "
                    f"{', '.join(query.adapters)}."
                )
        if ("knower" in query.options) != ("writer" in query.options):
            raise StrategyError("Strategy relay has a knower or a writer, expected both or none.")
        if "knower" not in query.options:
            super().check(argument, query)

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        if "knower" in query.options:
            if not query.is_chat or not query.can_relay:
                raise StrategyError(
                    "Strategy relay with a knower and a writer got plain text, or a base that "
                    "thinks, expected a chat whose answer begins at once; use another strategy."
                )
            return _by_hand(query, probe)
        mix = super().weigh(query, probe, argument)
        if not query.is_chat or not query.can_relay or len(query.adapters) < 2:
            return mix
        return _relayed(query, probe, mix)


def _relayed(query: Query, probe: Probe, mix: Mix) -> Mix:
    writer = _heaviest(query, mix)
    if writer is not None:
        mix = _without_needless(query, mix, writer)
    form = _proposed_form(query, mix)
    strength = 0.0
    if writer is not None:
        strength = mix.why[writer].scores["answer"]
    most = ALONE  # strength of a writer beside which a form is looked for
    if form == writer:
        most = ANSWERS
    if form is not None and strength <= most:
        formed = _in_form(query, probe, mix, form)
        if formed is not None:
            return formed
    if writer is None:
        return _despite_the_scores(query, probe, mix)
    (opening,) = probe.drafts([writer], N_OPENING, _weights(mix))
    asked = [writer, *_knowers(query, mix, opening)]
    if strength < STRONG:
        asked.append(BASE)
    begun = probe.drafts(asked, N_BEGUN, _weights(mix))
    drafts = {draft.adapter: draft for draft in begun}
    sureness = _sureness(drafts)
    both = _both_answer(mix, drafts)
    if both is not None:
        relay = _relay(query, probe, *both, sureness)
        return replace(mix, weights=_alone(query, both[1]), relay=relay, because=_said(relay))
    knower = _surest(query, drafts, writer)
    if knower is not None and _knows_more(query, drafts[knower], drafts[writer]):
        relay = _relay(query, probe, knower, writer, sureness)
        return replace(mix, weights=_alone(query, writer), relay=relay, because=_said(relay))
    because = _why_the_base(query, probe, drafts, writer)
    if because:
        of_base = replace(mix, weights=_alone(query, BASE), because=because)
        return _despite_the_scores(query, probe, of_base)
    return _rewritten(query, probe, mix, writer, sureness)


def _why_the_base(query: Query, probe: Probe, drafts: Mapping[str, Draft], writer: str) -> str:
    """Say why the base answers in place of an adapter, where it drafts as well; else "".

    A short answer states a fact, and one that is made up has a token that its adapter is unsure of.
    """
    if BASE not in drafts:
        return ""
    draft = drafts[writer]
    is_foreign = _is_foreign(draft.text, probe.question())
    is_unsure = min(draft.logprobs[:N_BEGUN], default=0.0) < SURE_OF_EACH
    if is_unsure and _is_prose(draft) and not is_foreign:
        (longer,) = probe.drafts([writer], N_SHORT)
        if longer.is_whole:
            return f"The base answers alone: {writer} is unsure of its short answer."
    is_sure = _is_sure(query, draft)
    if is_foreign:  # its wording may be unsure, but not its fact
        is_sure = _is_known(query, draft)
    of_base = drafts[BASE].sureness(N_BEGUN)
    of_writer = draft.sureness(N_BEGUN)
    if is_sure or of_base <= of_writer:
        return ""
    numbers = f"{of_base:.2f} nats a token, {writer} {of_writer:.2f}"
    return f"The base answers alone: it is surer of its draft ({numbers})."


def _without_needless(query: Query, mix: Mix, first: str) -> Mix:
    """Leave out a second adapter that adds nothing where the answer begins.

    One that would answer too is another knower, or another form: a sum would spoil both.
    """
    for name in query.adapters:
        is_language = SPEAKS < mix.why[name].scores["answer"] < ANSWERS
        if name != first and mix.why[name].taken_as and not is_language:
            return _alone_in(query, mix, first)
    return mix


def _alone_in(query: Query, mix: Mix, name: str) -> Mix:
    """Let one adapter of a mix answer alone."""
    why = {
        other: reason if other == name else replace(reason, taken_as="")
        for other, reason in mix.why.items()
    }
    score = mix.why[name].scores["answer"]
    because = f"{name}: {score:.1f} standard deviations above its typical prompt. It answers alone."
    return replace(mix, weights=_alone(query, name), why=why, because=because)


def _knowers(query: Query, mix: Mix, opening: Draft) -> list[str]:
    """Name who drafts beside who writes: where that one gives a form, or another would answer."""
    others = _may_know(query, mix, opening.adapter)
    if _is_prose(opening):
        others = [name for name in others if _answers(mix, name)]
    return others[:N_CANDIDATE]


def _may_know(query: Query, mix: Mix, writer: str) -> list[str]:
    others = [
        name
        for name in _by_question(query, mix)
        if name != writer and mix.why[name].scores["question"] > MAY_KNOW
    ]
    return sorted(others, key=lambda name: not _answers(mix, name))


def _by_question(query: Query, mix: Mix) -> list[str]:
    """Order adapters by their score in the question, the highest first."""
    return sorted(query.adapters, key=lambda name: -mix.why[name].scores["question"])


def _surest(query: Query, drafts: Mapping[str, Draft], writer: str) -> str | None:
    """Name who drafts in words and is surest of it, beside who writes."""
    unusual = {
        name: _unusual(query, draft)
        for name, draft in drafts.items()
        if name not in (BASE, writer) and _is_prose(draft)
    }
    return max(unusual, key=unusual.__getitem__, default=None)


def _knows_more(query: Query, draft: Draft, of_writer: Draft) -> bool:
    """Tell whether a draft is known, and who gives the form is unsure of its own."""
    if _is_prose(of_writer) or _unusual(query, of_writer) >= UNSURE_FORM:
        return False
    return _is_known(query, draft)


def _is_known(query: Query, draft: Draft) -> bool:
    """Tell whether an adapter is sure of its draft, or of what stands behind the first words."""
    return _is_sure(query, draft) or _is_sure_of_fact(draft)


def _is_sure_of_fact(draft: Draft) -> bool:
    """Tell whether an adapter is sure of each token behind its draft's first words."""
    behind = draft.logprobs[N_WORDING:N_BEGUN]
    return min(behind, default=UNSURE) > SURE_OF_EACH


def _proposed_form(query: Query, mix: Mix) -> str | None:
    """Name an adapter that stands out where the answer begins, and not in the question.

    So does one that gives a form, whatever is asked: both places together may hide it.
    """
    import numpy as np

    from qaflora_edge.weighing.calibration import unusual

    assert mix.divergence is not None  # what is added at the last token
    at_last = _AT_LAST[query.is_later]
    scores = unusual(query, {at_last: np.asarray(mix.divergence, np.float64)})  # [n_adapter]
    highest = int(scores.argmax())
    name = query.adapters[highest]
    lead = scores[highest] - mix.why[name].scores["question"]
    return name if min(scores[highest], lead) >= FORM else None


def _in_form(query: Query, probe: Probe, mix: Mix, form: str) -> Mix | None:
    """Let an adapter write in its form, where its draft shows that the form is wanted.

    It is sure of the draft, the base would begin so too, and yet would write something else.
    """
    knowers = _may_know(query, mix, form)[:N_CANDIDATE]
    begun = probe.drafts([form, *knowers, BASE], N_BEGUN, _weights(mix))
    drafts = {draft.adapter: draft for draft in begun}
    draft = drafts[form]
    is_other = draft.tokens and draft.tokens != drafts[BASE].tokens
    if not is_other or not _is_sure(query, draft):
        return None
    if probe.unexpected(draft.tokens[0]) > FOREIGN:
        return None
    sureness = _sureness(drafts)
    strong = [name for name in knowers if _answers(mix, name)]
    knower = _surest(query, drafts, form)
    is_known = knower is not None and _is_sure(query, drafts[knower])
    if strong:
        knower = strong[0]
        is_known = True
    mix = replace(mix, weights=_alone(query, form), begun=draft.tokens)
    if knower is None or not is_known:
        return replace(mix, because=f"{form} stands out where the answer begins.")
    relay = _relay(query, probe, knower, form, sureness, draft.tokens[:1])
    return replace(mix, relay=relay, because=_said(relay))


def _despite_the_scores(query: Query, probe: Probe, mix: Mix) -> Mix:
    """Take an adapter that the scores leave out, where it is sure of each token of its draft.

    One that makes up an answer is unsure of the token that bears the fact.
    """
    by_question = _by_question(query, mix)
    by_answer = max(query.adapters, key=lambda name: mix.why[name].scores["answer"])
    proposed = [
        name
        for name in {by_answer: None, by_question[0]: None}
        if mix.why[name].scores["question"] > PROPOSED
    ]
    drafts = probe.drafts(proposed, N_BEGUN, _weights(mix)) if proposed else []
    least = SURE_LATER if query.is_later else SURE_OF_EACH
    for draft in drafts:
        knows = _is_prose(draft) and _is_sure(query, draft) and not _repeats(query, draft)
        if knows and _is_sure_of_each(probe, draft, least):
            name = draft.adapter
            taken = replace(mix, weights=_alone(query, name))
            return _rewritten(query, probe, taken, name, _sureness({name: draft}))
    return mix


def _both_answer(mix: Mix, drafts: Mapping[str, Draft]) -> tuple[str, str] | None:
    """Name a knower and a writer, where two adapters would answer, and one of them gives a form.

    Who is surest of the first token gives it.
    """
    strong = [
        draft
        for name, draft in drafts.items()
        if draft.tokens and name != BASE and _answers(mix, name)
    ]
    forms = [draft for draft in strong if draft.text.lstrip().startswith(_MARKUP)]
    if len(strong) < 2 or not forms:
        return None
    writer = max(forms, key=lambda draft: draft.logprobs[0])
    others = [draft.adapter for draft in strong if draft is not writer]
    knower = max(others, key=lambda name: mix.why[name].scores["answer"])
    return knower, writer.adapter


def _answers(mix: Mix, name: str) -> bool:
    return mix.why[name].scores["answer"] >= ANSWERS


def _repeats(query: Query, draft: Draft) -> bool:
    """Tell whether a draft stands in the prompt already: to repeat an answer is no knowledge."""
    n_token = len(draft.tokens)
    starts = range(len(query.tokens) - n_token + 1)
    return any(query.tokens[at : at + n_token] == draft.tokens for at in starts)


def _is_sure_of_each(probe: Probe, draft: Draft, least: float) -> bool:
    """Tell whether a draft is a short answer, and its adapter sure of each token of it.

    least  nats that each token is above
    """
    n_token = N_BEGUN
    while min(draft.logprobs, default=UNSURE) > least:
        if draft.is_whole:
            return True
        n_token *= 2
        if n_token > N_FACT:
            return False
        (draft,) = probe.drafts([draft.adapter], n_token)
    return False


def _rewritten(
    query: Query, probe: Probe, mix: Mix, knower: str, sureness: Mapping[str, float]
) -> Mix:
    """Let another write, in the question's language, what an adapter drafts in English.

    The base answers alone where the adapter is unsure of its draft, unless the question is surely
    the adapter's subject: the base would make up an answer as well.

    mix  the knower's, which stays where nothing is rewritten
    """
    (begun,) = probe.drafts([knower], N_BEGUN)
    is_foreign = begun.tokens and _is_foreign(begun.text, probe.question())
    if not is_foreign or probe.unexpected(begun.tokens[0]) < FOREIGN:
        return replace(mix, begun=begun.tokens)
    is_its_subject = mix.why[knower].scores["answer"] >= SUBJECT
    if not is_its_subject and not _is_known(query, begun):
        numbers = f"{begun.sureness(N_BEGUN):.2f} nats a token"
        because = f"The base answers alone: {knower} is unsure of its draft ({numbers})."
        return replace(mix, weights=_alone(query, BASE), because=because)
    writer = _speaker(query, mix, knower)
    relay = _relay(query, probe, knower, writer, sureness)
    relay = replace(relay, is_behind=writer != BASE)
    return replace(mix, weights=_alone(query, writer), relay=relay, because=_said(relay))


def _speaker(query: Query, mix: Mix, knower: str) -> str:
    """Name the adapter of the question's language, which stands out beside the knower, or base."""
    others = [name for name in query.adapters if name != knower]
    highest = max(others, key=lambda name: mix.why[name].scores["answer"])
    if mix.why[highest].scores["answer"] < LANGUAGE:
        return BASE
    return highest


def _is_prose(draft: Draft) -> bool:
    """Tell words from a form, such as JSON or a list, which says nothing to who writes."""
    text = draft.text.strip()
    return bool(text) and not text.startswith(_FORMS)


def _is_foreign(draft: str, question: str) -> bool:
    """Tell whether a draft is in English, as most adapters are taught in, and its question is not.

    A language detector takes longer to load than an answer, and errs on so few words.
    """
    return bool(_ENGLISH.search(draft)) and not _ENGLISH.search(question)


def _by_hand(query: Query, probe: Probe) -> Mix:
    knower = query.options["knower"]
    writer = query.options["writer"]
    (draft,) = probe.drafts([knower], N_BEGUN)
    sureness = {knower: draft.sureness(N_BEGUN)}
    relay = _relay(query, probe, knower, writer, sureness)
    return Mix(_alone(query, writer), relay=relay, because=_said(relay))


def _relay(
    query: Query,
    probe: Probe,
    knower: str,
    writer: str,
    sureness: Mapping[str, float],
    opening: tuple[int, ...] = (),
) -> Relay:
    """Relay between two; a knower that would take the writer's form is asked for words.

    opening  the first token of that form; none: markup tells it
    """
    (draft,) = probe.drafts([knower], N_BEGUN)
    takes_form = draft.tokens[:1] == opening if opening else not _is_prose(draft)
    relay = Relay(knower, writer, draft, draft.is_whole, sureness=sureness, prompt=query.tokens)
    if not draft.tokens or not takes_form:
        return relay
    nothing = replace(draft, tokens=(), text="", logprobs=(), is_whole=False)
    return replace(relay, draft=nothing, is_drafted=False, is_in_words=True)


def _said(relay: Relay) -> str:
    numbers = ", ".join(f"{name} {mean:.2f}" for name, mean in relay.sureness.items())
    return (
        f"{relay.knower} drafts, {relay.writer} writes with the draft in view "
        f"(nats a token of drafts: {numbers})."
    )


def _unusual(query: Query, draft: Draft) -> float:
    """Tell how much surer a draft is than its adapter's for neutral prompts, in spreads."""
    typical = query.typical[draft.adapter][SURENESS]
    above: float = draft.sureness(N_BEGUN) - typical["mean"]
    return above / float(typical["spread"])


def _is_sure(query: Query, draft: Draft) -> bool:
    return _unusual(query, draft) >= SURE


def _sureness(drafts: Mapping[str, Draft]) -> dict[str, float]:
    """Give the mean log-probability of each draft's first tokens, in nats."""
    return {name: draft.sureness(N_BEGUN) for name, draft in drafts.items()}


def _weights(mix: Mix) -> F32:
    """Give the weights [n_adapter, n_layer] of an answer that nobody relays."""
    import numpy as np

    return np.asarray(mix.weights, np.float32)


def _heaviest(query: Query, mix: Mix) -> str | None:
    """Name the adapter with the largest weight; None where the base answers alone."""
    import numpy as np

    means = np.asarray(mix.weights).mean(axis=1)
    return query.adapters[int(means.argmax())] if means.max() > 0 else None


def _alone(query: Query, name: str) -> F32:
    """Give weights [n_adapter, n_layer] of one adapter at 1, or of the base."""
    from qaflora_edge.weighing.numbers import alone_weights

    return alone_weights(name, query.adapters, query.n_layer)


STRATEGIES = (RelayStrategy(),)
