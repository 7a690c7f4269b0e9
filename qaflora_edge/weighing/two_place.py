"""`two-place`: one adapter for the whole prompt, one for the question's language or subject.

One pass of the base measures what each adapter would add to q, k and v at the last token of a chat
prompt, where the answer begins, and in the question. It is compared with what is typical of the
adapter in such a turn, the first or a later one. pair() takes the highest of both places together,
and perhaps another in the question.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qaflora_edge.arrays import F32, F64
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import ADDED, Mix, Probe, Query, Reason, Strategy
from qaflora_edge.weighing.unmeasured import check_typical

Taken = dict[int, str]  # adapter's index -> the place that it is taken for, the answer first
FIRST, LATER = ("added_last", "added_question"), ("later_last", "later_question")
STANDS_OUT = 1.25  # standard deviations
LEAST_SURPRISE = 10  # nats; below, a threshold says no more
TEXT = 2  # times the threshold, for plain text: it is heard in one place alone
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
    needs_typical: ClassVar[tuple[str, ...]] = (*FIRST, "added_text", *LATER)

    def check(self, argument: Any, query: Query) -> None:
        from qaflora_edge.weighing.calibration import adds_nothing

        check_typical(self.name, query, self.needs_typical, f"({', '.join(self.needs_typical)})")
        silent = [name for name in query.adapters if adds_nothing(query.typical[name])]
        if silent:
            raise StrategyError(
                "Strategy two-place compares what adapters add to q, k and v, but "
                f"{', '.join(silent)} adds nothing to any block's; use another strategy, or leave "
                "it out."
            )

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        import numpy as np

        from qaflora_edge.weighing.calibration import above_typical, unusual

        options = {option.name: option.default for option in self.options} | dict(query.options)
        if len(query.adapters) == 1 and "abstain" not in query.options:
            whole = np.full((1, query.n_layer), options["answer"])
            return Mix(whole, because=f"{query.adapters[0]} is the only adapter in use.")
        last, question = probe.added()
        asked_of_first = options["abstain"]
        if query.is_chat:
            if options["abstain"] != "never":
                options["abstain"] *= max(1, FAMILIAR / max(probe.surprise(), LEAST_SURPRISE))
            places = LATER if query.is_later else FIRST
            scores = {"answer": unusual(query, dict(zip(places, (last, question), strict=True)))}
            scores["question"] = above_typical(query, places[1], question)
            weights, taken = pair(scores["answer"], scores["question"], options)
        else:  # plain text has no question: the most unusual adapter alone
            if options["abstain"] != "never":
                options["abstain"] *= TEXT
            scores = {"text": unusual(query, {"added_text": last})}
            first = int(scores["text"].argmax())
            is_taken = options["abstain"] == "never" or scores["text"][first] > options["abstain"]
            taken = {first: "text"} if is_taken else {}
            weights = np.zeros(len(last), np.float32)
            weights[[*taken]] = options["answer"]
        highest = next(iter(scores.values())).max()
        is_familiar = query.is_chat and asked_of_first != "never" and highest > asked_of_first
        told = _told(query.adapters, scores, taken, options, is_familiar=is_familiar)
        return Mix(np.repeat(weights[:, None], query.n_layer, axis=1), last, *told)


STRATEGIES = (TwoPlace(),)


def pair(both: F64, question: F64, options: Mapping[str, Any]) -> tuple[F32, Taken]:
    """Weigh adapters for a chat prompt: float32 [n_adapter], and the place each is taken for.

    both, question  [n_adapter]  how unusual each adapter is, in standard deviations: where the
                                 answer begins and in the question together, and in the question
    """
    import numpy as np

    weights = np.zeros(len(both), np.float32)
    first = int(both.argmax())
    if options["abstain"] != "never" and both[first] <= options["abstain"]:
        return weights, {}
    weights[first], taken = options["answer"], {first: "answer"}
    others = np.where(np.arange(len(both)) == first, -np.inf, question)
    second = int(others.argmax())
    if others[second] > options["second"]:
        weights[second], taken[second] = options["question"], "question"
    return weights, taken


def _told(
    names: Sequence[str],
    scores: Mapping[str, F64],
    taken: Taken,
    options: Mapping[str, Any],
    *,
    is_familiar: bool,
) -> tuple[dict[str, Reason], str]:
    """Give each adapter's numbers, and say in words what decided.

    scores  place -> [n_adapter], how unusual each adapter is there; the answer's first
    is_familiar  whether the first would do for a question that surprises the base more
    """
    limits = {name: options["abstain"] for name in ("answer", "text")}
    limits["question"] = options["second"]
    needed = {p: limits[p] for p in scores if limits.get(p, "never") != "never"}
    numbers = [{p: float(z[i]) for p, z in scores.items()} for i in range(len(names))]
    reasons = {n: Reason(numbers[i], needed, taken.get(i, "")) for i, n in enumerate(names)}
    place, z = next(iter(scores.items()))
    first = int(z.argmax())
    if not taken:
        most = f"{names[first]} most: {z[first]:.2f}"
        if is_familiar:
            return reasons, f"The base answers alone: it is sure of its answer ({most})."
        return reasons, (
            "The base answers alone: no adapter stands out "
            f"({most}, needed: above {needed[place]:.3g})."
        )
    said = [f"{names[first]}: {z[first]:.1f} standard deviations above its typical prompt."]
    said += [f"{names[i]}: {numbers[i][p]:.1f} in the question." for i, p in taken.items()][1:]
    others = [i for i in range(len(names)) if i not in taken]
    is_typical = all(numbers[i][p] <= needed.get(p, STANDS_OUT) for i in others for p in scores)
    if others:
        who = "The others are" if len(others) > 1 else "The other is"
        said.append(f"{who} {'typical' if is_typical else 'lower'}.")
    return reasons, " ".join(said)
