"""`two-place`: one adapter for the kind of answer, one for the question's language or subject.

Two places are measured in one pass of the base alone: the last token of a chat prompt, where the
answer begins, and the question's own tokens. The measure is what each adapter would add to q, k
and v there, compared with what is typical of it. The adapter that stands out most where the answer
begins is the first; another that stands out in the question is the second. Without a second one
the first has both weights. Where none stands out at the answer, the base answers alone. An adapter
that is the only one in use is chosen without a measure.
"""

from collections.abc import Mapping
from typing import Any

from qaflora_edge.arrays import F32, F64
from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.divergence import check_typical
from qaflora_edge.weighing.strategy import ADDED, Mix, Probe, Query, Strategy

RAMP = 0.5  # standard deviations between the base alone and the whole mix

# fmt: off
_OPTIONS = (
    Option("answer", float, 0.5, low=0, high=16, metavar="W",
           help="the weight of the adapter that is found where the answer begins"),
    Option("question", float, 0.5, low=0, high=16, metavar="W",
           help="the weight of the one that is found in the question"),
    Option("second", float, 1.0, low=-100, high=100, metavar="Z",
           help="none is taken from the question up to Z standard deviations: the other is alone"),
    Option("abstain", float, 1.5, low=-100, high=100, words=("never",), metavar="Z",
           help="the base answers alone up to Z standard deviations; 0.5 above, the mix is whole"),
)
# fmt: on


class TwoPlace(Strategy):
    """Weigh one adapter by the last token, another by the question; our own rule, see pair()."""

    name = "two-place"
    help = "one adapter by where the answer begins, one by the question's words; or the base"
    options = _OPTIONS
    reads_question = True
    measured = ADDED
    needs_typical = ("added_last", "added_text", "added_question")

    def check(self, argument: Any, query: Query) -> None:
        from qaflora_edge.weighing.calibration import adds_nothing

        keys = self.needs_typical
        check_typical(self.name, query, keys, f"({', '.join(keys)})")
        silent = [name for name in query.adapters if adds_nothing(query.typical[name])]
        if silent:
            raise StrategyError(
                "Strategy two-place compares what adapters add to q, k and v, but "
                f"{', '.join(silent)} adds nothing to any block's; use another strategy, or leave "
                "it out."
            )

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        import numpy as np

        from qaflora_edge.weighing.calibration import unusual

        options = _all_options(query)
        if _is_alone(query):
            return Mix(np.full((1, query.n_layer), options["answer"] + options["question"]))
        last, question = probe.added()
        if query.is_chat:
            in_question = unusual(query, "added_question", question)
            weights = pair(unusual(query, "added_last", last), in_question, options)
        else:  # plain text has no question: the most unusual adapter alone
            weights = np.zeros(len(last), np.float32)
            weights[unusual(query, "added_text", last).argmax()] = options["answer"]
        return Mix(np.repeat(weights[:, None], query.n_layer, axis=1), last)


STRATEGIES = (TwoPlace(),)


def pair(last: F64, question: F64, options: Mapping[str, Any]) -> F32:
    """Weigh adapters for a chat prompt: float32 [n_adapter].

    last, question  [n_adapter]  how unusual each adapter is there, in standard deviations
    """
    import numpy as np

    weights = np.zeros(len(last), np.float32)
    first = int(last.argmax())
    others = np.where(np.arange(len(last)) == first, -np.inf, question)
    second = int(others.argmax())
    is_second = others[second] > options["second"]
    weights[second if is_second else first] = options["question"]
    weights[first] += options["answer"]
    if options["abstain"] == "never":
        return weights
    return weights * np.float32(np.clip((last.max() - options["abstain"]) / RAMP, 0.0, 1.0))


def _is_alone(query: Query) -> bool:
    """Tell whether the only adapter is chosen without a measure."""
    return len(query.adapters) == 1 and "abstain" not in query.options


def _all_options(query: Query) -> dict[str, Any]:
    return {option.name: option.default for option in _OPTIONS} | dict(query.options)
