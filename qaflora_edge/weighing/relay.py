"""`relay`: who knows drafts an answer, and who gives it a form writes with the draft in view.

A sum of two adapters loses what each has learnt: one of facts and one of JSON write wrong numbers
together. Text carries a fact without loss. So two-place's choice stands unless an adapter knows:
it is sure of its draft where the base is surprised by it, and the question surprises the base too.
docs/strategies.md has the rule in words, docs/results.md where its constants come from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.known import (
    SURPRISED,
    TAUGHT,
    TAUGHT_RANK,
    Heard,
    Taught,
    log_odds,
    probability,
    recognised,
    sureness,
    taught_by,
    told_probability,
)
from qaflora_edge.weighing.plan import BASE, Draft, DraftStep, Plan, WriteStep, alone_weights
from qaflora_edge.weighing.strategy import Query, Reading
from qaflora_edge.weighing.two_place import (
    FIRST,
    STANDS_OUT,
    TWO_PLACE_OPTIONS,
    TwoPlace,
    added_by_prompt,
    caution,
    places,
)

OPENING, SURENESS = DRAFTED = "opening", "sureness"  # of calibration.KEYS

N_DRAFT = 14  # tokens of a draft that tell whether its adapter knows
N_ASKED = 3  # adapters that draft because they may know, and as many that may give a form
NEAR = 2.0  # spreads: who knows stands out in the question nearly as far as whoever does most
N_OPENING = 3  # tokens in which a form begins

CLAIM = 0.4  # probability from which an adapter may know; up to half of it, it makes things up
SURELY = 3.5  # spreads at the last token, from which nobody asks what an adapter knows
FORMS_ALL = 7.0  # nats by which answers to everyday prompts begin as the base's never do
GOES_ON = 2.0  # nats by which what was said before makes a later turn less surprising
MARGIN = 0.5  # spreads by which a place, or an opening, differs from another

# fmt: off
_OPTIONS = (
    *TWO_PLACE_OPTIONS,
    Option("knower", str, metavar="NAME", help="who drafts: an adapter, or base"),
    Option("writer", str, metavar="NAME", help="who writes with the draft in view"),
)
# fmt: on


@dataclass(frozen=True)
class Subject:
    """Say what a question is about.

    nats     by which it surprises the base, or one that it goes on from
    scores   adapter -> how far it stands out in it, or in one of these
    goes_on  whether it goes on from what was said before
    """

    nats: float
    scores: dict[str, float]
    goes_on: bool


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
        taught = taught_by(reading) if query.is_chat else Taught()
        if taught.decides and taught.closest == BASE:
            return _as_taught(query, plan, taught)
        may_draft = query.is_chat and query.can_draft and not query.has_results
        if not may_draft or len(query.adapters) < 2:
            return _as_taught(query, plan, taught) if taught.decides else plan
        subject = _subject(reading, plan)
        at_last, own = _standing_out(reading)
        may_form = _may_form(plan, at_last)
        can_know = _can_know(subject.nats)
        # Who stands out at the last token of a question that surprises nobody seldom is a form.
        least = 0.0 if can_know else SURELY
        forms = [name for name, score in may_form.items() if score >= least]
        may_know = subject.scores if can_know else {}
        asked = _asked(query, plan, forms, may_know)
        may_be_own = _may_be_own(reading, own, at_last) if can_know else None
        if may_be_own is not None and may_be_own not in asked:
            asked.append(may_be_own)
        if taught.closest not in ("", BASE, *asked):
            asked.append(taught.closest)
        heard = _heard(reading, plan, asked, may_form, subject, taught)
        plan = replace(plan, known=heard.known)
        if heard.knower is not None and heard.knower != heard.form:
            sure = _sure(reading, subject, heard, heard.knower)
            return _relayed(reading, replace(plan, sure=sure), heard, heard.knower, at_last)
        if taught.decides:
            return _as_taught(query, plan, taught)
        plan = _undisturbed(query, plan, heard)
        is_form_sure = heard.form is not None and at_last[heard.form] >= SURELY
        if is_form_sure and heard.form != may_be_own:
            may_be_own = None
        if may_be_own is not None and _has_learnt(query, heard, may_be_own, own):
            return _left_to(query, plan, may_be_own)
        return _confirmed(reading, plan, subject, heard, forms)


def _subject(reading: Reading, plan: Plan) -> Subject:
    """Tell what the question is about: the most of all questions that it goes on from counts."""
    import numpy as np

    from qaflora_edge.weighing.calibration import above_typical, without_system

    query = reading.query
    nats = reading.surprise()
    scores = {name: reason.scores["question"] for name, reason in plan.why.items()}
    alone = Subject(nats, scores, goes_on=False)
    if not query.is_later:
        return alone
    earlier_nats, earlier_added = reading.earlier()  # mostly remembered: goes_on() is not
    most = max(nats, earlier_nats)
    if not _can_know(most) or reading.goes_on() < GOES_ON:
        return alone
    for added in earlier_added:
        if query.neutral:
            both = np.stack([added, added])
            _, added = without_system(query, both, FIRST, reading.neutral())
        above = above_typical(query, FIRST[1], added).tolist()
        for name, score in zip(query.adapters, above, strict=True):
            scores[name] = max(scores[name], score)
    return Subject(most, scores, goes_on=True)


def _as_taught(query: Query, plan: Plan, taught: Taught) -> Plan:
    """Let who is closest to its examples answer alone."""
    weights = alone_weights(taught.closest, query.adapters, query.n_layer)
    return replace(plan, steps=(WriteStep(weights),), because=taught.because())


def _can_know(nats: float) -> bool:
    """Tell whether the surest draft would claim to be right, behind a question of these nats."""
    return probability(log_odds(0.0, nats)) > CLAIM


def _standing_out(reading: Reading) -> list[dict[str, float]]:
    """Give how far each adapter stands out beyond what adapters alike do.

    returns  at the last token, and in the question
    """
    from qaflora_edge.weighing.calibration import unusual

    query = reading.query
    by_place = []
    for place, added in zip(places(query), added_by_prompt(reading), strict=True):
        scores = unusual(query, {place: added}).tolist()
        by_place.append(dict(zip(query.adapters, scores, strict=True)))
    return by_place


def _may_form(plan: Plan, at_last: Mapping[str, float]) -> dict[str, float]:
    """Give who may give the answer its form, and the score at the last token of each.

    They stand out there, and more than in the question, or twice as far.
    """
    may_form: dict[str, float] = {}
    pairs = [(score, name) for name, score in at_last.items()]
    for score, name in sorted(pairs, reverse=True):
        leading = min(plan.why[name].scores["question"] + MARGIN, 2 * STANDS_OUT)
        if score >= max(STANDS_OUT, leading) and len(may_form) < N_ASKED:
            may_form[name] = score
    return may_form


def _may_be_own(
    reading: Reading, own: Mapping[str, float], at_last: Mapping[str, float]
) -> str | None:
    """Name who has a way of its own to answer, and whose kind of request the question may be."""
    least = MARGIN * caution(reading)
    query = reading.query
    likely = [name for name, score in own.items() if score > least and at_last[name] > -MARGIN]
    may = [name for name in likely if _has_habit(query, name)]
    return max(may, key=own.__getitem__, default=None)


def _has_learnt(query: Query, heard: Heard, name: str, own: Mapping[str, float]) -> bool:
    """Tell whether an adapter has learnt requests like this one, such as commands for a shell.

    It answers in its own way whatever is asked, and here too, surer than it mostly is. As many
    answers are right, it need not be as sure as who knows. Who stands out more in the question says
    what the base would, as a language does.
    """
    is_sure = heard.says(name) and _unusually_sure(query, heard, name) >= 0
    others = [other for other, score in own.items() if score > own[name]]
    say_nothing = all(other in heard.drafts and not heard.says(other) for other in others)
    return is_sure and say_nothing and _begins_oddly(query, heard, name)


def _asked(
    query: Query, plan: Plan, forms: Sequence[str], may_know: Mapping[str, float]
) -> list[str]:
    """Name who drafts: who may know or give a form, if anybody can know, and two-place's first.

    An adapter that gives its form, whatever is asked or now, says little of what it knows.

    may_know  adapter -> how far it stands out in the question; nobody: the base expects it
    """
    least = max(may_know.values(), default=0.0) - NEAR
    near = [name for name, score in may_know.items() if name not in forms and score >= least]
    knowers = [name for name in near if not _forms_all(query, name)]
    asked = sorted(knowers, key=may_know.__getitem__, reverse=True)[:N_ASKED]
    if asked:
        asked += forms
    first = _heaviest(query, plan)
    if first is not None and first not in forms and first not in asked:
        asked.append(first)
    return asked


def _heard(
    reading: Reading,
    plan: Plan,
    asked: Sequence[str],
    may_form: Mapping[str, float],
    subject: Subject,
    taught: Taught,
) -> Heard:
    if not asked:
        return Heard({}, {}, {})
    query = reading.query
    drafts = [_first(draft) for draft in reading.drafts(asked, N_DRAFT, plan.weights)]
    by_base = dict(zip(asked, reading.base_logprobs(drafts), strict=True))
    heard = Heard(dict(zip(asked, drafts, strict=True)), by_base, {})
    forms = _forms(query, heard, may_form)
    form = max(forms, key=forms.__getitem__, default=None)
    known = dict.fromkeys(asked, 0.0)
    unusual = {}  # how unusually sure each is that may know, in spreads
    for name, draft in heard.drafts.items():
        if not heard.says(name):
            continue
        sure = sureness(draft.logprobs, by_base[name])
        odds = log_odds(sure, subject.nats) + TAUGHT * taught.ahead(name)
        known[name] = probability(odds)
        is_other_form = name != form and _forms_all(query, name)
        if known[name] > CLAIM / 2 and not is_other_form:
            # One that was trained for too long is sure of whatever it makes up.
            unusual[name] = _unusually_sure(query, heard, name)
    by_words = {}  # how far each of them recognises the question
    if any(known[name] > CLAIM for name in unusual):
        by_words = _recognised(reading, subject, list(unusual))
    ranks = {
        name: unusual[name] + nats + TAUGHT_RANK * taught.ahead(name)
        for name, nats in by_words.items()
    }
    # Who gives a form is sure of that, so it has to be ahead of others in the question too.
    others = [name for name in ranks if name not in forms]
    knower = max(others, key=ranks.__getitem__, default=None)
    scores = subject.scores
    if form in ranks and (
        knower is None or (known[form] > known[knower] and scores[form] >= scores[knower])
    ):
        knower = form
    return replace(heard, known=known, recognised=by_words, form=form, knower=knower)


def _unusually_sure(query: Query, heard: Heard, name: str) -> float:
    """Tell how much surer an adapter is of its draft than it mostly is, in spreads."""
    sure = sureness(heard.drafts[name].logprobs, heard.by_base[name])
    typical = query.typical[name][SURENESS]
    return float((sure - typical["mean"]) / typical["spread"])


def _recognised(reading: Reading, subject: Subject, names: Sequence[str]) -> dict[str, float]:
    """Tell of each adapter how far it expects words of the question that the base does not."""
    of_base, *expected = reading.expected([BASE, *names], subject.goes_on)
    return {
        name: recognised(logprobs, of_base) for name, logprobs in zip(names, expected, strict=True)
    }


def _sure(reading: Reading, subject: Subject, heard: Heard, name: str) -> float:
    """Give the probability that the answer of an adapter is right that is taken."""
    by_words = heard.recognised
    if name not in by_words:
        by_words = _recognised(reading, subject, [name])
    return told_probability(heard.known[name], by_words[name])


def _forms(query: Query, heard: Heard, may_form: Mapping[str, float]) -> dict[str, float]:
    """Give who begins in a form that the question asks for, and how far each stands out."""
    return {
        name: score
        for name, score in may_form.items()
        if heard.by_base.get(name) and _begins_as_asked(query, heard, name)
    }


def _begins_as_asked(query: Query, heard: Heard, name: str) -> bool:
    """Tell whether an adapter begins in a form, and the question asks for that.

    The base would not begin so; a word of the question, such as a name, is no form. Nor is a habit:
    a knower that was taught in one language often begins in that. One that gives all its form
    begins less oddly where it is asked.
    """
    if _forms_all(query, name):
        usual = query.typical[name][OPENING]
        return heard.by_base[name][0] >= float(usual["mean"]) + MARGIN * float(usual["spread"])
    return _begins_oddly(query, heard, name) and not _has_habit(query, name)


def _begins_oddly(query: Query, heard: Heard, name: str) -> bool:
    """Tell whether an adapter begins as the base would not; a word of the question is not odd."""
    opening = heard.by_base[name][:N_OPENING]  # log p as the base's
    asked = query.tokens[slice(*query.question)]
    pairs = zip(heard.drafts[name].tokens, opening, strict=False)
    return any(p <= -SURPRISED and token not in asked for token, p in pairs)


def _first(draft: Draft) -> Draft:
    """Give a draft's first N_DRAFT tokens; one that was begun before may have more."""
    tokens = draft.tokens[:N_DRAFT]
    is_whole = draft.is_whole and tokens == draft.tokens
    return replace(draft, tokens=tokens, logprobs=draft.logprobs[:N_DRAFT], is_whole=is_whole)


def _relayed(
    reading: Reading, plan: Plan, heard: Heard, knower: str, at_last: Mapping[str, float]
) -> Plan:
    """Let who knows draft for who gives the form; else answer alone, in the question's language."""
    query = reading.query
    (draft,) = reading.drafts([knower], N_DRAFT)
    of_knower = f"{knower} most probably knows ({plan.sure:.0%})"
    writer = _writer(query, heard, knower, at_last)
    is_foreign = _begins_in_words(reading, heard, knower) < -SURPRISED
    if writer is None and is_foreign and not _forms_all(query, knower):
        writer = BASE
    if writer is None:
        weights = alone_weights(knower, query.adapters, query.n_layer)
        alone = WriteStep(weights, "", draft.tokens)
        return replace(plan, steps=(alone,), because=f"{of_knower}, and answers alone.")
    drafting = DraftStep(knower, begun=draft)
    if _takes_form(reading, knower, writer):
        drafting = DraftStep(knower, is_in_words=True)
    writing = WriteStep(alone_weights(writer, query.adapters, query.n_layer), "before")
    because = f"{of_knower} and drafts, {writer} writes with the draft in view."
    return replace(plan, steps=(drafting, writing), because=because)


def _writer(query: Query, heard: Heard, knower: str, at_last: Mapping[str, float]) -> str | None:
    """Name who gives the form, if the question asks for it rather than for the knower's words.

    It stands out at the last token more than who knows. Of two beginnings the base expects that
    more which is asked for. So a form, or another knower's way to begin, is not asked for where the
    base is far less surprised by the knower's.
    """
    form = heard.form
    if form is None or at_last[form] <= at_last[knower]:
        return None
    of_form = heard.by_base[form][0]
    of_knower = heard.by_base[knower][0]
    is_asked_for = _forms_all(query, form) or of_form > of_knower - SURPRISED
    return form if is_asked_for else None


def _begins_in_words(reading: Reading, heard: Heard, name: str) -> float:
    """Give the base's log p of a draft's first token, or of the one behind a name, in nats.

    A name of the question is of no language.
    """
    query = reading.query
    asked = query.tokens[slice(*query.question)]
    draft = heard.drafts[name]
    first, *others = zip(draft.tokens, heard.by_base[name], strict=True)
    if draft.text.strip().partition(" ")[0] in reading.question():
        behind = [logprob for token, logprob in others if token not in asked]
        return next(iter(behind), 0.0)
    return first[1]


def _takes_form(reading: Reading, knower: str, writer: str) -> bool:
    """Tell whether a knower would begin as who gives the form does."""
    if writer in (BASE, knower):
        return False
    of_knower, of_writer = reading.drafts([knower, writer], 1)
    return of_knower.tokens[:1] == of_writer.tokens[:1]


def _confirmed(
    reading: Reading, plan: Plan, subject: Subject, heard: Heard, forms: Iterable[str]
) -> Plan:
    """Keep two-place's choice, unless its first makes its answer up: then the base answers."""
    query = reading.query
    first = _heaviest(query, plan)
    if first is None or first not in heard.drafts or first == heard.form:
        return plan
    known = heard.known[first]
    is_own = heard.says(first) and first not in forms
    is_made_up = is_own and known <= CLAIM / 2
    is_unsure_whole = known <= CLAIM and heard.drafts[first].is_whole
    if not is_made_up and not is_unsure_whole:
        sure = _sure(reading, subject, heard, first) if is_own else None
        return replace(plan, sure=sure)
    step = WriteStep(alone_weights(BASE, query.adapters, query.n_layer))
    because = f"The base answers alone: {first} is unsure of its answer."
    return replace(plan, steps=(step,), because=because)


def _undisturbed(query: Query, plan: Plan, heard: Heard) -> Plan:
    """Leave out a second adapter that would answer with a whole fact of its own.

    A language says what the base would. A fact that is not taken spoils the first one's numbers.
    Who stands out in the question more than the first may be what it is about, and stays.
    """
    import numpy as np

    first = _heaviest(query, plan)
    if first is None:
        return plan
    leading = plan.why[first].scores["question"]
    for name, draft in heard.drafts.items():
        reason = plan.why[name]
        is_second = reason.taken_as == "question" and reason.scores["question"] <= leading
        if is_second and draft.is_whole and heard.says(name):
            weights = np.array(plan.weights)
            weights[query.adapters.index(name)] = 0
            why = {**plan.why, name: replace(reason, taken_as="")}
            because = f"{plan.because} {name} is left out: it would say something else."
            return replace(plan, steps=(WriteStep(weights),), why=why, because=because)
    return plan


def _by_hand(reading: Reading) -> Plan:
    query = reading.query
    if not query.can_draft:
        raise StrategyError(
            "Strategy relay with a knower and a writer got plain text, or a base that thinks, "
            "expected a chat whose answer begins at once; use another strategy."
        )
    knower = query.options["knower"]
    writer = query.options["writer"]
    drafting = DraftStep(knower, is_in_words=_takes_form(reading, knower, writer))
    writing = WriteStep(alone_weights(writer, query.adapters, query.n_layer), "before")
    because = f"{knower} drafts, {writer} writes with the draft in view, as you asked."
    return Plan((drafting, writing), because=because)


def _left_to(query: Query, plan: Plan, name: str) -> Plan:
    """Let an adapter answer alone whose own kind of request the question is."""
    if name == _heaviest(query, plan):
        return plan
    step = WriteStep(alone_weights(name, query.adapters, query.n_layer))
    because = f"{name} has learnt requests like this, and answers alone."
    return replace(plan, steps=(step,), because=because)


def _has_habit(query: Query, name: str) -> bool:
    """Tell whether an adapter mostly begins as the base would not, whatever is asked."""
    return float(query.typical[name][OPENING]["mean"]) <= -SURPRISED


def _forms_all(query: Query, name: str) -> bool:
    """Tell whether an adapter gives its form to whatever is asked."""
    return float(query.typical[name][OPENING]["mean"]) < -FORMS_ALL


def _heaviest(query: Query, plan: Plan) -> str | None:
    """Name the adapter with the largest weight; None where the base answers alone."""
    import numpy as np

    means = np.asarray(plan.weights).mean(axis=1)
    return query.adapters[int(means.argmax())] if means.max() > 0 else None


STRATEGIES = (RelayStrategy(),)
