"""What is typical of adapters: the measures of strategies over neutral prompts."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F64
from qaflora_edge.inference.core import Core
from qaflora_edge.progress import TellCount
from qaflora_edge.weighing.calibration import EXTENTS, KEYS, LAYERS, OPENING, typical_of
from qaflora_edge.weighing.strategy import Query

_N_DRAFTED = 16  # neutral prompts that each adapter drafts an answer to


def measure(
    core: Core,
    chats: Sequence[Query],
    plain: Sequence[Query],
    later: Sequence[Sequence[Query]],
    keys: Collection[str] | None,
    tell: TellCount,
) -> dict[str, dict[str, Any]]:
    """Measure each adapter in use: adapter -> one of calibration.KEYS -> numbers.

    chats  neutral prompts as first turns: those of `plain`, then short turns
    plain  neutral prompts as text
    later  as later turns, a group for each exchange before them
    keys   what to measure; None: all
    tell   called with (prompts read, those in all)
    """
    keys = KEYS if keys is None else keys
    cancellation = core.cancellation()
    adapters = chats[0].adapters
    layers = [key for key in LAYERS if key in keys]
    groups = [chats, plain, *later]
    n_extent = 0
    if not {*EXTENTS}.isdisjoint(keys):
        n_extent = sum(map(len, groups))
    n_all = n_extent + (len(plain) if layers else 0)
    measured = {}
    if n_extent:
        rows = core.rows(adapters)
        n_before = 0
        extents: list[F64] = []  # of each group [2, n_prompt, n_adapter, n_layer]
        for group in groups:

            def tell_group(n_read: int, n_before: int = n_before) -> None:
                tell(n_before + n_read, n_all)

            steps = core.added.together(group, rows)
            extents.append(core.run(steps, cancellation, tell_group, kind="branch"))
            n_before += len(group)
        first, text, *behind = extents
        later_turns = np.concatenate(behind or [first], axis=1)
        measured["added_last"], measured["added_question"] = first
        measured["added_text"], _ = text
        measured["later_last"], measured["later_question"] = later_turns
    if OPENING in keys and not later:  # there is no chat template: nobody drafts
        measured[OPENING] = [np.zeros(len(adapters))]
    elif OPENING in keys:
        sampled = chats[:: max(1, len(chats) // _N_DRAFTED)]
        measured[OPENING] = []
        for chat in sampled:
            with PromptReading(core, chat, cancellation) as reading:
                measured[OPENING].append(_opening(reading))
    if layers:
        measured |= {key: [] for key in layers}
        for n_read, chat in enumerate(chats[: len(plain)], n_extent + 1):
            for key in layers:
                pool = "question" if key.startswith("question_") else "answer"
                query = replace(chat, lens=key.removeprefix("question_"), pool=pool)
                measured[key].append(PromptReading(core, query, cancellation).divergence())
            tell(n_read, n_all)
    return typical_of(measured, adapters)


def _opening(reading: PromptReading) -> F64:
    """Give log p, in nats, of each adapter's first token as the base's: float64 [n_adapter]."""
    nats = []
    for draft in reading.drafts(reading.query.adapters, 1):
        # A draft without a token ends at once, which tells nothing of a form.
        first = draft.tokens[0] if draft.tokens else None
        nats.append(0.0 if first is None else -reading.unexpected(first))
    return np.array(nats)
