"""Neutral prompts: everyday texts, for what is usual of a base, an adapter or a system prompt."""

import json
from collections.abc import Sequence
from typing import Any

from qaflora_edge.ask import Prompt
from qaflora_edge.files import package_data

PROMPTS_FILE = "data/neutral_prompts.json"


def neutral(name: str) -> list[Any]:
    """Read what ships with the package: "prompts", "turns" of a few words, or "exchanges"."""
    text = package_data(PROMPTS_FILE).read_text(encoding="utf-8")
    return list(json.loads(text)[name])


def few() -> list[str]:
    """Name those that are read behind each system prompt: two prompts, and two short turns."""
    return [*neutral("prompts")[9::12], *neutral("turns")[12::16]]


def behind_system(
    system: Sequence[int], n_usual: int, prompts: Sequence[Prompt]
) -> tuple[tuple[Prompt, Prompt], ...]:
    """Pair neutral prompts: each as usual, and behind another system prompt.

    system   tokens before the first user turn
    n_usual  tokens that are there as usual
    prompts  first turns, as usual
    """
    n_more = len(system) - n_usual
    pairs = []
    for usual in prompts:
        assert usual.question is not None
        start, end = usual.question
        behind = Prompt((*system, *usual.tokens[n_usual:]), (start + n_more, end + n_more))
        pairs.append((usual, behind))
    return tuple(pairs)
