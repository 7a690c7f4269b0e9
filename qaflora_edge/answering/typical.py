"""What is typical of adapters: the measures of strategies over neutral prompts."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F64
from qaflora_edge.ask import Chat, Question
from qaflora_edge.progress import TellCount, TellDone, silent
from qaflora_edge.prompt.messages import as_turn
from qaflora_edge.weighing.calibration import DRAFTED, EXTENTS, KEYS, LAYERS, typical_of
from qaflora_edge.weighing.known import sureness
from qaflora_edge.weighing.relay import N_DRAFT
from qaflora_edge.weighing.strategy import Query

if TYPE_CHECKING:
    from qaflora_edge.bundles.memory import AdapterSet
    from qaflora_edge.inference.core import Core

Measured = dict[str, Any]  # of calibration.KEYS: of each prompt [n_adapter, ...]
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
    core = adapters.core
    names = adapters.weigher.adapters
    drafted = [key for key in DRAFTED if key in keys]
    layers = [key for key in LAYERS if key in keys]

    def queried(question: Question) -> Query:
        return adapters.weigher.query(adapters.reader.read(question))

    texts = (*prompts, *turns)
    chats = [queried(as_turn(text)) for text in texts]
    plain = [queried(text) for text in prompts]
    exchanges = exchanges[: len(texts)] if core.model.chat_template else ()
    later = []  # texts as later turns, a group for each exchange before them
    for at, exchange in enumerate(exchanges):
        turn_texts = texts[at :: len(exchanges)]
        behind = [[*exchange, {"role": "user", "content": text}] for text in turn_texts]
        later.append([queried(Chat(messages)) for messages in behind])

    groups = [chats, plain, *later]
    n_extent = 0 if {*EXTENTS}.isdisjoint(keys) else sum(map(len, groups))
    n_all = n_extent + (len(plain) if layers else 0)
    measured: Measured = {}
    if n_extent:
        measured |= _extents(core, names, groups, lambda n: tell(n, n_all))
    if drafted:
        measured |= _drafts(core, names, chats if later else [], drafted)
    if layers:
        of_prompts = chats[: len(plain)]
        measured |= _layers(core, of_prompts, layers, lambda n: tell(n_extent + n, n_all))
    return typical_of(measured, names)


def _extents(
    core: "Core", names: Sequence[str], groups: Sequence[Sequence[Query]], tell: TellDone
) -> Measured:
    """Measure EXTENTS.

    groups  chats, plain texts, and chats behind each exchange
    tell    called with the number of prompts read
    """
    rows = core.rows(names)
    cancellation = core.cancellation()
    n_before = 0
    extents: list[F64] = []  # of each group [2, n_prompt, n_adapter, n_layer]
    for group in groups:

        def tell_group(n_read: int, n_before: int = n_before) -> None:
            tell(n_before + n_read)

        steps = core.added.together(group, rows)
        extents.append(core.run(steps, cancellation, tell_group, contexts="branch"))
        n_before += len(group)
    first, text, *others = extents
    later = np.concatenate(others or [first], axis=1)
    first_last, first_question = first
    later_last, later_question = later
    return {
        "added_last": first_last,
        "added_question": first_question,
        "added_text": text[0],
        "later_last": later_last,
        "later_question": later_question,
    }


def _drafts(
    core: "Core", names: Sequence[str], chats: Sequence[Query], keys: Sequence[str]
) -> Measured:
    """Measure DRAFTED over some of the chats; without chats nobody drafts."""
    if not chats:
        return {key: [np.zeros(len(names))] for key in keys}
    cancellation = core.cancellation()
    by_prompt = []
    step = max(1, len(chats) // _N_DRAFTED)
    for chat in chats[::step]:
        with PromptReading(core, chat, cancellation) as reading:
            by_prompt.append(_drafted(reading))
    return {key: [of_prompt[key] for of_prompt in by_prompt] for key in keys}


def _layers(core: "Core", chats: Sequence[Query], keys: Sequence[str], tell: TellDone) -> Measured:
    """Measure the divergences of LAYERS in each chat; tell is called with the number of chats."""
    cancellation = core.cancellation()
    measured: Measured = {key: [] for key in keys}
    for n_read, chat in enumerate(chats, 1):
        for key in keys:
            lens = key.removeprefix("question_")
            pool = "answer" if lens == key else "question"
            query = replace(chat, lens=lens, pool=pool)
            divergence = PromptReading(core, query, cancellation).divergence()
            measured[key].append(divergence)
        tell(n_read)
    return measured


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
