"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np
from msgspec import structs

from qaflora_edge.answering.generation import Generation, failed
from qaflora_edge.arrays import F32
from qaflora_edge.ask import Ask, Chat, Plain, Prompt, Question, Tools, asked, one_of
from qaflora_edge.backend.context import trim
from qaflora_edge.backend.model import Model, shared_model
from qaflora_edge.bundles.open import Begin, Opened, load_bundle
from qaflora_edge.config import MAX_SEED, check
from qaflora_edge.errors import OptionError, QafloraError, StrategyError, wrong_option
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.inference.core import Core, check_process
from qaflora_edge.progress import Tell, TellCount, silent
from qaflora_edge.weighing.plan import FusionWeights
from qaflora_edge.weighing.strategy import Query
from qaflora_edge.weighing.weigher import Weigher, Weights

if TYPE_CHECKING:
    from qaflora_edge.answering.decide import Decision
    from qaflora_edge.formats.adapter import AdapterInfo
    from qaflora_edge.prompt.calls import Calls
    from qaflora_edge.prompt.tokens import Reader
    from qaflora_edge.weighing.adapter_inputs import AttentionSizes

C = TypeVar("C", bound=Callable[..., Any])


def _steady(call: C) -> C:
    """Let a call keep the adapters with which it began, whatever is added or removed."""

    @wraps(call)
    def kept(engine: "Engine", /, *args: Any, **kwargs: Any) -> Any:
        return call(copy.copy(engine), *args, **kwargs)

    return cast(C, kept)


class Engine:
    """Weigh adapters for each query, and answer with the weighed mix over one base.

    bundle    a bundle folder, or a base alone, a GGUF file; or give base and adapters (name ->
              adapter GGUF) instead
    n_ctx     most tokens of prompt and answer together, of each request, allocated at once. None:
              what the base was trained for, within free memory, allocated when a request needs it
    n_parallel  requests that are decoded together; others wait in a queue
    threads   CPU threads, by default the cores that this process may use
    gpu_layers  layers offloaded where the library was built with a GPU backend, or to workers
    rpc       HOST:PORT of workers, separated by commas: see docs/backends.md
    tensor_split  how many layers each worker and GPU gets, relative to the others
    kv_type   f16, f32 or q8_0
    adapter_type  q8_0 or q4_0: convert adapters as they are loaded (docs/performance.md has gain
              and cost); auto: as their files have them
    flash_attn  True or False; None: on where it is quicker (docs/performance.md)
    strategy, lens, pool, prefill  by default the bundle's; see `qaflora run --help-all`
    prefix_cache  MiB for the probe's KV states of earlier prompts, for prompts that begin alike
    guesses   guess at most so many tokens from what stands before, and verify them in one pass;
              "auto": as many as pay, where answers stay the same bits; 0: none
    seed      of sampled answers, when a call gives none
    reasoning  "on" or "off": ask the chat template for a thought before each answer, or for none

    Any thread may call it. Every failure is a QafloraError.
    """

    def __init__(
        self,
        bundle: AnyPath | None = None,
        *,
        base: AnyPath | None = None,
        adapters: Mapping[str, AnyPath] | None = None,
        n_ctx: int | None = None,
        n_parallel: int = 1,
        threads: int | None = None,
        gpu_layers: int | None = None,
        rpc: str | None = None,
        tensor_split: str | None = None,
        kv_type: str = "f16",
        adapter_type: str = "auto",
        flash_attn: bool | None = None,
        strategy: str | None = None,
        lens: str | None = None,
        pool: str | None = None,
        prefill: str | None = None,
        prefix_cache: int = 128,
        guesses: int | str = "auto",
        seed: int | None = None,
        reasoning: str = "auto",
        **unknown: Any,
    ) -> None:
        placing = {"gpu_layers": gpu_layers, "rpc": rpc, "tensor_split": tensor_split}
        options = {
            "n_ctx": n_ctx,
            "n_parallel": n_parallel,
            "threads": threads,
            "kv_type": kv_type,
            "flash_attn": flash_attn,
            "adapter_type": adapter_type,
            "prefix_cache": prefix_cache,
            "guesses": unknown.pop("draft", guesses),  # its name before
        }
        check("engine", unknown | options | placing | {"seed": seed, "reasoning": reasoning})
        check_process()
        place, paths = _places(bundle, base, adapters)
        self.seed = seed
        self.n_parallel = n_parallel
        self.reasoning = reasoning
        self._options: dict[str, Any] = {"placing": placing, **options}
        self._changing = threading.Lock()
        chosen = {"strategy": strategy, "lens": lens, "pool": pool, "prefill": prefill}
        with self._loading() as begin:
            opened = load_bundle(place, paths, begin=begin, use=partial(self._start, chosen))
        self._cores = [weakref.ref(self._core)]  # also those that answer their last requests
        model = self._core.model
        self._model = model
        self.n_ctx = self._core.n_ctx  # most tokens of a request
        self.loaded_adapters = self._core.adapters  # also those not in use
        registered = opened.text.base.registry if opened.text else None
        self.name = registered or model.name  # of the registry; or the base's own, or its file's
        self.n_layer = model.n_layer
        self.n_vocab = model.n_vocab
        self.n_ctx_train = model.n_ctx_train  # tokens of the longest text in training
        self.has_chat_template = bool(model.chat_template)

    @contextmanager
    def _loading(self) -> Iterator[Begin]:
        """Give what lets the library load a base, in a thread, while adapters are read."""
        placing = self._options["placing"]
        loading: list[Future[Model]] = []

        def begin(header: GgufHeader) -> None:
            if placing["rpc"] is None:  # a worker that is silent is waited for once
                loading.append(thread.submit(shared_model, header, placing))

        with ThreadPoolExecutor(1) as thread:
            try:
                yield begin
            finally:
                for model in loading:
                    with suppress(QafloraError):  # which _start meets too
                        model.result().close()

    def _start(self, chosen: Mapping[str, str | None], opened: Opened) -> None:
        self.opened = opened  # the facts of the bundle's files
        self.system = opened.text.system if opened.text else ""
        examples = opened.text.examples if opened.text else ()
        self.examples = tuple(structs.asdict(message) for message in examples)
        # A base alone chooses its strategy when it gets its first adapter.
        is_alone = opened.text is None and not opened.adapters
        self._chooses = chosen["strategy"] is None and is_alone
        self.weigher = Weigher(  # for calls that begin now
            adapters=tuple(opened.adapters),
            n_layer=opened.header.n_layer,
            known=opened.known.under(**chosen),
            targets={name: info.targets for name, info in opened.adapters.items()},
        )
        self._core = self._open(opened)

    def _open(self, opened: Opened) -> Core:
        infos = opened.adapters.values()
        paths = (opened.base_path, *(info.path for info in infos))
        states = {path: opened.states[path] for path in paths}
        with ThreadPoolExecutor(1) as thread:  # while the library loads the base
            sizes = thread.submit(_read_ahead, self.weigher, infos).result
            return Core(opened.header, opened.adapters, states, sizes=sizes, **self._options)

    def close(self) -> None:
        """Free the model, the adapters and all contexts. A second call does nothing.

        Calls of other threads end with BusyError, and so does close() within a call.
        """
        while cores := [core for core in self._all_cores() if not core.is_closed]:
            for core in cores:
                core.close()

    @property
    def chat_template(self) -> str | None:
        """Give the base's chat template; None: it has none."""
        return self._model.chat_template

    @contextmanager
    def model(self) -> Iterator[Model]:
        """Give the base, which stays open within the block."""
        with self._core.call():
            yield self._model

    def _all_cores(self) -> list[Core]:
        return [core for reference in self._cores if (core := reference())]

    def cancel(self) -> None:
        """End what the Engine does now; any thread may call it, and it returns at once.

        Answers end with finish_reason "cancelled" and keep their text. Calls that weigh or prefill
        raise CancelledError. To end one call alone, give it an event (`cancel=`).
        """
        for core in self._all_cores():
            core.cancel()

    def run_forever(self) -> None:
        """Compute what other threads ask for, until close(); for servers, in a thread of its own.

        Without it callers compute for each other. With it they only wait.
        """
        core = None
        while core is not self._core:  # until close(), once for each set of adapters
            core = self._core
            with core.call():
                core.loop.run_forever()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(self.adapters) or "no adapters"
        return f"<Engine {self.name}: {names}; strategy {self.strategy}>"

    @property
    def adapters(self) -> tuple[str, ...]:
        """Name the adapters in use, in the order of every first axis."""
        return self.weigher.adapters

    @property
    def strategy(self) -> str:
        """Name the strategy of calls that name none."""
        return self.weigher.known.strategy

    @property
    def strategies(self) -> tuple[str, ...]:
        """Name every strategy that needs no argument and can be followed here."""
        return self.weigher.followed

    @property
    def prefix_cache_bytes(self) -> int:
        """Give the size of the cached prefixes, at most `prefix_cache`: see Engine."""
        return self._core.prober.prefixes.n_byte

    def add_adapter(self, name: str | None, path: AnyPath, progress: Tell = silent) -> str:
        """Load an adapter, which takes part from the next call on, and give its name.

        name  None: the folder's or file's
        path  an adapter GGUF, which has to stay there; a PEFT folder, which is converted into the
              cache; or the Hub's owner/name

        It is measured for the strategy and, where that can be followed, relay. What has begun
        keeps its adapters, and its contexts in memory, to its end. A failure changes nothing.
        """
        from qaflora_edge.bundles.create import BEST, with_adapter
        from qaflora_edge.bundles.source import find_adapter

        check_process()
        source = find_adapter(path)  # other changes do not wait for what the Hub sends
        measuring = partial(Engine, threads=self._options["threads"], **self._options["placing"])
        with self._changing:
            strategies = {self.strategy, *{BEST}.intersection(self.strategies)}
            opened = with_adapter(self.opened, source, name, measuring, strategies, progress)
            *_, name = opened.adapters
            self._change(opened, {*self.adapters, name})
        return name

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter. What has begun keeps it, as with add_adapter.

        Raises StrategyError for an unknown name, or when the strategy names this adapter.
        """
        check_process()
        with self._changing:
            if name not in self.loaded_adapters:
                raise _not_loaded(name, self.loaded_adapters)
            left = {other: info for other, info in self.opened.adapters.items() if other != name}
            self._change(replace(self.opened, adapters=left), self.adapters)

    def _change(self, opened: Opened, used: Collection[str]) -> None:
        from qaflora_edge.bundles.create import UNMEASURED

        known = self.weigher.known
        left = opened.adapters.keys() & known.centroids.keys()
        centroids = {name: known.centroids[name] for name in left}
        weigher = replace(
            self.weigher,
            adapters=tuple(name for name in opened.adapters if name in used),
            known=replace(known, typical=opened.known.typical, centroids=centroids),
            targets={name: info.targets for name, info in opened.adapters.items()},
        )
        if self._chooses and UNMEASURED in weigher.followed:
            weigher = replace(weigher, known=replace(weigher.known, strategy=UNMEASURED))
        core = self._open(opened)
        old = self._core
        core.n_ctx = self.n_ctx  # as much memory was free at first
        with old.call():  # raises BusyError after close()
            self._cores = [weakref.ref(kept) for kept in (*self._all_cores(), core)]
            self.opened = opened
            self._chooses = False
            self.loaded_adapters = core.adapters
            self.__dict__.update(_core=core, weigher=weigher)  # in one step: see _steady
        old.loop.leave()
        trim()  # measuring frees much in this thread

    def use_adapters(self, names: Sequence[str]) -> None:
        """Weigh only these adapters from now on; the others are neither probed nor applied.

        names  in any order; the order of the first axes stays that of `loaded_adapters`

        Raises StrategyError for an unknown name, or when the strategy names another adapter.
        """
        with self._changing, self._core.call():
            self.weigher = self._using(names)

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy where a call names none. Raises StrategyError."""
        with self._changing, self._core.call():
            known = replace(self.weigher.known, strategy=strategy)
            self.weigher = replace(self.weigher, known=known)
            self._chooses = False

    def _using(self, names: Sequence[str] | None) -> Weigher:
        """Give the weigher with these adapters in use; None: as they are."""
        if names is None:
            return self.weigher
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise wrong_option("adapters", names, "a list of their names")
        loaded = self.loaded_adapters
        for name in names:
            if name not in loaded:
                raise _not_loaded(name, loaded)
        return replace(self.weigher, adapters=tuple(n for n in loaded if n in names))

    def _reader(self) -> "Reader":
        from qaflora_edge.prompt.tokens import Reader

        system = self.system or None
        return Reader(self._model, self.n_ctx, system, self.examples, self.reasoning)

    def read(self, question: Question, *, parse_special: bool = False) -> Prompt:
        """Turn what is asked into tokens, and find the question in them; see tokenize."""
        with self._core.call():
            return self._reader().read(question, parse_special)

    def tokenize(self, prompt: Plain, *, parse_special: bool = False) -> list[int]:
        """Turn a prompt into token ids: text as it is, with BOS where the base asks for it, or ids.

        Raises PromptError when it is empty, longer than n_ctx, or has an id out of range.
        """
        with self._core.call():
            return self._reader().tokens(prompt, parse_special)

    def chat_tokens(
        self, messages: Sequence[Any], *, tools: Sequence[Mapping[str, Any]] = (), **how: Any
    ) -> list[int]:
        """Turn a conversation into token ids under the base's chat template.

        how  continue_final_message, add_generation_prompt, chat_template_kwargs: see `chat`

        The bundle's system prompt comes first where the messages have none, then its examples.
        """
        chat = Chat(messages, Tools(tools) if tools else None, **how)
        with self._core.call():
            return self._reader().tokens(chat)

    @_steady
    def weights(
        self,
        prompt: Any,
        *,
        strategy: str | None = None,
        adapters: Sequence[str] | None = None,
        raw: bool = False,
        parse_special: bool = False,
        cancel: threading.Event | None = None,
    ) -> Any:
        """Weigh the adapters for a prompt, or for each of a list of prompts.

        prompt    messages, a text (a user turn where the base has a chat template), or token ids
        adapters  those to weigh; by default those in use
        raw       take a text as it is, as parse_special does
        cancel    once it is set, CancelledError is raised

        Returns FusionWeights, weights float32 [n_adapter, n_layer], or a list of them.
        """
        from qaflora_edge.answering.reading import PromptReading
        from qaflora_edge.prompt.messages import are_many, as_turn, whole

        is_plain = raw or parse_special

        def weigh(one: Any) -> FusionWeights:
            with self._core.call():
                read = self.read(as_turn(one, is_plain=is_plain), parse_special=parse_special)
                weigher = self._using(adapters)
                choice = weigher.chosen(strategy)
                query = weigher.query(read, choice)
                with PromptReading(self._core, query, self._core.cancellation(cancel)) as reading:
                    return weigher.weigh(choice, reading)

        prompt = whole(prompt)
        return [weigh(one) for one in prompt] if are_many(prompt) else weigh(prompt)

    @_steady
    def hidden_states(
        self, prompt: Plain, *, adapter: str | None = None, parse_special: bool = False
    ) -> F32:
        """Give the states of the last token after each block: float32 [n_layer, n_embd].

        adapter  the one adapter that is on, at weight 1; None for the base alone
        """
        with self._core.call():
            tokens = self.tokenize(prompt, parse_special=parse_special)
            if adapter is not None and adapter not in self.adapters:
                raise _not_loaded(adapter, self.adapters)
            rows = self._core.rows([] if adapter is None else [adapter])
            steps = self._core.prober.states(tokens, rows)
            return np.array(self._core.run(steps)[-1])

    @_steady
    def logits(
        self,
        prompt: Plain,
        *,
        weights: Weights = None,
        strategy: str | None = None,
        parse_special: bool = False,
    ) -> F32:
        """Give the logits of the token after the prompt: float32 [n_vocab].

        weights, strategy  as generate takes them
        """
        ask = asked(
            prompt, weights=weights, strategy=strategy, parse_special=parse_special, max_tokens=0
        )
        return self.submit(ask).prompt_logits

    @_steady
    def score(
        self,
        prompt: Any,
        continuation: Any,
        *,
        weights: Weights = None,
        strategy: str | None = None,
        parse_special: bool = False,
    ) -> Any:
        """Score each token of a continuation: log-probabilities in nats, float32 [n_token].

        prompt, continuation  text or ids, a continuation's text without BOS; or lists of both, of
                              the same length, scored together: the scores are a list then. A
                              prompt that occurs several times is weighed and prefilled once.
        weights, strategy     for all of them, as generate takes them

        Raises PromptError when a continuation is empty, or too long for n_ctx with its prompt.
        """
        from qaflora_edge.answering.score import score as scored
        from qaflora_edge.prompt.messages import are_many, paired, whole

        prompt = whole(prompt)
        continuation = whole(continuation)
        by = one_of(weights, strategy)
        with self._core.call():
            pairs = []
            for question, text in paired(prompt, continuation):
                read = self.read(question, parse_special=parse_special)
                pairs.append((read, self._reader().continuation(read, text)))
            scores = scored(self._core, self.weigher, by, pairs)
        return scores if are_many(prompt) else scores[0]

    @_steady
    def decide(
        self,
        prompt: Any,
        choices: Any,
        *,
        strategy: str | None = None,
        adapters: Sequence[str] | None = None,
        compare: bool = False,
        cancel: threading.Event | None = None,
    ) -> "Decision":
        """Choose one of several texts: a Decision, with probabilities. Nothing is decoded.

        prompt   the question: a text, or messages that end with a user's
        choices  texts, or text -> what it means; 255 at most
        compare  also what the base and each adapter choose

        Raises ChatTemplateError for a base without a chat template, OptionError for wrong choices.
        """
        from qaflora_edge.answering.decide import decide

        with self._core.call():
            return decide(
                self._core,
                self._reader(),
                self._using(adapters),
                prompt,
                choices,
                strategy,
                compare=compare,
                cancellation=self._core.cancellation(cancel),
            )

    @_steady
    def typical_divergence(
        self,
        prompts: Sequence[str],
        progress: TellCount | None = None,
        keys: Collection[str] | None = None,
        turns: Sequence[str] = (),
        exchanges: Sequence[Sequence[Any]] = (),
    ) -> dict[str, dict[str, Any]]:
        """Measure each adapter against itself, for strategies; see answering.typical.measure.

        prompts   neutral texts; in chat form when the base has a template, and as text
        turns     short turns, such as greetings: chats for EXTENTS alone
        exchanges  conversations that end with an answer; behind one each text is a later turn too
        progress  called with (prompts read, those in all); each is read several times
        """
        from qaflora_edge.answering.typical import measure
        from qaflora_edge.prompt.messages import as_turn

        with self._core.call():
            texts = (*prompts, *turns)
            exchanges = exchanges[: len(texts)] if self.has_chat_template else ()
            later = []  # texts behind each exchange
            for at, exchange in enumerate(exchanges):
                turn_texts = texts[at :: len(exchanges)]
                chats = [[*exchange, {"role": "user", "content": text}] for text in turn_texts]
                later.append([self._query(Chat(messages)) for messages in chats])
            first = [self._query(as_turn(text)) for text in texts]
            plain = [self._query(text) for text in prompts]
            return measure(self._core, first, plain, later, keys, progress or silent)

    def _query(self, question: Question) -> Query:
        return self.weigher.query(self.read(question))

    @_steady
    def embedding(self, prompt: Any) -> F32:
        """Average the base's last states over a prompt, as `weights` takes it: float32 [n_embd]."""
        from qaflora_edge.prompt.messages import as_turn

        with self._core.call():
            steps = self._core.prober.mean_states(self._reader().tokens(as_turn(prompt)))
            return np.array(self._core.run(steps)[-1])

    @_steady
    def embed(self, text: Plain, cancel: threading.Event | None = None) -> F32:
        """Embed a text by the base alone: float32 [n_embd], of length 1, to compare by products.

        Texts of one meaning are closest in the middle of a base: its states after three of five
        blocks are averaged, but for the first token's, which bases use for something else.

        cancel  once it is set, CancelledError is raised
        """
        with self._core.call():
            tokens = self.tokenize(text)
            steps = self._core.prober.mean_states(tokens, min(1, len(tokens) - 1))
            states = self._core.run(steps, self._core.cancellation(cancel))  # [n_layer, n_embd]
            state = np.array(states[3 * self.n_layer // 5], np.float32)
            return np.asarray(state / np.linalg.norm(state))

    @_steady
    def submit(self, ask: Ask) -> Generation:
        """Answer what is asked, once: an iterator over pieces of text.

        The prompt is weighed before this returns. KV state is reused where prefill would compute
        the same bits: of what the base prefills, and of prompts under the same weights.
        """
        return self._answer(self._read(ask))

    @_steady
    def submit_all(self, ask: Ask) -> Iterator[Generation]:
        """Answer what is asked `ask.n` times, weighed once; after cancel() no further answer comes.

        Each answer begins from the same prefill as one alone, bit for bit.
        """
        ask = self._read(ask)
        first = ask.sampling.seed
        for i in range(ask.n):
            if first is not None:
                sampling = replace(ask.sampling, seed=(first + i) % MAX_SEED)
                ask = replace(ask, sampling=sampling)
            answer = self._answer(ask)
            yield answer
            answer.wait_for_draft()  # which all share
            if answer.is_cancelled:
                return
            weighing = replace(ask.weighing, by=replace(answer.fusion, probe_ms=0.0))
            ask = replace(ask, weighing=weighing, on_weights=silent, on_progress=silent)

    @_steady
    def submit_many(self, asks: Iterable[Ask | QafloraError]) -> Iterator[tuple[int, Generation]]:
        """Answer what is asked, n_parallel of it together; (index, Generation) as they end.

        asks  as generate_many takes requests; an error in place of one ends that one alone
        """
        source = enumerate(asks)
        running: dict[int, Generation] = {}
        cancellation = self._core.cancellation()
        while True:
            # One more than fit: it is weighed while the others are decoded.
            n_more = 0 if cancellation.is_set else self.n_parallel + 1 - len(running)
            for index, ask in itertools.islice(source, n_more):
                running[index] = self._started(ask)
            if not running:
                return
            with self._core.call():
                self._core.loop.drive(
                    lambda: any(answer.is_step_done for answer in running.values())
                )
            for answer in running.values():
                answer.go_on()
            for index in [i for i, answer in running.items() if answer.is_done]:
                yield index, running.pop(index)

    def _started(self, ask: Ask | QafloraError) -> Generation:
        """Begin one of many; its errors end itself alone."""
        if isinstance(ask, QafloraError):
            return failed(self._core, ask)
        try:
            return self._answer(self._read(replace(ask, waits=False)))
        except QafloraError as error:
            return failed(self._core, error)

    def _answer(self, ask: Ask) -> Generation:
        from qaflora_edge.answering.answer import answer

        with self._core.call():
            return answer(self._core, self._using(ask.weighing.adapters), ask)

    def _read(self, ask: Ask) -> Ask:
        sampling = ask.sampling
        if sampling.seed is None and self.seed is not None:
            sampling = replace(sampling, seed=self.seed)
        tools = ask.prompt.tools if isinstance(ask.prompt, Chat) else None
        calls: Calls | None = None
        if tools or ask.json_schema is not None or sampling.grammar is not None:
            from qaflora_edge.prompt.calls import bound, calls_of

            calls = calls_of(self.chat_template, tools)
            sampling = bound(sampling, ask.json_schema, calls)
        prompt = self.read(ask.prompt, parse_special=ask.parse_special)
        if calls is not None:
            prompt = replace(prompt, calls=calls)
        is_special = ask.parse_special and not isinstance(ask.prompt, Chat)
        return replace(
            ask, prompt=prompt, sampling=sampling, json_schema=None, parse_special=is_special
        )

    def generate(self, prompt: Plain, **options: Any) -> Generation:
        """Answer a prompt: an iterator over pieces of text, greedy unless temperature > 0.

        options  of ask.Sampling and ask.Ask: max_tokens, temperature, seed, stop, grammar,
                 json_schema, cancel, on_weights, ...; weights, as `weights` gives them or numbers
                 by name, or a strategy; adapters, those to weigh; prefill, as Engine takes it.
                 wait=False: prefill when the first piece of this or another answer is requested

        Of a chat the thought before the answer is kept apart: Generation.thoughts and `reasoning`.
        """
        return self.submit(asked(prompt, **options))

    def answers(self, prompt: Plain, n: int, **options: Any) -> Iterator[Generation]:
        """Answer a prompt n times, weighed once: see submit_all.

        options  as generate takes them; `seed` is that of the first answer
        """
        return self.submit_all(asked(prompt, n=n, **options))

    def generate_many(
        self, requests: Iterable[Plain | Mapping[str, Any]], **options: Any
    ) -> Iterator[tuple[int, Generation]]:
        """Answer many prompts, n_parallel of them together; (index, Generation) as they end.

        requests  prompts, or dicts with `prompt` or `messages` and options of generate; taken one
                  by one, as slots become free
        options   of requests that do not have them

        One that fails has finish_reason "error" and `error`. After cancel() no more are taken.
        """
        if isinstance(requests, str | Mapping):
            raise OptionError(
                f"generate_many got the one request {requests!r:.100}, expected several; give a "
                "list of them."
            )
        return self.submit_many(_one_of_many(request, options) for request in requests)

    def chat(self, messages: Sequence[Any], *, stream: bool = False, **options: Any) -> Any:
        """Answer a conversation in OpenAI's shape: a dict, or chunks with stream=True.

        Fields are attributes too: answer.choices[0].message.content.

        n                answers (choices); the conversation is weighed once
        tools, tool_choice  for bases with tools as Hermes, Qwen, Llama 3 or Mistral have them
        continue_final_message  go on from the last message; by default where it is an assistant's
        add_generation_prompt, chat_template_kwargs  for the template, as transformers takes them
        response_format  {"type": "json_object"}, or {"type": "json_schema", "json_schema": ...}
        stream_options   {"include_usage": True} ends the chunks with one of the usage
        options          as generate takes them, and OpenAI's others where they change nothing

        The conversation is weighed and prefilled before this returns.
        """
        from qaflora_edge.dialects.openai_chat import answer_chat

        return answer_chat(self, messages, stream=stream, **options)


def _places(
    bundle: AnyPath | None, base: AnyPath | None, adapters: Mapping[str, AnyPath] | None
) -> tuple[Path, dict[str, Path] | None]:
    """Give the bundle, or the base and its adapters, as load_bundle takes them."""
    if bundle is not None and (base is not None or adapters is not None):
        raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
    if bundle is not None:
        return Path(bundle), None
    if base is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    return Path(base), {name: Path(path) for name, path in (adapters or {}).items()}


def _one_of_many(
    request: Plain | Mapping[str, Any], options: Mapping[str, Any]
) -> Ask | QafloraError:
    try:
        if not isinstance(request, Mapping):
            return asked(request, **options)
        keywords = dict(options) | dict(request)
        prompt = keywords.pop("prompt", None)
        messages = keywords.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise OptionError(
                f"A request has {', '.join(map(str, request)) or 'nothing'}, expected either "
                "prompt or messages, and options of generate."
            )
        return asked(Chat(messages) if prompt is None else prompt, **keywords)
    except QafloraError as error:
        return error


def _read_ahead(weigher: Weigher, infos: "Iterable[AdapterInfo]") -> "list[AttentionSizes]":
    """Read what a first chat needs: templates' code, and for two-place the adapters' matrices."""
    from qaflora_edge.weighing.adapter_inputs import AttentionSizes

    import_module("qaflora_edge.prompt.tokens")
    strategy = weigher.strategy_of(None)
    needed = infos if strategy is not None and strategy.reads_added else ()
    return [AttentionSizes(info, weigher.n_layer) for info in needed]


def _not_loaded(name: str, loaded: Sequence[str]) -> StrategyError:
    return StrategyError(
        f"The adapter {name!r} is not loaded; expected names out of: "
        f"{', '.join(loaded) or 'none is loaded'}."
    )
