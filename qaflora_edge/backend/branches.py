"""Branches: one context for all that is decoded beside answers."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from qaflora_edge.backend.context import Context, KvState
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.prefix import GrowingContext, wiped_on_failure
from qaflora_edge.errors import BackendError

N_BRANCH = 31  # sequences beside the one of the prompt
N_OUTPUT = 64  # rows of logits in a batch: their memory is n_vocab each
_N_CTX_KEPT = 4096  # tokens of the largest context that is kept between uses


class Branches:
    """Keep one unified context: sequence 0 has a prompt, and the others share its KV state.

    Drafts, scores and neutral prompts use it, one after the other, as jobs of one kind.

    options  of contexts that take the KV state of an answer
    """

    def __init__(self, model: Model, pack: Pack, options: dict[str, Any]) -> None:
        shape: Any = {"n_seq": 1 + N_BRANCH, "n_output": N_OUTPUT, "is_unified": True}
        self._contexts = GrowingContext(partial(Context, model, pack, **shape, **options))
        self.close = self._contexts.close

    @contextmanager
    def context(self, n_token: int, state: KvState | None = None) -> Iterator[Context]:
        """Give the context for one use, empty but for a state; it is empty again after it.

        n_token  of all sequences together, where shared ones count once
        state    KV state of a prompt, for sequence 0; left out where it has another shape
        """
        context = self._contexts.for_query(n_token)
        try:
            with wiped_on_failure(context):
                if state is not None:
                    with suppress(BackendError):  # the prompt is prefilled
                        context.load_kv_state(state)
                yield context
            context.clear()
        finally:
            if context.n_ctx > _N_CTX_KEPT:
                self.close()
