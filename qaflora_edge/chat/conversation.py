"""A conversation as data: turns that are asked, undone and cut to what a context holds."""

from collections.abc import Callable
from dataclasses import dataclass, field

from qaflora_edge.errors import PromptError

Message = dict[str, str]

# More characters than a token of running text has: what is longer is not even tokenised.
_CHARS_PER_TOKEN = 64


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    finish_reason  "stop", "length" (cut at a limit) or "cancelled" (stopped by the user)
    """

    question: str
    answer: str
    finish_reason: str = "stop"


@dataclass
class Conversation:
    """A system prompt and turns, the oldest of which may have dropped out of the context.

    n_dropped  how many of the oldest turns are no longer sent; they are kept all the same
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    n_dropped: int = 0

    def messages(self, question: str | None = None, *, n_dropped: int = 0) -> list[Message]:
        """What is sent: the system prompt, turns without the oldest ones, and a new question."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns[n_dropped:]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def undo(self) -> Turn | None:
        """Take back the last turn, if there is one."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.n_dropped = min(self.n_dropped, len(self.turns))
        return turn

    def fit(
        self, question: str, tokenize: Callable[[list[Message]], list[int]], n_most: int
    ) -> list[int]:
        """Token ids of the conversation with a new question, at most n_most where that can be.

        Oldest turns are left out as whole turns, and stay out; `n_dropped` counts them. The system
        prompt and the question are always in. Once turns must go, half the room is made free: what
        remains begins anew and has to be read again, which each of the next turns would cost.

        tokenize  messages -> token ids; raises PromptError when they are too many

        Raises PromptError, and drops nothing, when system prompt and question alone are too long.
        """

        def tokens_without(n_dropped: int, n_most: int) -> list[int] | None:
            is_alone = n_dropped == len(self.turns)
            messages = self.messages(question, n_dropped=n_dropped)
            n_char = sum(len(message["content"]) for message in messages)
            if not is_alone and n_char > n_most * _CHARS_PER_TOKEN:
                return None
            try:
                tokens = tokenize(messages)
            except PromptError:
                if is_alone:
                    raise
                return None
            return tokens if is_alone or len(tokens) <= n_most else None

        low, high = self.n_dropped, len(self.turns)
        tokens = tokens_without(low, n_most)
        if tokens is None:
            tokens = tokens_without(high, n_most)  # fits, or raises
            n_alone = len(tokens or ())
            n_half = n_alone + max(0, n_most - n_alone) // 2
            while high - low > 1:  # low is too many turns, high is not
                middle = (low + high) // 2
                found = tokens_without(middle, n_half)
                if found is None:
                    low = middle
                else:
                    high, tokens = middle, found
            self.n_dropped = high
        assert tokens is not None
        return tokens
