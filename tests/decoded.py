"""How much a Context decodes, while a test looks; and a probe with nothing in between."""

from collections.abc import Sequence
from typing import Any

import pytest

from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.context import Context


def count_decoded(monkeypatch: pytest.MonkeyPatch, *, first_only: bool = False) -> list[int]:
    """Tokens of every decode from now on: of all its sequences together, or of the first."""
    counts: list[int] = []
    decode = Context.decode_spans

    def counting(self: Context, spans: Sequence[Span]) -> list[int]:
        counts.append(sum(len(span.tokens) for span in (spans[:1] if first_only else spans)))
        return decode(self, spans)

    monkeypatch.setattr(Context, "decode_spans", counting)
    return counts


def run_alone(steps: Any) -> Any:
    """Drive a generator of the probe to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
