"""Bytes of tokens to text: whole UTF-8 characters, ended before the first stop text."""

import codecs
from collections.abc import Sequence


class StopFilter:
    """Passes text on as soon as it can no longer be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now, once text has arrived."""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held, self.is_stopped = "", True
            return held[: min(found)]
        n = self._n_undecided(held)
        self._held = held[len(held) - n :]
        return held[: len(held) - n]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _n_undecided(self, held: str) -> int:
        longest = min(len(held), max((len(stop) for stop in self._stops), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(held[-n:]) for stop in self._stops):
                return n
        return 0


class TextDecoder:
    """The bytes of an answer's tokens in, pieces of its text out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._filter = StopFilter(stops)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text came."""
        return self._filter.is_stopped

    def feed(self, data: bytes) -> str:
        return self._filter.feed(self._decoder.decode(data))

    def flush(self) -> str:
        """What was held back. Bytes of a character that was never finished are dropped."""
        return "" if self.is_stopped else self._filter.flush()
