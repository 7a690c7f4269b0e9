"""The command line with answers that are given beforehand, whatever model there is.

    python scripted_chat.py TEXT chat DIR ...

Prompts are weighed and read as ever; then comes TEXT, a word at a time.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from qaflora_edge import Engine
from qaflora_edge.ask import Ask
from qaflora_edge.cli import main

ANSWER = "The thing on a ring is there, and so is another."


class ScriptedGeneration:
    """A generation that is the real one but for its text, its end and its speed."""

    def __init__(self, generation: Any, text: str, pause_s: float) -> None:
        self._generation, self._text, self._pause_s = generation, text, pause_s
        self.finish_reason: str | None = None
        self.timings = SimpleNamespace(n_decoded=9, tokens_per_second=9.0, prefill_ms=1.0)
        self.timings.probe_ms = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def __iter__(self) -> Iterator[str]:
        for piece in re.findall(r"\s*\S+", self._text):
            yield piece
            time.sleep(self._pause_s)
        self.finish_reason = "stop"


def scripted(text: str = ANSWER, *, pause_s: float = 0.0) -> Callable[..., Any]:
    """What may stand in place of Engine.submit."""
    submit = Engine.submit

    def answer(engine: Engine, ask: Ask) -> Any:
        generation = submit(engine, replace(ask, sampling=replace(ask.sampling, max_tokens=1)))
        generation.text()
        return ScriptedGeneration(generation, text, pause_s)

    return answer


if __name__ == "__main__":
    Engine.submit = scripted(sys.argv[1], pause_s=0.01)  # type: ignore[method-assign]
    main(sys.argv[2:], prog_name="qaflora")
