"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.bundles.open import Opened, load_bundle, open_files
from qaflora_edge.chat.messages import Message
from qaflora_edge.chat.tokens import chat_tokens
from qaflora_edge.config import MAX_SEED, check
from qaflora_edge.errors import OptionError, PromptError, QafloraError, StrategyError
from qaflora_edge.formats.checksums import check_unchanged
from qaflora_edge.inference.constraint import grammar_text
from qaflora_edge.inference.core import Core
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.lifetime import Lifetime
from qaflora_edge.inference.prompts import Prompt, checked_tokens, prompt_tokens
from qaflora_edge.inference.request import Request
from qaflora_edge.inference.sampling import make_sampling
from qaflora_edge.inference.score import Item
from qaflora_edge.openai.chat import answer_chat
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.calibrated import measure_typical
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.weigher import Weigher, Weights

F32 = NDArray[np.float32]
Path_ = str | os.PathLike[str]


class Engine:
    """A base with its adapters, ready to weigh them for each query.

    bundle    a bundle folder; or give base and adapters (name -> adapter GGUF) instead
    n_ctx     tokens of prompt and answer together, of each request
    n_parallel  requests that are decoded together; others wait their turn
    threads   CPU threads, by default the cores this process may use
    gpu_layers  layers offloaded where the library was built with a GPU backend
    kv_type   f16, f32 or q8_0
    strategy, lens, pool  by default the bundle's; see `qaflora weights --help`
    probe_tail  0, or how many tokens at a prompt's end the adapters are probed over, on top of
              what the base read before: faster for long prompts, and no longer exact
    seed      of sampled answers, when a call gives none

    Any thread may call it. Every failure is a QafloraError.
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
        flash_attn: bool = True,
        strategy: str | None = None,
        lens: str | None = None,
        pool: str | None = None,
        probe_tail: int = 0,
        seed: int | None = None,
    ) -> None:
        options = {"threads": threads, "kv_type": kv_type, "flash_attn": flash_attn}
        others = {"gpu_layers": gpu_layers, "probe_tail": probe_tail, "seed": seed}
        check("engine", {"n_ctx": n_ctx, "n_parallel": n_parallel, **options, **others})
        self._lifetime = Lifetime(self)

        opened = _open(bundle, base, adapters)
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
        )
        try:
            self._core = Core(
                self._lifetime,
                opened.header,
                opened.adapters,
                n_ctx=n_ctx,
                n_parallel=n_parallel,
                gpu_layers=gpu_layers,
                probe_tail=probe_tail,
                options=options,
            )
            check_unchanged(
                opened.states
            )  # llama.cpp opened the files by name, after they were checked
        except BaseException:
            self._lifetime.close()
            raise
        self._model = self._core.model
        self._weigher = replace(self._weigher, n_layer=self._model.n_layer)

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
    def strategy(self) -> str:
        """The strategy of calls that name none."""
        return self._weigher.strategy

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
        """Token ids of a conversation under the base's chat template."""
        with self._lifetime.call():
            tokens = chat_tokens(self._model, messages, tools=tools)
            return checked_tokens(self._model, tokens, self.n_ctx)

    # weights

    @overload
    def weights(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        *,
        strategy: str | None = ...,
        adapters: Sequence[str] | None = ...,
        parse_special: bool = ...,
    ) -> FusionWeights: ...
    @overload
    def weights(
        self,
        prompt: Sequence[Prompt],
        *,
        strategy: str | None = ...,
        adapters: Sequence[str] | None = ...,
        parse_special: bool = ...,
    ) -> list[FusionWeights]: ...
    def weights(
        self,
        prompt: Any,
        *,
        strategy: str | None = None,
        adapters: Sequence[str] | None = None,
        parse_special: bool = False,
    ) -> FusionWeights | list[FusionWeights]:
        """Weigh the adapters for a prompt, or for each of a list of prompts.

        adapters  those to weigh; by default those in use

        Returns FusionWeights with weights and divergence, float32 [n_adapter, n_layer].
        """
        if _are_many(prompt):
            return [
                self.weights(
                    each, strategy=strategy, adapters=adapters, parse_special=parse_special
                )
                for each in prompt
            ]
        with self._lifetime.call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            probe = self._core.probe(self._core.cancellation())
            return self._using(adapters).weigh(strategy, tokens, probe)

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
        if not _are_many(prompt):
            scored: F32 = self.score(
                [prompt], [continuation], weights=weights, parse_special=parse_special
            )[0]
            return scored
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
            return self._core.score(items, cancellation)

    def _continuation(self, prompt: Sequence[int], text: Prompt) -> tuple[int, ...]:
        if isinstance(text, str):
            text = self._model.tokenize(text, add_special=False, parse_special=False)
        checked_tokens(self._model, [*prompt, *text], self.n_ctx)
        if not text:
            raise PromptError("The continuation is empty; give at least one token.")
        return tuple(int(token) for token in text)

    def typical_divergence(
        self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Measure each adapter against itself, for the strategy `calibrated`.

        prompts   neutral texts; in chat form when the base has a template, else as text
        progress  called with (prompts done, prompts in all)
        returns   adapter -> lens -> geometric mean of the divergence at each layer
        """
        with self._lifetime.call():
            probe, query = self._core.probe(self._core.cancellation()), self._weigher.query

            def divergences(tokens: Sequence[int]) -> dict[str, Any]:
                both = {lens: replace(query(tokens), lens=lens) for lens in numbers.LENSES}
                return {lens: probe(each).divergence() for lens, each in both.items()}

            queries = [self._query(prompt) for prompt in prompts]
            return measure_typical(divergences, self.adapters, queries, progress)

    def _query(self, text: str) -> list[int]:
        """One message in chat form when the base has a template, else as text."""
        if not self.has_chat_template:
            return self.tokenize(text)
        return self.chat_tokens([{"role": "user", "content": text}])

    # answers

    def generate(
        self,
        prompt: Prompt,
        *,
        weights: Weights = None,
        adapters: Sequence[str] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        parse_special: bool = False,
        keep_history: bool | Generation = False,
        on_weights: Callable[[FusionWeights], None] | None = None,
        cancel: threading.Event | None = None,
        wait: bool = True,
        **more: Any,
    ) -> Generation:
        """Answer a prompt: an iterator over pieces of text, greedy unless temperature > 0.

        weights       a strategy, adapters' weights by name, or as `weights` gives them
        adapters      those to weigh; by default those in use
        grammar       GBNF text that the answer follows, with the start `root`
        json_schema   the answer is JSON that is valid under this schema; True: any JSON
        keep_history  what the prompt shares with an earlier prompt and answer is not read again,
                      but stays as it was read under its turn's weights (as it always does where
                      these are the same and the prompt begins with the earlier one): the Generation
                      that it goes on from, or True for the last one, with n_parallel=1
        on_weights    called with the weights once they are known, before the prompt is read
        cancel        once it is set, the answer ends as by Generation.cancel
        wait          until the prompt was read; else it is, like the tokens after it, when a piece
                      of this or another answer is asked for
        more          top_k, min_p, repeat_penalty, ...: see sampling.Sampling

        The prompt is weighed before this returns.
        """
        sampling = make_sampling(
            stop,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=self.seed if seed is None else seed,
            grammar=grammar_text(grammar, json_schema),
            **more,
        )
        with self._lifetime.call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            cancellation = self._core.cancellation(cancel)
            probe = self._core.probe(cancellation)
            sampler = self._core.sampler(sampling)  # a bad grammar is refused before the work
            fusion = self._using(adapters).weigh(weights, tokens, probe)
            if on_weights is not None:
                on_weights(fusion)
            request = Request(
                tuple(tokens),
                self._core.all_weights(fusion),
                sampling,
                adapters=fusion.adapters,
                goes_on_from=self._goes_on_from(keep_history),
                cancellation=cancellation,
            )
            answer = self._core.begin(request, sampler, fusion)
            answer._engine = self
            if wait:
                self._core.wait_for_prompt(answer)
            return answer

    def _goes_on_from(self, keep_history: bool | Generation) -> int | None:
        if isinstance(keep_history, Generation):
            return keep_history.number
        if keep_history and self.n_parallel > 1:
            raise OptionError(
                "Option keep_history is True, expected the Generation that the prompt goes on "
                "from: an Engine with n_parallel above 1 has no one last answer."
            )
        return self._core.last_answer if keep_history else None

    def answers(
        self, prompt: Prompt, n: int, *, seed: int | None = None, **options: Any
    ) -> Iterator[Generation]:
        """Answer a prompt n times, weighed and read once; after cancel() no further answer comes.

        seed     of the first answer; the others have the next numbers
        options  as generate takes them
        """
        first = self.seed if seed is None else seed
        check("answers", {"n": n, "seed": first})
        weights = options.pop("weights", None)
        for i in range(n):
            own_seed = None if first is None else (first + i) % MAX_SEED
            answer = self.generate(prompt, weights=weights, seed=own_seed, **options)
            yield answer
            if answer.is_cancelled:
                return
            # The same weights: what the context holds of the prompt is what it would read again.
            weights = replace(answer.fusion, probe_ms=0.0)
            options |= {"keep_history": answer, "on_weights": None}

    def generate_many(
        self, requests: Iterable[Prompt | Mapping[str, Any]], **options: Any
    ) -> Iterator[tuple[int, Generation]]:
        """Answer many prompts, n_parallel of them together; (index, Generation) as they end.

        requests  prompts, or dicts with `prompt` or `messages` and options of generate; taken one
                  by one, as there is room
        options   of those that do not have them

        A request that fails ends with finish_reason "error", and `error` says why.
        """
        source = enumerate(requests)
        running: dict[int, Generation] = {}
        while True:
            # One more than fit: it is weighed while the others are decoded.
            for index, request in itertools.islice(source, self.n_parallel + 1 - len(running)):
                running[index] = self._start(request, options)
            if not running:
                return
            with self._lifetime.call():
                self._core.wait_for_any(running.values())
            for index in [i for i, answer in running.items() if answer.is_done]:
                yield index, running.pop(index)

    def _start(self, request: Prompt | Mapping[str, Any], options: Mapping[str, Any]) -> Generation:
        """Begin one of many; what is wrong with it is its own failure."""
        try:
            if not isinstance(request, Mapping):
                return self.generate(request, wait=False, **options)
            own = {**options, **request}
            prompt, messages = own.pop("prompt", None), own.pop("messages", None)
            if (prompt is None) == (messages is None):
                raise OptionError(
                    f"A request has {', '.join(map(str, request)) or 'nothing'}, expected either "
                    "prompt or messages, and options of generate."
                )
            tokens = self.chat_tokens(messages) if prompt is None else prompt
            return self.generate(tokens, wait=False, **own)
        except QafloraError as error:
            return self._core.failed(error)

    # chat

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> dict[str, Any]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Iterator[dict[str, Any]]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: bool, **options: Any
    ) -> dict[str, Any] | Iterator[dict[str, Any]]: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        stream_options: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        **options: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer a conversation in OpenAI's shape: a dict, or chunks with stream=True.

        n                answers (choices); the conversation is weighed and read once
        tools, tool_choice  for bases whose template reads tools and that write <tool_call>
        response_format  {"type": "json_object"}, or {"type": "json_schema", "json_schema": ...}
        stream_options   {"include_usage": True} ends the chunks with one of the usage
        options          as generate takes them, and OpenAI's others where they change nothing

        The conversation is weighed and read before this returns.
        """
        return answer_chat(
            self,
            messages,
            stream=stream,
            n=n,
            tools=tools,
            tool_choice=tool_choice,
            response_format=response_format,
            stream_options=stream_options,
            grammar=grammar,
            **options,
        )


def _are_many(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts, texts or sequences of ids."""
    return not isinstance(prompt, str) and any(not isinstance(each, Integral) for each in prompt)


def _open(bundle: Path_ | None, base: Path_ | None, adapters: Mapping[str, Path_] | None) -> Opened:
    if bundle is not None:
        if base is not None or adapters is not None:
            raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
        return load_bundle(Path(bundle))
    if base is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    paths = {name: Path(path) for name, path in (adapters or {}).items()}
    return open_files(Path(base), paths)
