"""What is measured of prompts: the part of an Engine that weighs and scores."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, overload

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.engine_base import EngineBase
from qaflora_edge.errors import OptionError, PromptError
from qaflora_edge.inference.prompts import Prompt, checked_tokens, token_ids
from qaflora_edge.inference.score import Item
from qaflora_edge.progress import TellCount
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.calibration import measure_typical
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import Query
from qaflora_edge.weighing.weigher import Weights


class EngineMeasures(EngineBase):
    """An opened base that weighs and scores prompts, and answers none.

    See Engine.
    """

    @overload
    def weights(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        *,
        strategy: str | None = ...,
        adapters: Sequence[str] | None = ...,
        parse_special: bool = ...,
        cancel: threading.Event | None = ...,
    ) -> FusionWeights: ...
    @overload
    def weights(
        self,
        prompt: Sequence[Prompt],
        *,
        strategy: str | None = ...,
        adapters: Sequence[str] | None = ...,
        parse_special: bool = ...,
        cancel: threading.Event | None = ...,
    ) -> list[FusionWeights]: ...
    def weights(
        self,
        prompt: Any,
        *,
        strategy: str | None = None,
        adapters: Sequence[str] | None = None,
        parse_special: bool = False,
        cancel: threading.Event | None = None,
    ) -> FusionWeights | list[FusionWeights]:
        """Weigh the adapters for a prompt, or for each of a list of prompts.

        adapters  those to weigh; by default those in use
        cancel    once it is set, CancelledError is raised

        Returns FusionWeights with weights and divergence, float32 [n_adapter, n_layer].
        """

        def weigh(each: Prompt) -> FusionWeights:
            with self._call():
                tokens = self.tokenize(each, parse_special=parse_special)
                probe = self._core.probe(self._core.cancellation(cancel))
                return self._using(adapters).weigh(strategy, tokens, probe)

        prompt = _whole(prompt)
        return [weigh(each) for each in prompt] if _are_many(prompt) else weigh(prompt)

    def hidden_states(
        self, prompt: Prompt, *, adapter: str | None = None, parse_special: bool = False
    ) -> F32:
        """States of the last token after each block: float32 [n_layer, n_embd].

        adapter  the one adapter that is on, at weight 1; None for the base alone
        """
        with self._call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            if adapter is not None and adapter not in self.adapters:
                raise self._not_loaded(adapter, self.adapters)
            rows = self._core.rows([] if adapter is None else [adapter])
            steps = self._core.prober.states(tokens, rows)
            return np.array(self._core.run(steps)[-1])

    def logits(
        self, prompt: Prompt, *, weights: Weights = None, parse_special: bool = False
    ) -> F32:
        """Logits of the token after the prompt: float32 [n_vocab]."""
        with self._call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            cancellation = self._core.cancellation()
            fusion = self._weigher.weigh(weights, tokens, self._core.probe(cancellation))
            return self._core.logits(tokens, fusion, cancellation)

    @overload
    def score(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        continuation: Prompt,
        *,
        weights: Weights = ...,
        parse_special: bool = ...,
    ) -> F32: ...
    @overload
    def score(
        self,
        prompt: Sequence[Prompt],
        continuation: Sequence[Prompt],
        *,
        weights: Weights = ...,
        parse_special: bool = ...,
    ) -> list[F32]: ...
    def score(
        self,
        prompt: Any,
        continuation: Any,
        *,
        weights: Weights = None,
        parse_special: bool = False,
    ) -> F32 | list[F32]:
        """How likely each token of a continuation is: log-probabilities in nats, float32 [n_token].

        prompt, continuation  as elsewhere, text of a continuation without BOS; or lists of both,
                              of the same length, which are scored together: a prompt that
                              stands several times is weighed and read once
        weights               for all of them

        Raises PromptError when a continuation is empty, or too long for n_ctx with its prompt.
        """
        prompt, continuation = _whole(prompt), _whole(continuation)
        is_list = _are_many(prompt)
        if is_list != _are_many(continuation):
            raise OptionError(
                "score got a list of prompts or of continuations and one of the others, expected "
                "one of both or lists of both: repeat the one, as in [prompt] * 3."
            )
        if not is_list:
            prompt, continuation = [prompt], [continuation]
        if len(prompt) != len(continuation):
            raise OptionError(
                f"score got {len(prompt)} prompts and {len(continuation)} continuations, "
                "expected as many of both."
            )
        with self._call():
            cancellation = self._core.cancellation()
            probe = self._core.probe(cancellation)
            known: dict[tuple[int, ...], F32] = {}
            items = []
            for each, text in zip(prompt, continuation, strict=True):
                tokens = tuple(self.tokenize(each, parse_special=parse_special))
                following = self._continuation(tokens, text)
                if tokens not in known:
                    fusion = self._weigher.weigh(weights, tokens, probe)
                    known[tokens] = self._core.all_weights(fusion)
                items.append(Item(tokens, following, known[tokens]))
            scores = self._core.score(items, cancellation)
        return scores if is_list else scores[0]

    def _continuation(self, prompt: Sequence[int], text: Prompt) -> tuple[int, ...]:
        if isinstance(text, str):
            tokens = self._model.tokenize(text, add_special=False, parse_special=False)
        else:
            tokens = token_ids(text, "continuation")
        if not tokens:
            raise PromptError("The continuation is empty; give at least one token.")
        what = "prompt with its continuation"
        checked_tokens(self._model, [*prompt, *tokens], self.n_ctx, what)
        return tuple(tokens)

    def typical_divergence(
        self, prompts: Sequence[str], progress: TellCount | None = None
    ) -> dict[str, dict[str, Any]]:
        """Measure each adapter against itself, for the strategies `calibrated` and `two-place`.

        prompts   neutral texts; in chat form when the base has a template, and as text
        progress  called with (prompts done, prompts in all)
        returns   adapter -> one of weighing.calibration.KEYS -> what it says
        """
        with self._call():
            probe = self._core.probe(self._core.cancellation())

            def measure(prompt: str) -> dict[str, Any]:
                text, chat = self._weigher.query(self.tokenize(prompt)), self._chat_query(prompt)
                measured: dict[str, Any] = {}
                for lens in numbers.LENSES:
                    for key, pool in ((lens, "answer"), (f"question_{lens}", "question")):
                        query = replace(chat, lens=lens, pool=pool)
                        measured[key] = probe(query).divergence()
                measured["cosine_question"] = probe(chat).places("cosine")[1]
                measured["added_last"], measured["added_question"] = probe(chat).places("added")
                measured["added_text"] = probe(text).places("added")[0]
                return measured

            return measure_typical(measure, prompts, self.adapters, progress)

    def _chat_query(self, text: str) -> Query:
        """A question in chat form when the base has a template, else as text."""
        tokens = self._query(text)
        span = self._weigher.find_question(tokens)
        query = self._weigher.query(tokens)
        return replace(query, question=span or (0, len(tokens)), is_chat=span is not None)

    def centroid(self, texts: Sequence[str], progress: TellCount | None = None) -> F32:
        """The mean embedding of sample texts, for the strategy `centroid`: float32 [n_embd].

        texts     in chat form when the base has a template, else as text
        progress  called with (texts done, texts in all)

        Raises PromptError for a text that is empty or too long.
        """
        with self._call():
            total = np.zeros(self._model.n_embd, np.float64)
            for done, text in enumerate(texts, 1):
                try:
                    tokens = self._query(text)
                except PromptError as error:
                    raise PromptError(f"Sample text {done} cannot be used: {error}") from error
                total += self._core.run(self._core.prober.base.embedding(tokens))
                if progress is not None:
                    progress(done, len(texts))
            return (total / len(texts)).astype(np.float32)

    def _query(self, text: str) -> list[int]:
        """One message in chat form when the base has a template, else as text."""
        if not self.has_chat_template:
            return self.tokenize(text)
        return self.chat_tokens([{"role": "user", "content": text}])


def _whole(prompt: Any) -> Any:
    """A list in place of what can be gone through once."""
    return list(prompt) if isinstance(prompt, Iterator) else prompt


def _are_many(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts, texts or sequences of ids."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Iterable):
        return False  # one, if a wrong one
    return any(not isinstance(each, Integral) for each in prompt)
