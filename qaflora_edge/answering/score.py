"""Scores: how likely continuations are after prompts, under the weights that would answer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qaflora_edge.answering.answer import n_base_of, prompt_of
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F32
from qaflora_edge.ask import Prompt
from qaflora_edge.inference.sequence import Cancellation, Request
from qaflora_edge.weighing.plan import DRAFT_TOKENS, DraftStep

if TYPE_CHECKING:
    from qaflora_edge.inference.core import Core
    from qaflora_edge.weighing.weigher import Weigher, Weights


def score(
    core: "Core",
    weigher: "Weigher",
    by: "Weights",
    pairs: Sequence[tuple[Prompt, tuple[int, ...]]],
) -> list[F32]:
    """Score each prompt's continuation as Engine.score does: float32 [n_token] each, in nats."""
    cancellation = core.cancellation()
    requests: dict[tuple[int, ...], Request] = {}
    items = []
    for prompt, tokens in pairs:
        if prompt.tokens not in requests:
            requests[prompt.tokens] = _request(core, weigher, by, prompt, len(tokens), cancellation)
        items.append((requests[prompt.tokens], tokens))
    return core.run(core.scorer.score(items), cancellation, kind="branch")


def _request(
    core: "Core",
    weigher: "Weigher",
    by: "Weights",
    prompt: Prompt,
    n_after: int,
    cancellation: Cancellation,
) -> Request:
    """Plan for a prompt after which n_after tokens are scored; drafts are written first."""
    choice = weigher.chosen(by)
    query = weigher.query(prompt, choice)
    with PromptReading(core, query, cancellation) as reading:
        fusion = weigher.weigh(choice, reading)
    draft = None
    for step in fusion.plan.steps:
        tokens = prompt_of(core, prompt, step, draft, n_after)
        if isinstance(step, DraftStep):
            draft = step.draft
            if not step.is_done:
                asked = PromptReading(core, replace(query, tokens=tokens), cancellation)
                (draft,) = asked.drafts([step.knower], DRAFT_TOKENS)
    n_base = 0
    if weigher.is_read_by_base(by, prompt):
        n_base = n_base_of(prompt.tokens, tokens)
    weights = core.all_weights(fusion.adapters, fusion.weights)
    return Request(tokens, weights, n_base=n_base)
