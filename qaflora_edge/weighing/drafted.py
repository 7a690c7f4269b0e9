"""What is drafted for a relay: an answer of one adapter alone, and who writes with it in view."""

from collections.abc import Mapping
from dataclasses import dataclass, field

BASE = "base"  # in place of an adapter's name, where the base alone is meant
ANSWER = ""  # in place of a name, for the answer that is given if nobody relays
UNSURE = -100.0  # nats a token, of an empty draft
N_TOGETHER = 7  # drafts of one batch
DRAFT_TOKENS = 128  # of the longest draft
IN_WORDS = " Answer in words."  # behind the question to a knower
N_BEGUN = 8  # tokens of a draft that tell how sure its adapter is


@dataclass(frozen=True)
class Draft:
    """Hold what one adapter alone, or the base, answers to a query: greedy, the base prefills.

    adapter   its name, or BASE
    tokens    ids, at most DRAFT_TOKENS
    text      of them
    logprobs  of each token, in nats
    is_whole  whether it ended by itself
    """

    adapter: str
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    is_whole: bool

    def has(self, n_token: int) -> bool:
        """Tell whether it is whole, or has so many tokens."""
        return self.is_whole or len(self.tokens) >= n_token

    def sureness(self, n_token: int) -> float:
        """Average the log-probability of its first n_token tokens, in nats; an empty one has none.

        returns  at most 0, and UNSURE where there are no tokens
        """
        first = self.logprobs[:n_token]
        return sum(first) / len(first) if first else UNSURE


@dataclass(frozen=True)
class Relay:
    """Say who drafts and who writes, and what was drafted.

    knower, writer  adapters, or BASE
    draft     the knower's, as far as it is written
    is_drafted  whether that is all of it
    is_in_words  whether the knower is asked to answer in words, where its draft would take the
              form that the writer gives
    is_behind  whether the writer reads the draft behind the question, not before it
    sureness  adapter -> mean log-probability of its draft's first tokens, in nats
    draft_ms  time of what was drafted after the knower was chosen
    prompt    ids of the query; the draft is for no other
    """

    knower: str
    writer: str
    draft: Draft
    is_drafted: bool = False
    is_in_words: bool = False
    is_behind: bool = False
    sureness: Mapping[str, float] = field(default_factory=dict)
    draft_ms: float = 0.0
    prompt: tuple[int, ...] = field(default=(), repr=False)
