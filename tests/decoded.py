"""How much a Context decodes, while a test looks; and probes as a test asks for them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qaflora_edge import Engine
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.ask import Prompt
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


def probe(
    engine: Engine, tokens: Sequence[int], span: tuple[int, int] | None = None, **facts: bool
) -> Any:
    """The reading of a query, whose question stands at the span; it keeps no slot."""
    query = engine.memory.current.weigher.query(Prompt(tuple(tokens)))
    query = replace(query, question=span or (0, len(tokens)), **facts)
    return OfOneMeasure(engine._core, query, engine._core.cancellation())


class OfOneMeasure(PromptReading):
    """Free the slot after each measure: tests do not answer."""

    def _listen(self, listener: Any) -> Any:
        result = super()._listen(listener)
        self.end()
        return result


def run_alone(steps: Any) -> Any:
    """Drive a generator of the probe to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
