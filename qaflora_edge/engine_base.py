"""What is opened and measured: the part of an Engine that answers nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.bundles.open import open_any
from qaflora_edge.chat.messages import Message
from qaflora_edge.chat.question import QuestionFinder
from qaflora_edge.chat.tokens import chat_tokens
from qaflora_edge.config import check
from qaflora_edge.errors import OptionError, PromptError, StrategyError
from qaflora_edge.formats.checksums import check_unchanged
from qaflora_edge.inference.core import Core
from qaflora_edge.inference.lifetime import Lifetime
from qaflora_edge.inference.prompts import Prompt, checked_tokens, prompt_tokens, token_ids
from qaflora_edge.inference.score import Item
from qaflora_edge.system_prompt import SystemPrompt, begin_with
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import Query
from qaflora_edge.weighing.typical import measure_typical
from qaflora_edge.weighing.weigher import Weigher, Weights

F32 = NDArray[np.float32]
Path_ = str | os.PathLike[str]


class EngineBase:
    """An opened base with its adapters: facts, choices, tokens, and what is measured of prompts.

    See Engine.
    """

    def __init__(
        self,
        bundle: Path_ | None = None,
        *,
        base: Path_ | None = None,
        adapters: Mapping[str, Path_] | None = None,
        n_ctx: int = 2048,
        n_parallel: int = 1,
        threads: int | None = None,
        gpu_layers: int | None = None,
        kv_type: str = "f16",
        flash_attn: bool | None = None,
        strategy: str | None = None,
        lens: str | None = None,
        pool: str | None = None,
        probe_tail: int = 0,
        min_weight: float = 0.0,
        prefix_cache: int = 128,
        seed: int | None = None,
    ) -> None:
        options = {"threads": threads, "kv_type": kv_type, "flash_attn": flash_attn}
        probing = {"probe_tail": probe_tail, "prefix_cache": prefix_cache}
        others = {"n_ctx": n_ctx, "n_parallel": n_parallel, "gpu_layers": gpu_layers, "seed": seed}
        check("engine", {**options, **others, **probing, "min_weight": min_weight})
        self._lifetime = Lifetime(self)

        opened = open_any(bundle, base, adapters)
        defaults = opened.fusion_defaults
        self.seed, self.n_ctx, self.n_parallel = seed, n_ctx, n_parallel
        self._loaded = tuple(opened.adapters)
        self._weigher = Weigher(
            adapters=self._loaded,
            n_layer=0,
            strategy=strategy or defaults.get("strategy", numbers.DEFAULT_STRATEGY),
            lens=lens or defaults.get("lens", numbers.DEFAULT_LENS),
            pool=pool or defaults.get("pool", numbers.DEFAULT_POOL),
            typical=opened.typical,
            centroids=opened.centroids,
            fitted=opened.fitted,
            min_weight=min_weight,
        )
        try:
            self._core = Core(
                self._lifetime,
                opened.header,
                opened.adapters,
                n_ctx=n_ctx,
                n_parallel=n_parallel,
                gpu_layers=gpu_layers,
                options=options,
                **probing,
            )
            # llama.cpp opened the files by name, after they were checked.
            check_unchanged(opened.states)
            self.system = opened.system
            self._system_prompt = (
                SystemPrompt(self._core, self.system, opened.hashes, {**options, **others})
                if self.system
                else None
            )
        except BaseException:
            self._lifetime.close()
            raise
        self._model = self._core.model
        finder = QuestionFinder(self._model)
        self._weigher = replace(
            self._weigher, n_layer=self._model.n_layer, find_question=finder.find
        )

    # life

    def close(self) -> None:
        """Free the model, the adapters and all contexts. A second call does nothing.

        Calls of other threads that go on end with BusyError. So does close() itself within a call
        of the same thread, such as on_weights.
        """
        self._core.close()

    def cancel(self) -> None:
        """End what the Engine does now; any thread may call it, and it returns at once.

        Answers that are generated end with finish_reason "cancelled", and keep their text so far.
        Calls that weigh or read a prompt raise CancelledError. Nothing else happens: the next call
        works as ever. Without work to end, it does nothing. To end one call alone, give it an
        event (`cancel=`), or use Generation.cancel.
        """
        self._core.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(self.adapters) or "no adapters"
        return f"<Engine {self.name}: {names}; strategy {self.strategy}>"

    # facts

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in use, in the order of every first axis."""
        return self._weigher.adapters

    @property
    def loaded_adapters(self) -> tuple[str, ...]:
        """Names of all adapters, those that are not in use included."""
        return self._loaded

    @property
    def adapter_bytes(self) -> dict[str, int]:
        """Size of the file of each adapter that is loaded."""
        return dict(zip(self._loaded, self._core.adapter_bytes, strict=True))

    @property
    def strategy(self) -> str:
        """The strategy of calls that name none."""
        return self._weigher.strategy

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every strategy that it can follow without a word more, as `manual` needs one."""
        return self._weigher.followed

    @property
    def lens(self) -> str:
        """How a layer's state is read, where a bundle or a caller did not say: see Engine."""
        return self._weigher.lens

    @property
    def pool(self) -> str:
        """What of a prompt is read: see Engine."""
        return self._weigher.pool

    @property
    def n_layer(self) -> int:
        return int(self._model.n_layer)

    @property
    def n_vocab(self) -> int:
        return int(self._model.n_vocab)

    @property
    def n_ctx_train(self) -> int:
        """Tokens of the longest text that the base was trained for."""
        return int(self._model.n_ctx_train)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._model.chat_template)

    @property
    def name(self) -> str:
        """The base's own name, or its file name."""
        return self._model.name

    # choices

    def use_adapters(self, names: Sequence[str]) -> None:
        """Weigh only these adapters from now on; the others are neither probed nor applied.

        names  in any order; the order of the first axes stays that of `loaded_adapters`

        Raises StrategyError for an unknown name, or when the strategy names another adapter.
        """
        with self._lifetime.call():
            self._weigher = self._using(names)

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy from now on, where a call names none.

        Raises StrategyError when it is unknown or cannot be followed here.
        """
        with self._lifetime.call():
            self._weigher = replace(self._weigher, strategy=strategy)

    def _using(self, names: Sequence[str] | None) -> Weigher:
        """The weigher with these adapters in use; None: as they are."""
        if names is None:
            return self._weigher
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise OptionError(f"Option adapters is {names!r}, expected a list of their names.")
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            raise self._not_loaded(unknown[0], self._loaded)
        return replace(self._weigher, adapters=tuple(n for n in self._loaded if n in names))

    @staticmethod
    def _not_loaded(name: str, known: Sequence[str]) -> StrategyError:
        return StrategyError(
            f"The adapter {name!r} is not loaded; expected names out of: "
            f"{', '.join(known) or 'none is loaded'}."
        )

    # prompts

    def tokenize(self, prompt: Prompt, *, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt: text as it is, with BOS where the base asks for it, or ids.

        Raises PromptError when it is empty, longer than n_ctx, or has an id out of range.
        """
        with self._lifetime.call():
            return prompt_tokens(self._model, prompt, self.n_ctx, parse_special=parse_special)

    def chat_tokens(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation under the base's chat template.

        The bundle's system prompt comes first where the messages have none.
        """
        with self._lifetime.call():
            messages = begin_with(self.system, messages)
            tokens = chat_tokens(self._model, messages, tools=tools)
            return checked_tokens(self._model, tokens, self.n_ctx)

    def keep_system(self, *, if_read: bool = False) -> None:
        """Let Engines to come begin where the bundle's system prompt was probed.

        What was read of it is put into a file of the cache.

        if_read  only where something was probed, and only if the cache can be written to

        Raises OutputFileError.
        """
        with self._lifetime.call():
            if self._system_prompt is not None:
                (self._system_prompt.keep_if_read if if_read else self._system_prompt.keep)()

    # weights

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
            with self._lifetime.call():
                tokens = self.tokenize(each, parse_special=parse_special)
                probe = self._core.probe(self._core.cancellation(cancel))
                return self._using(adapters).weigh(strategy, tokens, probe)

        return [weigh(each) for each in prompt] if _are_many(prompt) else weigh(prompt)

    def hidden_states(
        self, prompt: Prompt, *, adapter: str | None = None, parse_special: bool = False
    ) -> F32:
        """States of the last token after each block: float32 [n_layer, n_embd].

        adapter  the one adapter that is on, at weight 1; None for the base alone
        """
        with self._lifetime.call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            if adapter is not None and adapter not in self.adapters:
                raise self._not_loaded(adapter, self.adapters)
            rows = self._core.rows([] if adapter is None else [adapter])
            steps = self._core.prober.states(tokens, rows, "last")
            return np.array(self._core.run(steps)[-1])

    def logits(
        self, prompt: Prompt, *, weights: Weights = None, parse_special: bool = False
    ) -> F32:
        """Logits of the token after the prompt: float32 [n_vocab]."""
        with self._lifetime.call():
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
        with self._lifetime.call():
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
        self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Measure each adapter against itself, for the strategies `calibrated` and `two-place`.

        prompts   neutral texts; in chat form when the base has a template, and as text
        progress  called with (prompts done, prompts in all)
        returns   adapter -> one of weighing.typical.KEYS -> what it says
        """
        with self._lifetime.call():
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

            return measure_typical(measure, self.adapters, prompts, progress)

    def _chat_query(self, text: str) -> Query:
        """A question in chat form when the base has a template, else as text."""
        tokens = self._query(text)
        span = self._weigher.find_question(tokens) or (0, len(tokens))
        return replace(self._weigher.query(tokens), question=span)

    def centroid(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> F32:
        """The mean embedding of sample texts, for the strategy `centroid`: float32 [n_embd].

        texts     in chat form when the base has a template, else as text
        progress  called with (texts done, texts in all)

        Raises PromptError for a text that is empty or too long.
        """
        with self._lifetime.call():
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


def _are_many(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts, texts or sequences of ids."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Iterable):
        return False  # one, if a wrong one
    return any(not isinstance(each, Integral) for each in prompt)
