"""`relay`: one adapter drafts an answer, another writes it with the draft in view.

A sum of two adapters loses what each has learnt: `company` and `json` together write wrong numbers
as JSON. Text carries it without loss. two-place's scores say who gives the answer its form, and who
may know more. Drafts decide: an adapter that is far surer of its draft than it is of its answers to
neutral prompts knows something. docs/strategies.md has the rule in words.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from qaflora_edge.arrays import F32
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.plan import (
    BASE,
    N_BEGUN,
    UNSURE,
    Draft,
    DraftStep,
    Plan,
    View,
    WriteStep,
    alone_weights,
)
from qaflora_edge.weighing.strategy import Query, Reading
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
    drafts = True
    undrafted = "two-place"

    def check(self, query: Query) -> None:
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
            super().check(query)

    def plan(self, reading: Reading) -> Plan:
        query = reading.query
        if "knower" in query.options:
            if not query.is_chat or not query.can_draft:
                raise StrategyError(
                    "Strategy relay with a knower and a writer got plain text, or a base that "
                    "thinks, expected a chat whose answer begins at once; use another strategy."
                )
            return _by_hand(reading)
        plan = super().plan(reading)
        if not query.is_chat or not query.can_draft or query.has_results or len(query.adapters) < 2:
            return plan
        return _relayed(query, reading, plan)


def _relayed(query: Query, reading: Reading, plan: Plan) -> Plan:
    writer = _heaviest(query, plan)
    if writer is not None:
        plan = _without_needless(query, plan, writer)
    form = _proposed_form(query, plan)
    strength = 0.0
    if writer is not None:
        strength = plan.why[writer].scores["answer"]
    most = ALONE  # strength of a writer beside which a form is looked for
    if form == writer:
        most = ANSWERS
    if form is not None and strength <= most:
        formed = _in_form(query, reading, plan, form)
        if formed is not None:
            return formed
    if writer is None:
        return _despite_the_scores(query, reading, plan)
    (opening,) = reading.drafts([writer], N_OPENING, _weights(plan))
    asked = [writer, *_knowers(query, plan, opening)]
    if strength < STRONG:
        asked.append(BASE)
    begun = reading.drafts(asked, N_BEGUN, _weights(plan))
    drafts = {draft.adapter: draft for draft in begun}
    sureness = _sureness(drafts)
    both = _both_answer(plan, drafts)
    if both is not None:
        return _relay(reading, plan, *both, sureness)
    knower = _surest(query, drafts, writer)
    if knower is not None and _knows_more(query, drafts[knower], drafts[writer]):
        return _relay(reading, plan, knower, writer, sureness)
    because = _why_the_base(query, reading, drafts, writer)
    if because:
        of_base = _answered_by(query, plan, BASE, because)
        return _despite_the_scores(query, reading, of_base)
    return _rewritten(query, reading, plan, writer, sureness)


def _why_the_base(query: Query, reading: Reading, drafts: Mapping[str, Draft], writer: str) -> str:
    """Say why the base answers in place of an adapter, where it drafts as well; else "".

    A short answer states a fact, and one that is made up has a token that its adapter is unsure of.
    """
    if BASE not in drafts:
        return ""
    draft = drafts[writer]
    is_foreign = _is_foreign(draft.text, reading.question())
    is_unsure = min(draft.logprobs[:N_BEGUN], default=0.0) < SURE_OF_EACH
    if is_unsure and _is_prose(draft) and not is_foreign:
        (longer,) = reading.drafts([writer], N_SHORT)
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


def _without_needless(query: Query, plan: Plan, first: str) -> Plan:
    """Leave out a second adapter that adds nothing where the answer begins.

    One that would answer too is another knower, or another form: a sum would spoil both.
    """
    for name in query.adapters:
        is_language = SPEAKS < plan.why[name].scores["answer"] < ANSWERS
        if name != first and plan.why[name].taken_as and not is_language:
            return _alone_in(query, plan, first)
    return plan


def _alone_in(query: Query, plan: Plan, name: str) -> Plan:
    """Let one adapter of a plan answer alone."""
    why = {
        other: reason if other == name else replace(reason, taken_as="")
        for other, reason in plan.why.items()
    }
    score = plan.why[name].scores["answer"]
    because = f"{name}: {score:.1f} standard deviations above its typical prompt. It answers alone."
    return replace(_answered_by(query, plan, name, because), why=why)


def _knowers(query: Query, plan: Plan, opening: Draft) -> list[str]:
    """Name who drafts beside who writes: where that one gives a form, or another would answer."""
    others = _may_know(query, plan, opening.adapter)
    if _is_prose(opening):
        others = [name for name in others if _answers(plan, name)]
    return others[:N_CANDIDATE]


def _may_know(query: Query, plan: Plan, writer: str) -> list[str]:
    others = [
        name
        for name in _by_question(query, plan)
        if name != writer and plan.why[name].scores["question"] > MAY_KNOW
    ]
    return sorted(others, key=lambda name: not _answers(plan, name))


def _by_question(query: Query, plan: Plan) -> list[str]:
    """Order adapters by their score in the question, the highest first."""
    return sorted(query.adapters, key=lambda name: -plan.why[name].scores["question"])


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


def _proposed_form(query: Query, plan: Plan) -> str | None:
    """Name an adapter that stands out where the answer begins, and not in the question.

    So does one that gives a form, whatever is asked: both places together may hide it.
    """
    import numpy as np

    from qaflora_edge.weighing.calibration import unusual

    assert plan.divergence is not None  # what is added at the last token
    at_last = _AT_LAST[query.is_later]
    scores = unusual(query, {at_last: np.asarray(plan.divergence, np.float64)})  # [n_adapter]
    highest = int(scores.argmax())
    name = query.adapters[highest]
    lead = scores[highest] - plan.why[name].scores["question"]
    return name if min(scores[highest], lead) >= FORM else None


def _in_form(query: Query, reading: Reading, plan: Plan, form: str) -> Plan | None:
    """Let an adapter write in its form, where its draft shows that the form is wanted.

    It is sure of the draft, the base would begin so too, and yet would write something else.
    """
    knowers = _may_know(query, plan, form)[:N_CANDIDATE]
    begun = reading.drafts([form, *knowers, BASE], N_BEGUN, _weights(plan))
    drafts = {draft.adapter: draft for draft in begun}
    draft = drafts[form]
    is_other = draft.tokens and draft.tokens != drafts[BASE].tokens
    if not is_other or not _is_sure(query, draft):
        return None
    if reading.unexpected(draft.tokens[0]) > FOREIGN:
        return None
    sureness = _sureness(drafts)
    strong = [name for name in knowers if _answers(plan, name)]
    knower = _surest(query, drafts, form)
    is_known = knower is not None and _is_sure(query, drafts[knower])
    if strong:
        knower = strong[0]
        is_known = True
    because = f"{form} stands out where the answer begins."
    plan = _answered_by(query, plan, form, because, draft.tokens)
    if knower is None or not is_known:
        return plan
    return _relay(reading, plan, knower, form, sureness, draft.tokens)


def _despite_the_scores(query: Query, reading: Reading, plan: Plan) -> Plan:
    """Take an adapter that the scores leave out, where it is sure of each token of its draft.

    One that makes up an answer is unsure of the token that bears the fact.
    """
    by_question = _by_question(query, plan)
    by_answer = max(query.adapters, key=lambda name: plan.why[name].scores["answer"])
    proposed = [
        name
        for name in {by_answer: None, by_question[0]: None}
        if plan.why[name].scores["question"] > PROPOSED
    ]
    drafts = reading.drafts(proposed, N_BEGUN, _weights(plan)) if proposed else []
    least = SURE_LATER if query.is_later else SURE_OF_EACH
    for draft in drafts:
        knows = _is_prose(draft) and _is_sure(query, draft) and not _repeats(query, draft)
        if knows and _is_sure_of_each(reading, draft, least):
            name = draft.adapter
            taken = _answered_by(query, plan, name, plan.because)
            return _rewritten(query, reading, taken, name, _sureness({name: draft}))
    return plan


def _both_answer(plan: Plan, drafts: Mapping[str, Draft]) -> tuple[str, str] | None:
    """Name a knower and a writer, where two adapters would answer, and one of them gives a form.

    Who is surest of the first token gives it.
    """
    strong = [
        draft
        for name, draft in drafts.items()
        if draft.tokens and name != BASE and _answers(plan, name)
    ]
    forms = [draft for draft in strong if draft.text.lstrip().startswith(_MARKUP)]
    if len(strong) < 2 or not forms:
        return None
    writer = max(forms, key=lambda draft: draft.logprobs[0])
    others = [draft.adapter for draft in strong if draft is not writer]
    knower = max(others, key=lambda name: plan.why[name].scores["answer"])
    return knower, writer.adapter


def _answers(plan: Plan, name: str) -> bool:
    return plan.why[name].scores["answer"] >= ANSWERS


def _repeats(query: Query, draft: Draft) -> bool:
    """Tell whether a draft stands in the prompt already: to repeat an answer is no knowledge."""
    n_token = len(draft.tokens)
    starts = range(len(query.tokens) - n_token + 1)
    return any(query.tokens[at : at + n_token] == draft.tokens for at in starts)


def _is_sure_of_each(reading: Reading, draft: Draft, least: float) -> bool:
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
        (draft,) = reading.drafts([draft.adapter], n_token)
    return False


def _rewritten(
    query: Query, reading: Reading, plan: Plan, knower: str, sureness: Mapping[str, float]
) -> Plan:
    """Let another write, in the question's language, what an adapter drafts in English.

    The base answers alone where the adapter is unsure of its draft, unless the question is surely
    the adapter's subject: the base would make up an answer as well.

    plan  the knower's, which stays where nothing is rewritten
    """
    (begun,) = reading.drafts([knower], N_BEGUN)
    is_foreign = begun.tokens and _is_foreign(begun.text, reading.question())
    if not is_foreign or reading.unexpected(begun.tokens[0]) < FOREIGN:
        writing = replace(plan.writing, guesses=begun.tokens)
        return replace(plan, steps=(writing,))
    is_its_subject = plan.why[knower].scores["answer"] >= SUBJECT
    if not is_its_subject and not _is_known(query, begun):
        numbers = f"{begun.sureness(N_BEGUN):.2f} nats a token"
        because = f"The base answers alone: {knower} is unsure of its draft ({numbers})."
        return _answered_by(query, plan, BASE, because)
    writer = _speaker(query, plan, knower)
    view: View = "before" if writer == BASE else "behind"
    return _relay(reading, plan, knower, writer, sureness, view=view)


def _speaker(query: Query, plan: Plan, knower: str) -> str:
    """Name the adapter of the question's language, which stands out beside the knower, or base."""
    others = [name for name in query.adapters if name != knower]
    highest = max(others, key=lambda name: plan.why[name].scores["answer"])
    if plan.why[highest].scores["answer"] < LANGUAGE:
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


def _by_hand(reading: Reading) -> Plan:
    query = reading.query
    knower = query.options["knower"]
    writer = query.options["writer"]
    (draft,) = reading.drafts([knower], N_BEGUN)
    sureness = {knower: draft.sureness(N_BEGUN)}
    nothing = Plan.mix(_alone(query, BASE))
    return _relay(reading, nothing, knower, writer, sureness)


def _answered_by(
    query: Query, plan: Plan, name: str, because: str, guesses: tuple[int, ...] = ()
) -> Plan:
    """Let one adapter, or the base, answer alone."""
    step = WriteStep(_alone(query, name), guesses=guesses)
    return replace(plan, steps=(step,), because=because)


def _relay(
    reading: Reading,
    plan: Plan,
    knower: str,
    writer: str,
    sureness: Mapping[str, float],
    form: tuple[int, ...] = (),
    *,
    view: View = "before",
) -> Plan:
    """Relay between two; a knower that would take the writer's form is asked for words.

    form  tokens with which the writer would answer alone, in its form; none: markup tells a form
    """
    (draft,) = reading.drafts([knower], N_BEGUN)
    takes_form = draft.tokens[:1] == form[:1] if form else not _is_prose(draft)
    drafting = DraftStep(knower, draft=draft, is_done=draft.is_whole)
    if draft.tokens and takes_form:
        drafting = DraftStep(knower, is_in_words=True)
    writing = WriteStep(_alone(reading.query, writer), view, form)
    numbers = ", ".join(f"{name} {mean:.2f}" for name, mean in sureness.items())
    because = (
        f"{knower} drafts, {writer} writes with the draft in view "
        f"(nats a token of drafts: {numbers})."
    )
    return replace(plan, steps=(drafting, writing), because=because, sureness=sureness)


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


def _weights(plan: Plan) -> F32:
    """Give the weights [n_adapter, n_layer] of an answer that nobody relays."""
    import numpy as np

    return np.asarray(plan.weights, np.float32)


def _heaviest(query: Query, plan: Plan) -> str | None:
    """Name the adapter with the largest weight; None where the base answers alone."""
    import numpy as np

    means = np.asarray(plan.weights).mean(axis=1)
    return query.adapters[int(means.argmax())] if means.max() > 0 else None


def _alone(query: Query, name: str) -> F32:
    """Give weights [n_adapter, n_layer] of one adapter at 1, or of the base."""
    return alone_weights(name, query.adapters, query.n_layer)


STRATEGIES = (RelayStrategy(),)
