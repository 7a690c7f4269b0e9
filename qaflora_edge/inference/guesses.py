"""Guesses: of the next tokens of answers, so that one pass of the base verifies several."""

import platform
from collections.abc import Sequence

from qaflora_edge.backend.context import N_OUTPUT
from qaflora_edge.inference.sequence import RunningSequence

_ORDERS = (4, 3, 2, 1)  # tokens at the end that must have stood before; the most that did count
# A row more, of one row's pass: 5 rows take 1.5 (AVX-512-VNNI), 8 take 3.3 to 4.9 (ARM, counted).
_ROW_COST = 1 / 2 if platform.machine() in {"aarch64", "arm64"} else 1 / 6
_N_REST = 8  # guesses that are left out, once they do not pay
_N_LONGEST_REST = 64
_N_TOGETHER = 2  # sequences that guess at once, at most
_MEMORY = 0.8  # share of the mean gain that a guess leaves


class _Record:
    """Keep how guesses behind so many equal tokens fare, and choose their length by it.

    n_most  fixes the length; None: as many as pay
    """

    def __init__(self, order: int, n_most: int | None) -> None:
        self._is_fixed = n_most is not None
        self._n_first = max(2, order)
        self.n = n_most or self._n_first
        self._gain = 0.5
        self._n_rest = _N_REST
        self._n_left = 0

    def rests(self) -> bool:
        self._n_left = max(0, self._n_left - 1)
        return self._n_left > 0

    def learn(self, n_guessed: int, n_right: int, row_cost: float) -> None:
        """Note a guess; row_cost: in tokens that come without one."""
        if self._is_fixed:
            return
        gain = n_right - row_cost * n_guessed
        self._gain = _MEMORY * self._gain + (1 - _MEMORY) * gain
        if n_right == n_guessed:
            self.n = min(2 * n_guessed + 1, N_OUTPUT - 1)
            self._n_rest = _N_REST
        else:
            self.n = max(self._n_first, n_right + 1)
        if self._gain < 0:
            self._gain = 0.0
            self._n_left = self._n_rest + 1
            self._n_rest = min(2 * self._n_rest, _N_LONGEST_REST)


class Guesser:
    """Guess what follows an answer so far: what followed its last tokens where they stood last.

    prompt  its tokens
    n_most  most tokens of a guess; None: as many as pay
    """

    def __init__(self, prompt: Sequence[int], n_most: int | None) -> None:
        self._tokens = list(prompt)
        self._n_prompt = len(prompt)
        self._ends: dict[tuple[int, ...], int] = {}  # of tokens, where they ended last
        self._n_noted = 0
        self._records = {order: _Record(order, n_most) for order in _ORDERS}
        self._last = self._records[_ORDERS[0]]

    def guess(self, answer: Sequence[int]) -> list[int]:
        """Guess the next tokens; none where nothing like it stood before, or guesses do not pay."""
        tokens = self._tokens
        tokens += answer[len(tokens) - self._n_prompt :]
        for end in range(self._n_noted + 1, len(tokens)):
            for order in _ORDERS:
                start = max(0, end - order)
                ending = tuple(tokens[start:end])
                self._ends[ending] = end
        self._n_noted = max(self._n_noted, len(tokens) - 1)
        for order, record in self._records.items():
            ending = tuple(tokens[-order:])
            at = self._ends.get(ending)
            if at is not None and not record.rests():
                self._last = record
                return tokens[at : at + record.n]
        return []

    def learn(self, n_guessed: int, n_right: int, n_sequence: int) -> None:
        """Note how many tokens of the last guess came, next to how many sequences."""
        pass_cost = 1 + _ROW_COST * (n_sequence - 1)
        token_cost = pass_cost / n_sequence  # without a guess
        self._last.learn(n_guessed, n_right, _ROW_COST / token_cost)


def guess_together(group: Sequence[RunningSequence], n_ctx: int) -> list[list[int]]:
    """Guess the next tokens of sequences, the same number for all.

    llama.cpp computes sequences of one length in one pass. So the shortest guess counts, and none
    are guessed where a sequence has none: it would wait for the others' rows. Nor are any for more
    than two sequences: with eight callers of prose one guess each cost 8 % of the tokens a second.

    n_ctx  tokens that each sequence can hold
    """
    if len(group) > _N_TOGETHER:
        return [[] for _ in group]
    guesses: list[list[int]] = []
    n_most = N_OUTPUT // len(group) - 1
    for sequence in group:
        guess = []
        if sequence.guesser is not None:
            guess = sequence.guesser.guess(sequence.answer)
        n_left = sequence.n_max - len(sequence.answer) - 1
        n_room = n_ctx - sequence.n_past - 1
        n_most = min(n_most, n_left, n_room, len(guess))
        guesses.append(guess)
    n_most = max(0, n_most)
    return [guess[:n_most] for guess in guesses]
