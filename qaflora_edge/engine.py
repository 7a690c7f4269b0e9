"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from qaflora_edge.chat.messages import Message
from qaflora_edge.config import MAX_SEED, check
from qaflora_edge.engine_measures import EngineMeasures
from qaflora_edge.errors import OptionError, QafloraError, wrong_option
from qaflora_edge.inference.constraint import chosen_grammar
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.prompts import Prompt
from qaflora_edge.inference.request import Request, make_sampling
from qaflora_edge.openai.chat import answer_chat
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.weigher import Weights


class Engine(EngineMeasures):
    """A base with its adapters, ready to weigh them for each query.

    bundle    a bundle folder, or a base alone, a GGUF file; or give base and adapters (name ->
              adapter GGUF) instead
    n_ctx     tokens of prompt and answer together, of each request
    n_parallel  requests that are decoded together; others wait their turn
    threads   CPU threads, by default the cores this process may use
    gpu_layers  layers offloaded where the library was built with a GPU backend, or to workers
    rpc       HOST:PORT of workers, apart by commas: see docs/scale.md
    tensor_split  how many layers each worker and GPU gets, relative to the others, apart by commas
    kv_type   f16, f32 or q8_0
    adapter_type  q8_0 or q4_0: convert adapters as they are loaded (docs/performance.md has what it
              gains and costs); auto: as their files have them
    flash_attn  True or False; None: on where it is quicker (docs/performance.md)
    strategy, lens, pool  by default the bundle's; see `qaflora weights --help`
    prefix_cache  MiB for what the probe read of prompts, for others that begin alike
    seed      of sampled answers, when a call gives none

    Any thread may call it. Every failure is a QafloraError.
    """

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
        on_progress: Tell | None = None,
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
                      but stays as it was read under its turn's weights (as it does where
                      these are the same and the prompt begins with the earlier one): the Generation
                      that it goes on from, or True for the last one, with n_parallel=1
        on_weights    called with the weights once they are known, before the prompt is read
        on_progress   called meanwhile with "weighing" or "reading", how many tokens of the prompt
                      are done, and how many it has; at "weighing" by the thread that computes,
                      whose calls of this Engine raise BusyError then
        cancel        once it is set, the answer ends as by Generation.cancel
        wait          until the prompt was read; else it is, like the tokens after it, when a piece
                      of this or another answer is asked for
        more          top_k, min_p, repeat_penalty, ...: see request.Sampling

        The prompt is weighed before this returns.
        """
        sampling = make_sampling(
            stop,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=self.seed if seed is None else seed,
            grammar=chosen_grammar(grammar, json_schema),
            **more,
        )
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise wrong_option("cancel", cancel, "a threading.Event")
        with self._call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            cancellation = self._core.cancellation(cancel)
            probe = self._core.probe(cancellation, on_progress)
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
                self._core.wait_for_prompt(answer, on_progress)
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
        """Answer a prompt n times, weighed once; after cancel() no further answer comes.

        seed     of the first answer; the others have the next numbers
        options  as generate takes them

        Each answer is the one that the prompt gets alone, bit for bit.
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
            weights = replace(answer.fusion, probe_ms=0.0)
            options |= {"on_weights": None, "on_progress": None}

    def generate_many(
        self, requests: Iterable[Prompt | Mapping[str, Any]], **options: Any
    ) -> Iterator[tuple[int, Generation]]:
        """Answer many prompts, n_parallel of them together; (index, Generation) as they end.

        requests  prompts, or dicts with `prompt` or `messages` and options of generate; taken one
                  by one, as there is room
        options   of those that do not have them

        A request that fails ends with finish_reason "error", and `error` says why. After cancel()
        no more requests are taken.
        """
        if isinstance(requests, str | Mapping):
            raise OptionError(
                f"generate_many got the one request {requests!r:.100}, expected several; give a "
                "list of them."
            )
        source = enumerate(requests)
        running: dict[int, Generation] = {}
        cancellation = self._core.cancellation()
        while True:
            # One more than fit: it is weighed while the others are decoded.
            n_more = 0 if cancellation.is_set else self.n_parallel + 1 - len(running)
            for index, request in itertools.islice(source, n_more):
                running[index] = self._start(request, options)
            if not running:
                return
            with self._call():
                self._core.wait_for_any(running.values())
            for index in [i for i, answer in running.items() if answer.is_done]:
                yield index, running.pop(index)

    def _start(self, request: Prompt | Mapping[str, Any], options: Mapping[str, Any]) -> Generation:
        """Begin one of many; what is wrong with it is its own failure."""
        try:
            if not isinstance(request, Mapping):
                request = {"prompt": request}
            own = {**options, **request, "wait": False}
            prompt, messages = own.pop("prompt", None), own.pop("messages", None)
            if (prompt is None) == (messages is None):
                raise OptionError(
                    f"A request has {', '.join(map(str, request)) or 'nothing'}, expected either "
                    "prompt or messages, and options of generate."
                )
            tokens = self.chat_tokens(messages) if prompt is None else prompt
            return self.generate(tokens, **own)
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
