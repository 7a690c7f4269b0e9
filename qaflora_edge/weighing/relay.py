"""`relay`: one adapter drafts an answer, another writes it with the draft in view.

A sum of two adapters loses what each has learnt: `company` and `json` together write wrong numbers
as JSON. Text carries it without loss. two-place's scores say who gives the answer its form, and who
may know more. Drafts decide: an adapter that is far surer of its draft than it is of its answers to
neutral prompts knows something. docs/strategies.md has the rule in words.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from qaflora_edge.arrays import F32
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.drafted import BASE, N_BEGUN, UNSURE, Draft, Relay
from qaflora_edge.weighing.strategy import Mix, Probe, Query
from qaflora_edge.weighing.two_place import TWO_PLACE_OPTIONS, TwoPlace

ALONE = 5.0  # score `answer` above which an adapter answers, and nobody else is asked
STRONG = 2.5  # score `answer` below which an adapter that is unsure is compared with the base
ANSWERS = 2.0  # score `answer` from which a second adapter would answer too
MAY_KNOW = 0.0  # score in the question above which an adapter may know more
PROPOSED = 0.3  # the same, where no adapter answers
N_CANDIDATE = 2  # adapters that draft beside who answers, at most
SURENESS = "sureness"  # of calibration.KEYS
SURE = 1.0  # spreads above its typical sureness an adapter is sure of its draft
UNSURE_FROM = 0.2  # spreads above it, below which who answers lets another draft
FAR_AHEAD = 1.8  # spreads between both, from which a knower need not be SURE
SURE_OF_EACH = -0.15  # nats: the least sure token, where the scores leave an adapter out
N_FACT = 32  # tokens of an answer that states a fact, at most
FOREIGN = 3.5  # nats: the base would not begin its answer so

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
    """Let drafts decide what the scores of two-place leave open."""
    import numpy as np

    writer = _heaviest(query, mix)
    by_question = {name: reason.scores["question"] for name, reason in mix.why.items()}
    ordered = sorted(query.adapters, key=lambda name: -by_question[name])
    if writer is None:
        proposed = [name for name in ordered[:1] if by_question[name] > PROPOSED]
        return _despite_the_scores(query, probe, mix, proposed)
    strength = mix.why[writer].scores["answer"]
    others = [name for name in ordered if name != writer and by_question[name] > MAY_KNOW]
    asked = [writer]
    if strength <= ALONE:
        others.sort(key=lambda name: mix.why[name].scores["answer"] < ANSWERS)  # those first
        asked += others[:N_CANDIDATE]
    if strength < STRONG:
        asked.append(BASE)
    drafts = probe.drafts(asked, N_BEGUN, np.asarray(mix.weights))
    sureness = {draft.adapter: draft.sureness(N_BEGUN) for draft in drafts}
    unusual = {
        draft.adapter: _unusual(query, draft)
        for draft in drafts
        if draft.adapter == writer or (draft.adapter != BASE and _is_prose(draft))
    }
    knower = max(unusual, key=unusual.__getitem__)
    both = _both_answer(mix, drafts)
    if both is not None:
        relay = _relay(query, probe, *both, sureness)
        return replace(mix, weights=_alone(query, both[1]), relay=relay, because=_said(relay))
    if unusual[writer] < UNSURE_FROM and _knows(unusual[knower], unusual[writer]):
        relay = _relay(query, probe, knower, writer, sureness)
        return replace(mix, weights=_alone(query, writer), relay=relay, because=_said(relay))
    if unusual[writer] < SURE and sureness.get(BASE, -inf) > sureness[writer]:
        numbers = f"{sureness[BASE]:.2f} nats a token, {writer} {sureness[writer]:.2f}"
        because = f"The base answers alone: it is surer of its draft ({numbers})."
        return replace(mix, weights=_alone(query, BASE), because=because)
    return _rewritten(query, probe, mix, writer, sureness)


def _despite_the_scores(query: Query, probe: Probe, mix: Mix, proposed: Sequence[str]) -> Mix:
    """Take an adapter that the scores leave out, where it is sure of each token of its draft.

    One that makes up an answer is unsure of the token that bears the fact.
    """
    import numpy as np

    if not proposed:
        return mix
    drafts = probe.drafts(proposed, N_BEGUN, np.asarray(mix.weights))
    sureness = {draft.adapter: draft.sureness(N_BEGUN) for draft in drafts}
    for draft in drafts:
        knows = _is_prose(draft) and _is_sure(query, draft) and not _repeats(query, draft)
        if knows and _is_sure_of_each(probe, draft):
            taken = replace(mix, weights=_alone(query, draft.adapter))
            return _rewritten(query, probe, taken, draft.adapter, sureness)
    return mix


def _both_answer(mix: Mix, drafts: Sequence[Draft]) -> tuple[str, str] | None:
    """Name a knower and a writer, where two adapters would answer, and one of them gives a form.

    Who is surest of the first token gives it.
    """
    strong = [
        draft
        for draft in drafts
        if draft.tokens and draft.adapter != BASE and _answers(mix, draft.adapter)
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


def _knows(knower: float, writer: float) -> bool:
    """Tell whether a knower is sure, or at least far surer than who writes.

    knower, writer  spreads above the typical sureness of each
    """
    is_ahead = knower >= UNSURE_FROM and knower - writer >= FAR_AHEAD
    return knower >= SURE or is_ahead


def _repeats(query: Query, draft: Draft) -> bool:
    """Tell whether a draft stands in the prompt already: to repeat an answer is no knowledge."""
    n_token = len(draft.tokens)
    starts = range(len(query.tokens) - n_token + 1)
    return any(query.tokens[at : at + n_token] == draft.tokens for at in starts)


def _is_sure_of_each(probe: Probe, draft: Draft) -> bool:
    """Tell whether a draft is a short answer, and its adapter sure of each token of it."""
    n_token = N_BEGUN
    while min(draft.logprobs, default=UNSURE) > SURE_OF_EACH:
        if draft.is_whole:
            return True
        n_token *= 2
        if n_token > N_FACT:
            return False
        (draft,) = probe.drafts([draft.adapter], n_token)
    return False


def _rewritten(
    query: Query,
    probe: Probe,
    mix: Mix,
    knower: str,
    sureness: Mapping[str, float],
) -> Mix:
    """Let the base write, in the question's language, what an adapter drafts in another one.

    mix  the knower's, which stays where nothing is rewritten
    """
    (begun,) = probe.drafts([knower], N_BEGUN)
    mix = replace(mix, begun=begun.tokens)
    if not begun.tokens or not _is_sure(query, begun):
        return mix
    if not _is_foreign(begun.text, probe.question()) or probe.unexpected(begun.tokens[0]) < FOREIGN:
        return mix
    relay = _relay(query, probe, knower, BASE, sureness)
    return replace(mix, weights=_alone(query, BASE), relay=relay, because=_said(relay))


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
    """Relay between the two that the caller names."""
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
) -> Relay:
    (draft,) = probe.drafts([knower], N_BEGUN)
    if draft.tokens and not _is_prose(draft):
        nothing = replace(draft, tokens=(), text="", logprobs=(), is_whole=False)
        return Relay(
            knower, writer, nothing, is_in_words=True, sureness=sureness, prompt=query.tokens
        )
    is_drafted = draft.is_whole
    return Relay(knower, writer, draft, is_drafted, sureness=sureness, prompt=query.tokens)


def _said(relay: Relay) -> str:
    """Say who knew and who wrote, and how sure each was."""
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
