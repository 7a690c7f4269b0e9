"""`relay`: who knows drafts an answer, and who gives it a form writes with the draft in view.

A sum of two adapters loses what each has learnt: one of facts and one of JSON write wrong numbers
together. Text carries a fact without loss. So two-place's choice stands unless an adapter knows:
it is sure of its draft where the base is surprised by it, and the question surprises the base too.
docs/strategies.md has the rule in words, docs/results.md where each constant comes from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

from qaflora_edge.arrays import F32
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.plan import BASE, Draft, DraftStep, Plan, WriteStep, alone_weights
from qaflora_edge.weighing.strategy import Query, Reading
from qaflora_edge.weighing.two_place import TWO_PLACE_OPTIONS, TwoPlace

OPENING, SURENESS = DRAFTED = "opening", "sureness"  # of calibration.KEYS

N_DRAFT = 14  # tokens of a draft that tell whether its adapter knows
N_ASKED = 5  # adapters that draft, beside two-place's first and who gives a form: one batch

# A logistic regression over drafts of adapters that know, and of those that make answers up.
SURE = 9.2  # log-odds for each nat of sureness()
SURPRISING = 2.4  # for each e-fold of what the question surprises the base by
LATER = 2.6  # in a later turn of the adapter's subject, whose words surprise less
USUAL = -8.7  # where all of that is 0
MOST_SURPRISED = 6.0  # nats; a token that surprises the base more counts no more
LEAST_SURPRISED = 0.5  # nats, of a draft that says what the base says

CLAIM = 0.4  # probability from which an adapter may know
AMONG = 0.25  # of the score in the question, beside how unusually sure one is, where several may
SAYS = 4.0  # nats by which a draft is likelier than under the base: else it tells nothing
STANDS_OUT = 2.0  # score at the last token from which an adapter gives the answer its form, and
# in the question from which a later turn is of its subject
LEAD = 0.5  # how far who gives a form is above its score in the question
FOREIGN = 3.5  # nats: the base would not begin an answer so, but in another language
FORMS_ALL = 7.0  # nats by which answers to everyday prompts begin as the base's never do

_AT_LAST = {False: "added_last", True: "later_last"}  # of calibration.EXTENTS, by Query.is_later

# fmt: off
_OPTIONS = (
    *TWO_PLACE_OPTIONS,
    Option("knower", str, metavar="NAME", help="who drafts: an adapter, or base"),
    Option("writer", str, metavar="NAME", help="who writes with the draft in view"),
)
# fmt: on


@dataclass(frozen=True)
class Heard:
    """Hold what the drafts of one query tell.

    drafts   adapter -> its draft
    known    adapter -> probability that its draft is right
    opening  adapter -> log p, in nats, of its draft's first token as the base's
    knower   who knows; None: nobody
    """

    drafts: Mapping[str, Draft] = field(default_factory=dict)
    known: Mapping[str, float] = field(default_factory=dict)
    opening: Mapping[str, float] = field(default_factory=dict)
    knower: str | None = None


class RelayStrategy(TwoPlace):
    name = "relay"
    help = "two-place, and where one adapter knows and another writes: one after the other"
    options = _OPTIONS
    needs_typical = (*TwoPlace.needs_typical, *DRAFTED)
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
            return _by_hand(reading)
        plan = super().plan(reading)
        may_draft = query.is_chat and query.can_draft and not query.has_results
        if not may_draft or len(query.adapters) < 2:
            return plan
        form, forms = _forms(query, plan)
        asked = _asked(reading, plan, form, forms)
        heard = _heard(reading, plan, asked, form)
        knower = heard.knower
        if knower is not None and knower != form:
            return _relayed(reading, plan, heard, knower, form)
        return _confirmed(query, plan, heard, form)


def sureness(logprobs: Sequence[float], of_base: Sequence[float]) -> float:
    """Tell how sure an adapter is of its draft where the base is surprised by it, in nats.

    logprobs  log p of the draft's tokens under the adapter, [n_token]
    of_base   the same under the base
    returns   at most 0: the mean of logprobs, weighted by the base's surprise at each token
    """
    surprises = [min(-logprob, MOST_SURPRISED) for logprob in of_base]
    weighted = sum(w * logprob for w, logprob in zip(surprises, logprobs, strict=True))
    return weighted / (sum(surprises) + LEAST_SURPRISED)


def log_odds(sure: float, nats: float, *, is_later: bool) -> float:
    """Tell how probable it is that a draft is right, as the logarithm of p / (1 - p).

    sure      as sureness() gives it
    nats      by which the question surprises the base
    is_later  whether it is asked in a later turn of the adapter's subject
    """
    return USUAL + SURE * sure + SURPRISING * log(max(nats, 1.0)) + LATER * is_later


def probability(odds: float) -> float:
    """Give p of log(p / (1 - p))."""
    return 1.0 / (1.0 + exp(-odds))


def _forms(query: Query, plan: Plan) -> tuple[str | None, set[str]]:
    """Name who gives the answer its form, if one does; and all who stand out where it begins.

    They stand out there more than in the question. The highest of all gives the form.
    """
    import numpy as np

    from qaflora_edge.weighing.calibration import unusual

    assert plan.divergence is not None  # what is added at the last token
    at_last = _AT_LAST[query.is_later]
    scores = unusual(query, {at_last: np.asarray(plan.divergence, np.float64)})  # [n_adapter]
    forms = set()
    for name, score in zip(query.adapters, scores, strict=True):
        lead = score - plan.why[name].scores["question"]
        if score >= STANDS_OUT and lead >= LEAD:
            forms.add(name)
    highest = query.adapters[int(scores.argmax())]
    return (highest if highest in forms else None), forms


def _is_later(query: Query, plan: Plan, name: str) -> bool:
    return query.is_later and plan.why[name].scores["question"] >= STANDS_OUT


def _asked(reading: Reading, plan: Plan, form: str | None, forms: set[str]) -> list[str]:
    """Name who drafts: who may know, if anybody can, and two-place's first.

    An adapter that gives its form, whatever is asked or now, says little. The one that is asked for
    drafts all the same, because it may know the answer itself.
    """
    query = reading.query
    nats = reading.surprise()
    asked: list[str] = []
    for name in sorted(query.adapters, key=lambda name: -max(plan.why[name].scores.values())):
        best = log_odds(0.0, nats, is_later=_is_later(query, plan, name))
        is_form = name in forms or _opening(query, name) < -FORMS_ALL
        if probability(best) > CLAIM and not is_form and len(asked) < N_ASKED:
            asked.append(name)
    if form is not None and asked:
        asked.append(form)
    first = _heaviest(query, plan)
    if first is not None and first != form and first not in asked:
        asked.append(first)
    return asked


def _heard(reading: Reading, plan: Plan, asked: Iterable[str], form: str | None) -> Heard:
    names = list(asked)
    if not names:
        return Heard()
    query = reading.query
    drafts = [_first(draft) for draft in reading.drafts(names, N_DRAFT, _weights(plan))]
    by_base = reading.base_logprobs(drafts)
    nats = reading.surprise()
    known = {}
    opening = {}
    ranks = {}  # of those who may know
    for draft, of_base in zip(drafts, by_base, strict=True):
        name = draft.adapter
        opening[name] = of_base[0] if of_base else 0.0
        known[name] = 0.0
        if sum(draft.logprobs) - sum(of_base) < SAYS:
            continue
        sure = sureness(draft.logprobs, of_base)
        odds = log_odds(sure, nats, is_later=_is_later(query, plan, name))
        known[name] = probability(odds)
        if known[name] > CLAIM:
            ranks[name] = _unusually_sure(query, name, sure)
            ranks[name] += AMONG * plan.why[name].scores["question"]
    # Who gives a form is unusually sure of that, so it has to be surer than others of what it says.
    others = [name for name in ranks if name != form]
    knower = max(others, key=ranks.__getitem__, default=None)
    if form in ranks and (knower is None or known[form] > known[knower]):
        knower = form
    return Heard({draft.adapter: draft for draft in drafts}, known, opening, knower)


def _unusually_sure(query: Query, name: str, sure: float) -> float:
    """Tell how far an adapter is surer than of everyday answers, in standard deviations.

    One that was trained for too long is sure of whatever it makes up.
    """
    typical = query.typical[name][SURENESS]
    return float((sure - typical["mean"]) / typical["spread"])


def _first(draft: Draft) -> Draft:
    """Give a draft's first N_DRAFT tokens; one that was begun before may have more."""
    if len(draft.tokens) <= N_DRAFT:
        return draft
    tokens = draft.tokens[:N_DRAFT]
    return replace(draft, tokens=tokens, logprobs=draft.logprobs[:N_DRAFT], is_whole=False)


def _relayed(reading: Reading, plan: Plan, heard: Heard, knower: str, form: str | None) -> Plan:
    """Let who knows draft for who gives the form; else answer alone, in the question's language."""
    query = reading.query
    (draft,) = reading.drafts([knower], N_DRAFT)
    of_knower = f"{knower} most probably knows ({heard.known[knower]:.0%})"
    plan = replace(plan, known=heard.known, sure=heard.known[knower])
    writer = form
    if form is None and heard.opening[knower] < -FOREIGN:
        writer = BASE
    if writer is None:
        alone = WriteStep(alone_weights(knower, query.adapters, query.n_layer), "", draft.tokens)
        because = f"{of_knower}, and answers alone."
        return replace(plan, steps=(alone,), because=because)
    drafting = DraftStep(knower, draft=draft, is_done=draft.is_whole)
    if _takes_form(reading, knower, writer):
        drafting = DraftStep(knower, is_in_words=True)
    writing = WriteStep(alone_weights(writer, query.adapters, query.n_layer), "before")
    because = f"{of_knower} and drafts, {writer} writes with the draft in view."
    return replace(plan, steps=(drafting, writing), because=because)


def _takes_form(reading: Reading, knower: str, writer: str) -> bool:
    """Tell whether a knower would begin as who gives the form does."""
    if writer in (BASE, knower):
        return False
    of_knower, of_writer = reading.drafts([knower, writer], 1)
    return of_knower.tokens[:1] == of_writer.tokens[:1]


def _confirmed(query: Query, plan: Plan, heard: Heard, form: str | None) -> Plan:
    """Keep two-place's choice, unless its first makes up a short answer: then the base answers."""
    plan = replace(plan, known=heard.known)
    first = _heaviest(query, plan)
    if first is None or first == form or first not in heard.drafts:
        return plan
    draft = heard.drafts[first]
    is_known = heard.known[first] > CLAIM
    if is_known or not draft.is_whole:
        return plan
    step = WriteStep(alone_weights(BASE, query.adapters, query.n_layer))
    because = f"The base answers alone: {first} is unsure of its short answer."
    return replace(plan, steps=(step,), because=because)


def _by_hand(reading: Reading) -> Plan:
    query = reading.query
    if not query.can_draft:
        raise StrategyError(
            "Strategy relay with a knower and a writer got plain text, or a base that thinks, "
            "expected a chat whose answer begins at once; use another strategy."
        )
    knower = query.options["knower"]
    writer = query.options["writer"]
    weights = alone_weights(writer, query.adapters, query.n_layer)
    drafting = DraftStep(knower, is_in_words=_takes_form(reading, knower, writer))
    because = f"{knower} drafts, {writer} writes with the draft in view, as you asked."
    return Plan((drafting, WriteStep(weights, "before")), because=because)


def _opening(query: Query, name: str) -> float:
    """Give log p, in nats, of what an adapter's everyday answers begin with, as the base's."""
    return float(query.typical[name][OPENING]["mean"])


def _heaviest(query: Query, plan: Plan) -> str | None:
    """Name the adapter with the largest weight; None where the base answers alone."""
    import numpy as np

    means = np.asarray(plan.weights).mean(axis=1)
    return query.adapters[int(means.argmax())] if means.max() > 0 else None


def _weights(plan: Plan) -> F32:
    """Give the weights [n_adapter, n_layer] of an answer that nobody relays."""
    import numpy as np

    return np.asarray(plan.weights, np.float32)


STRATEGIES = (RelayStrategy(),)
