"""Branches: one context for all that is decoded beside answers; and prefill, cut in steps.

Work is cut at micro-batches: a generator yields between them, for its driver's other requests.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from qaflora_edge.backend.batch import Outputs
from qaflora_edge.backend.context import Context, KvState, n_ctx_for
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError

T = TypeVar("T")
Ids = Sequence[int]  # of tokens
# Yields the number of prefilled tokens, or None, between micro-batches; returns its result.
Steps = Generator[int | None, None, T]
N_BRANCH = 31  # sequences beside the one of the prompt
N_OUTPUT = 64  # rows of logits in a batch: their memory is n_vocab each
_N_CTX_KEPT = 4096  # tokens of the largest context that is kept between uses


@contextmanager
def wiped_on_failure(context: Context) -> Iterator[None]:
    """Empty a context when a block fails; a cancelled query's GeneratorExit counts."""
    try:
        yield
    except BaseException:
        context.clear(is_zeroed=True)
        raise


def prefill(
    context: Context, tokens: Ids, start: int, outputs: Outputs, *, n_tail: int = 0, n_seq: int = 1
) -> Steps[None]:
    """Run tokens[start:] through the first n_seq sequences, a micro-batch at a time.

    n_tail  tokens at the end that are left out, or are all that is left, as Chunks.cut takes them
    """
    cuts = [*context.chunks(n_seq).cut(tokens, start, n_tail)]
    for at, end in cuts:
        is_last = (at, end) == cuts[-1]
        shown: Outputs = outputs if is_last or outputs == "all" else "none"
        context.decode(tokens[at:end], start=at, outputs=shown, n_seq=n_seq)
        if not is_last:
            yield end


class GrowingContext:
    """Keep a context; replace it by a larger one for a longer query, KV state included.

    make  makes one from n_ctx
    """

    def __init__(self, make: Callable[..., Context]) -> None:
        self._make = make
        self.context: Context | None = None

    def for_query(self, n_token: int) -> Context:
        """Give a context with room for a query."""
        held = self.context
        if held is not None and held.n_ctx >= n_token:
            return held
        state = None if held is None else held.kv_state()
        self.close()
        self.context = self._make(n_ctx=n_ctx_for(n_token))
        if state is not None:
            self.context.load_kv_state(state)
        return self.context

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
        self.context = None


class Branches:
    """Keep one unified context: sequence 0 has a prompt, and the others share its KV state.

    Drafts, scores and neutral prompts use it, one job after the other.

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
