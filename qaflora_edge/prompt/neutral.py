"""Neutral prompts: everyday texts, for what is usual of a base, an adapter or a system prompt."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from qaflora_edge.ask import Prompt
from qaflora_edge.files import package_data

PROMPTS_FILE = "data/neutral_prompts.json"
_EVERY_PROMPT = slice(3, None, 6)  # of those that are read behind each system prompt: eight in all
_EVERY_TURN = slice(4, None, 8)


@lru_cache
def neutral(kind: str) -> list[Any]:
    """Read what ships with the package: "prompts", "turns" of a few words, or "exchanges"."""
    text = package_data(PROMPTS_FILE).read_text(encoding="utf-8")
    return list(json.loads(text)[kind])


def behind_system(
    system: Sequence[int], n_usual: int, read: Callable[[str], Prompt]
) -> tuple[tuple[Prompt, Prompt], ...]:
    """Pair a few neutral prompts: each as usual, and behind another system prompt.

    system   tokens before the first user turn
    n_usual  tokens that are there as usual
    read     reads a text as a user's first turn
    """
    n_more = len(system) - n_usual
    pairs = []
    for text in [*neutral("prompts")[_EVERY_PROMPT], *neutral("turns")[_EVERY_TURN]]:
        usual = read(text)
        assert usual.question is not None
        start, end = usual.question
        behind = Prompt((*system, *usual.tokens[n_usual:]), (start + n_more, end + n_more))
        pairs.append((usual, behind))
    return tuple(pairs)
