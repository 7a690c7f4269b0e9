"""`two-place`: one adapter for the whole prompt, one for the question's language or subject.

One pass of the base measures what each adapter would add to q, k and v at the last token of a chat
prompt, where the answer begins, and in the question. It is compared with what is typical of the
adapter in such a turn, the first or a later one. pair() takes the highest of both places together,
and perhaps another in the question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from qaflora_edge.arrays import F32, F64
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.plan import ANSWER, BASE, Plan, Reason
from qaflora_edge.weighing.strategy import ADDED, Options, Query, Reading, Strategy

Taken = dict[int, str]  # adapter's index -> the place that it is taken for, the answer first
FIRST, LATER = ("added_last", "added_question"), ("later_last", "later_question")
STANDS_OUT = 1.25  # standard deviations
LEAST_SURPRISE = 10  # nats; below, a threshold says no more
TEXT = 2  # times the threshold, for plain text: it is heard in one place alone
N_OPENING = 8  # tokens of a draft that tell whether it begins with a call of a tool
FAMILIAR = 50  # nats; where a question surprises the base by half of it, a score has to be double

# fmt: off
TWO_PLACE_OPTIONS = (
    Option("answer", float, 1.0, low=0, high=16, metavar="W",
           help="the weight of the first adapter"),
    Option("question", float, 0.5, low=0, high=16, metavar="W",
           help="the weight of the second adapter"),
    Option("second", float, 1.25, low=-100, high=100, metavar="Z",
           help="no second adapter at a score of Z or below"),
    Option("abstain", float, STANDS_OUT, low=-100, high=100, words=("never",), metavar="Z",
           help="the base answers alone at a score of Z or below, more for a question that the "
           "base expects; never: it never does"),
)
# fmt: on


class TwoPlace(Strategy):
    name = "two-place"
    help = "one adapter by the whole prompt, one by the question's words; or the base"
    options: ClassVar[tuple[Option, ...]] = TWO_PLACE_OPTIONS
    measured = ADDED
    is_base_prefilled = True
    reads_added = True
    needs_typical: ClassVar[tuple[str, ...]] = (*FIRST, "added_text", *LATER)

    def check(self, query: Query) -> None:
        from qaflora_edge.weighing.calibration import adds_nothing, check_typical

        check_typical(self.name, query, self.needs_typical)
        silent = [name for name in query.adapters if adds_nothing(query.typical[name])]
        if silent:
            raise StrategyError(
                "Strategy two-place compares what adapters add to q, k and v, but "
                f"{', '.join(silent)} adds nothing to any block's; use another strategy, or leave "
                "it out."
            )

    def plan(self, reading: Reading) -> Plan:
        import numpy as np

        query = reading.query
        options = {option.name: option.default for option in self.options}
        options |= query.options
        if len(query.adapters) == 1 and "abstain" not in query.options:
            whole = np.full((1, query.n_layer), options["answer"])
            return Plan.mix(whole, because=f"{query.adapters[0]} is the only adapter in use.")
        last, question = added_by_prompt(reading)
        scores = _scores(query, last, question)
        first_scores = next(iter(scores.values()))  # [n_adapter]
        is_familiar = False
        asked = options["abstain"]
        if asked is not None:
            options["abstain"] *= caution(reading)
            is_familiar = query.is_chat and first_scores.max() > asked
        if query.is_chat:
            weights, taken = pair(scores["answer"], scores["question"], options)
        else:
            weights, taken = single(scores["text"], options)
        if not query.is_chat:
            asked = options["abstain"]
        reasons, because = _told(
            query.adapters, scores, taken, options, asked=asked, is_familiar=is_familiar
        )
        by_layer = np.repeat(weights[:, None], query.n_layer, axis=1)
        if taken and asked is not None and _calls_alone(reading, by_layer):
            by_layer = np.zeros_like(by_layer)
            reasons = {name: replace(reason, taken_as="") for name, reason in reasons.items()}
            because = "The base answers alone: the mix would call a tool, and the base would not."
        return Plan.mix(by_layer, last, reasons, because)


STRATEGIES = (TwoPlace(),)


def _calls_alone(reading: Reading, weights: F32) -> bool:
    """Tell whether the mix would begin with a call of a tool, and the base would not.

    weights  [n_adapter, n_layer] of the mix
    """
    calls = reading.query.calls
    if calls is None or not reading.query.can_draft:
        return False
    of_mix, of_base = reading.drafts([ANSWER, BASE], N_OPENING, weights)
    return calls.begins(of_mix.text) and not calls.begins(of_base.text)


def places(query: Query) -> tuple[str, str]:
    """Name what is typical of a chat's last token, and of its question."""
    return LATER if query.is_later else FIRST


def added_by_prompt(reading: Reading) -> F64:
    """Give what adapters add at the last token and in the question, but for a system prompt.

    returns  [2, n_adapter, n_layer]
    """
    from qaflora_edge.weighing.calibration import without_system

    query = reading.query
    added = reading.added()
    if not query.neutral:
        return added
    return without_system(query, added, places(query), reading.neutral())


def _scores(query: Query, last: F64, question: F64) -> dict[str, F64]:
    """Give how unusual each adapter is, [n_adapter], by place; the answer's first.

    last, question  [n_adapter, n_layer]  what is added at the last token, and in the question
    """
    from qaflora_edge.weighing.calibration import above_typical, unusual

    if not query.is_chat:  # plain text has no question
        return {"text": unusual(query, {"added_text": last})}
    at_last, in_question = places(query)
    return {
        "answer": unusual(query, {at_last: last, in_question: question}),
        "question": above_typical(query, in_question, question),
    }


def caution(reading: Reading) -> float:
    """Say how many times the threshold a first adapter needs: more where the base is at home."""
    if not reading.query.is_chat:
        return TEXT
    nats = max(reading.surprise(), LEAST_SURPRISE)
    return max(1.0, FAMILIAR / nats)


def single(text: F64, options: Options) -> tuple[F32, Taken]:
    """Weigh adapters for plain text: float32 [n_adapter], the most unusual one alone, or none.

    text  [n_adapter]  how unusual each is at the last token, in standard deviations
    """
    import numpy as np

    weights = np.zeros(len(text), np.float32)
    first = int(text.argmax())
    if options["abstain"] is not None and text[first] <= options["abstain"]:
        return weights, {}
    weights[first] = options["answer"]
    return weights, {first: "text"}


def pair(both: F64, question: F64, options: Options) -> tuple[F32, Taken]:
    """Weigh adapters for a chat prompt: float32 [n_adapter], and the place each is taken for.

    both, question  [n_adapter]  how unusual each adapter is, in standard deviations: where the
                                 answer begins and in the question together, and in the question
    """
    import numpy as np

    weights = np.zeros(len(both), np.float32)
    first = int(both.argmax())
    if options["abstain"] is not None and both[first] <= options["abstain"]:
        return weights, {}
    weights[first] = options["answer"]
    taken = {first: "answer"}
    others = question.copy()
    others[first] = -np.inf
    second = int(others.argmax())
    if others[second] > options["second"]:
        weights[second] = options["question"]
        taken[second] = "question"
    return weights, taken


def _told(
    names: Sequence[str],
    scores: Mapping[str, F64],
    taken: Taken,
    options: Options,
    *,
    asked: float | None,
    is_familiar: bool,
) -> tuple[dict[str, Reason], str]:
    """Give each adapter's numbers, and say in words what decided.

    scores  place -> [n_adapter], how unusual each adapter is there; the answer's first
    asked   score that the first needs, where the question surprises the base; None: none
    is_familiar  whether the first would do for a question that surprises the base more
    """
    limits = {
        "answer": options["abstain"],
        "text": options["abstain"],
        "question": options["second"],
    }
    needed = {place: limits[place] for place in scores if limits[place] is not None}
    reasons: dict[str, Reason] = {}
    for i, name in enumerate(names):
        numbers = {place: float(score[i]) for place, score in scores.items()}
        reasons[name] = Reason(numbers, needed, taken.get(i, ""))
    highest = next(iter(scores.values()))  # [n_adapter]
    first = int(highest.argmax())
    if not taken:
        most = f"{names[first]} most: {highest[first]:.2f}"
        if is_familiar:
            return reasons, f"The base answers alone: it is sure of its answer ({most})."
        return reasons, (
            f"The base answers alone: no adapter stands out ({most}, needed: above {asked})."
        )
    said = [f"{names[first]}: {highest[first]:.1f} standard deviations above its typical prompt."]
    for i, its_place in taken.items():
        if i != first:
            said.append(f"{names[i]}: {scores[its_place][i]:.1f} in the question.")
    others = [reason for reason in reasons.values() if not reason.taken_as]
    if others:
        who = "The others are" if len(others) > 1 else "The other is"
        what = "typical" if all(map(_is_typical, others)) else "lower"
        said.append(f"{who} {what}.")
    return reasons, " ".join(said)


def _is_typical(reason: Reason) -> bool:
    for place, score in reason.scores.items():
        if score > reason.thresholds.get(place, STANDS_OUT):
            return False
    return True
