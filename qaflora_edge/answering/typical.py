"""What is typical of adapters: the measures of strategies over neutral prompts."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F64
from qaflora_edge.ask import Chat, Question
from qaflora_edge.progress import TellCount, silent
from qaflora_edge.prompt.messages import as_turn
from qaflora_edge.weighing.calibration import DRAFTED, EXTENTS, KEYS, LAYERS, typical_of
from qaflora_edge.weighing.relay import N_DRAFT, sureness
from qaflora_edge.weighing.strategy import Query

if TYPE_CHECKING:
    from qaflora_edge.bundles.memory import AdapterSet

_N_DRAFTED = 16  # neutral prompts that each adapter drafts an answer to


def measure(
    adapters: "AdapterSet",
    prompts: Sequence[str],
    turns: Sequence[str] = (),
    exchanges: Sequence[Sequence[Any]] = (),
    keys: Collection[str] | None = None,
    tell: TellCount = silent,
) -> dict[str, dict[str, Any]]:
    """Measure each adapter in use against itself, for strategies.

    prompts    neutral texts; in chat form when the base has a template, and as text
    turns      short turns, such as greetings: chats for EXTENTS alone
    exchanges  conversations that end with an answer; behind one each text is a later turn too
    keys       what to measure, of calibration.KEYS; None: all
    tell       called with (prompts read, those in all); each is read several times
    """
    keys = KEYS if keys is None else keys

    def queried(question: Question) -> Query:
        return adapters.weigher.query(adapters.reader.read(question))

    core = adapters.core
    cancellation = core.cancellation()
    names = adapters.weigher.adapters
    texts = (*prompts, *turns)
    exchanges = exchanges[: len(texts)] if core.model.chat_template else ()
    later = []  # texts as later turns, a group for each exchange before them
    for at, exchange in enumerate(exchanges):
        turn_texts = texts[at :: len(exchanges)]
        behind = [[*exchange, {"role": "user", "content": text}] for text in turn_texts]
        later.append([queried(Chat(messages)) for messages in behind])
    chats = [queried(as_turn(text)) for text in texts]
    plain = [queried(text) for text in prompts]
    layers = [key for key in LAYERS if key in keys]
    groups = [chats, plain, *later]
    n_extent = 0
    if not {*EXTENTS}.isdisjoint(keys):
        n_extent = sum(map(len, groups))
    n_all = n_extent + (len(plain) if layers else 0)
    measured = {}
    if n_extent:
        rows = core.rows(names)
        n_before = 0
        extents: list[F64] = []  # of each group [2, n_prompt, n_adapter, n_layer]
        for group in groups:

            def tell_group(n_read: int, n_before: int = n_before) -> None:
                tell(n_before + n_read, n_all)

            steps = core.added.together(group, rows)
            extents.append(core.run(steps, cancellation, tell_group, kind="branch"))
            n_before += len(group)
        first, text, *others = extents
        later_turns = np.concatenate(others or [first], axis=1)
        measured["added_last"], measured["added_question"] = first
        measured["added_text"], _ = text
        measured["later_last"], measured["later_question"] = later_turns
    drafted = [key for key in DRAFTED if key in keys]
    if drafted and not later:  # there is no chat template: nobody drafts
        measured |= {key: [np.zeros(len(names))] for key in drafted}
    elif drafted:
        by_prompt = []
        for chat in chats[:: max(1, len(chats) // _N_DRAFTED)]:
            with PromptReading(core, chat, cancellation) as reading:
                by_prompt.append(_drafted(reading))
        measured |= {key: [of_prompt[key] for of_prompt in by_prompt] for key in drafted}
    if layers:
        measured |= {key: [] for key in layers}
        for n_read, chat in enumerate(chats[: len(plain)], n_extent + 1):
            for key in layers:
                pool = "question" if key.startswith("question_") else "answer"
                query = replace(chat, lens=key.removeprefix("question_"), pool=pool)
                measured[key].append(PromptReading(core, query, cancellation).divergence())
            tell(n_read, n_all)
    return typical_of(measured, names)


def _drafted(reading: PromptReading) -> dict[str, F64]:
    """Give DRAFTED of each adapter's own draft: float64 [n_adapter] each, in nats."""
    drafts = reading.drafts(reading.query.adapters, N_DRAFT)
    openings = []
    sure = []
    for draft, of_base in zip(drafts, reading.base_logprobs(drafts), strict=True):
        # A draft without a token ends at once, which tells nothing of a form.
        openings.append(of_base[0] if of_base else 0.0)
        sure.append(sureness(draft.logprobs, of_base))
    return {"opening": np.array(openings), "sureness": np.array(sure)}
