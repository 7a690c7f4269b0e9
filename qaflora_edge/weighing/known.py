"""What drafts tell: how sure an adapter is where the base is surprised, and what it recognises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

from qaflora_edge.weighing.plan import BASE, Draft
from qaflora_edge.weighing.strategy import Closeness, Reading

# A logistic regression over drafts of adapters that know, and of those that make answers up.
SURE = 9.2  # log-odds for each nat of sureness()
SURPRISING = 2.4  # for each e-fold of what the question surprises the base by
USUAL = -8.7  # where all of that is 0
MOST_SURPRISED = 6.0  # nats; a token that surprises the base more counts no more
LEAST_SURPRISED = 0.5  # nats, of a draft that says what the base says

# What is told of an answer beside these log-odds: a logistic regression over taken drafts.
TOLD_RECOGNISED = 1.2  # for each one of recognised()
TOLD_AT_0 = -1.5

SURPRISED = 3.5  # nats from which an adapter, a form or a language is not the base's

# What examples tell, by margins of their regression: benchmarks/zoo has what each is worth.
CLOSE, CLOSE_NEXT = 0.3, 0.2  # over nobody and over the next one, from which they decide
MAYBE_CLOSE = 0.1  # over nobody, from which who is closest drafts
TAUGHT = 8.0  # log-odds that a draft is right, for each 1 over the next one
TAUGHT_RANK = 4.0  # spreads among those who may know, likewise
MOST_TAUGHT = 0.5  # over the next one; more counts no more


@dataclass(frozen=True)
class Heard:
    """Hold what the drafts of one query tell.

    drafts   adapter -> its draft
    by_base  adapter -> log p, in nats, of its draft's tokens as the base's
    known    adapter -> probability that its draft is right
    recognised  adapter -> recognised() of the question, where several may know
    form     who gives the answer its form; None: nobody
    knower   who knows; None: nobody
    """

    drafts: Mapping[str, Draft]
    by_base: Mapping[str, Sequence[float]]
    known: Mapping[str, float]
    recognised: Mapping[str, float] = field(default_factory=dict)
    form: str | None = None
    knower: str | None = None

    def says(self, name: str) -> bool:
        """Tell whether an adapter says what the base would not."""
        return sum(self.drafts[name].logprobs) - sum(self.by_base[name]) >= SURPRISED


def sureness(logprobs: Sequence[float], of_base: Sequence[float]) -> float:
    """Tell how sure an adapter is of its draft where the base is surprised by it, in nats.

    logprobs  log p of the draft's tokens under the adapter, [n_token]
    of_base   the same under the base
    returns   at most 0: the mean of logprobs, weighted by the base's surprise at each token
    """
    surprises = [min(-logprob, MOST_SURPRISED) for logprob in of_base]
    weighted = sum(w * logprob for w, logprob in zip(surprises, logprobs, strict=True))
    return weighted / (sum(surprises) + LEAST_SURPRISED)


def recognised(logprobs: Sequence[float], of_base: Sequence[float]) -> float:
    """Tell how far an adapter expects words of a question that the base does not.

    logprobs  log p of the question's tokens under the adapter, in nats: [n_token]
    of_base   the same under the base
    returns   at least 0: log(1 + nats), where a token counts as many nats as it surprises the base
              by, times what the adapter adds to its probability
    """
    nats = 0.0
    for logprob, by_base in zip(logprobs, of_base, strict=True):
        surprise = min(-by_base, MOST_SURPRISED)
        nats += surprise * max(exp(logprob) - exp(by_base), 0.0)
    return log(1.0 + nats)


def log_odds(sure: float, nats: float) -> float:
    """Tell how probable it is that a draft is right, as the logarithm of p / (1 - p).

    sure  as sureness() gives it
    nats  by which the question surprises the base, or one that it goes on from
    """
    return USUAL + SURE * sure + SURPRISING * log(max(nats, 1.0))


def probability(odds: float) -> float:
    """Give p of log(p / (1 - p))."""
    return 1.0 / (1.0 + exp(-odds))


def told_probability(known: float, recognised: float) -> float:
    """Give the probability that the draft of an adapter is right that was taken to know.

    Of several one is taken, so that it is wrong more often than a draft alone.

    known       the probability of its draft alone, above 0 and below 1
    recognised  as recognised() gives it
    """
    odds = log(known / (1.0 - known))
    return probability(odds + TOLD_RECOGNISED * recognised + TOLD_AT_0)


@dataclass(frozen=True)
class Taught:
    """Say what example questions tell of a question.

    close    adapter, or BASE -> how close the question is to its examples
    closest  who is closest, where that is more than chance; "": nobody
    decides  whether it answers, where no draft claims to know
    """

    close: Mapping[str, Closeness] = field(default_factory=dict)
    closest: str = ""
    decides: bool = False

    def ahead(self, name: str) -> float:
        """Tell how far a name is ahead of the next one."""
        if name not in self.close:
            return 0.0
        return max(-MOST_TAUGHT, min(self.close[name].over_next, MOST_TAUGHT))

    def because(self) -> str:
        """Say why it decides."""
        n_example = self.close[self.closest].n_example
        examples = f"{n_example} example question{'s' * (n_example != 1)}"
        whose = f"the {examples}" if n_example else "the description"
        who = "The base" if self.closest == BASE else self.closest
        return f"{who} answers alone: the question is close to {whose} it was taught."


def taught_by(reading: Reading) -> Taught:
    """Tell what example questions tell of the question that is read."""
    close = reading.close()
    closest = max(close, key=lambda name: close[name].over_nobody, default="")
    if not closest or close[closest].over_nobody < MAYBE_CLOSE:
        return Taught(close)
    is_close = close[closest].over_nobody >= CLOSE and close[closest].over_next >= CLOSE_NEXT
    return Taught(close, closest, is_close)
