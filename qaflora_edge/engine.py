"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from qaflora_edge.answering.generation import Generation
from qaflora_edge.arrays import F32
from qaflora_edge.ask import (
    Ask,
    Chat,
    Plain,
    Prompt,
    Question,
    Tools,
    Weighing,
    asked,
    asked_by,
    one_of,
)
from qaflora_edge.backend.model import Model
from qaflora_edge.bundles.memory import BundleMemory, paths_of
from qaflora_edge.config import check
from qaflora_edge.errors import OptionError, QafloraError
from qaflora_edge.files import AnyPath
from qaflora_edge.inference.core import Core, check_process
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.weigher import Weights, not_loaded

if TYPE_CHECKING:
    from qaflora_edge.answering.decide import Decision
    from qaflora_edge.weighing.plan import FusionWeights


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
            "guesses": unknown.pop("draft", guesses),  # its name before
        }
        check("engine", unknown | options | placing | {"seed": seed, "reasoning": reasoning})
        check_process()
        path, paths = paths_of(bundle, base, adapters)
        self.n_parallel = n_parallel
        self._placing: dict[str, Any] = placing | {"threads": threads}
        self.memory = BundleMemory(options | {"placing": placing})
        self.memory.open(
            path,
            paths,
            {"strategy": strategy, "lens": lens, "pool": pool, "prefill": prefill},
            reasoning=reasoning,
            seed=seed,
        )
        text = self.memory.files.text
        model = self._core.model
        self._model = model
        self.n_ctx = self._core.n_ctx  # most tokens of a request
        registered = text.base.registry if text else None
        self.name = registered or model.name  # of the registry; or the base's own, or its file's
        self.system = text.system if text else ""
        self.n_layer = model.n_layer
        self.n_vocab = model.n_vocab
        self.n_ctx_train = model.n_ctx_train  # tokens of the longest text in training
        self.chat_template = model.chat_template  # None: it has none
        self.has_chat_template = bool(model.chat_template)

    @property
    def _core(self) -> Core:
        return self.memory.current.core

    def close(self) -> None:
        """Free the model, the adapters and all contexts. A second call does nothing.

        Calls of other threads end with BusyError, and so does close() within a call.
        """
        self.memory.close()

    @contextmanager
    def model(self) -> Iterator[Model]:
        """Give the base, which stays open within the block."""
        with self._core.call():
            yield self._model

    def cancel(self) -> None:
        """End what the Engine does now; any thread may call it, and it returns at once.

        Answers end with finish_reason "cancelled" and keep their text. Calls that weigh or prefill
        raise CancelledError. To end one call alone, give it an event (`cancel=`).
        """
        for core in self.memory.cores():
            core.cancel()

    def run_forever(self) -> None:
        """Compute what other threads ask for, until close(); for servers, in a thread of its own.

        Without it callers compute for each other. With it they only wait.
        """
        self.memory.run_forever()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(self.adapters) or "no adapters"
        return f"<Engine {self.name}: {names}; strategy {self.strategy}>"

    @property
    def loaded_adapters(self) -> tuple[str, ...]:
        """Name the adapters in memory, also those not in use."""
        return self._core.adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Name the adapters in use, in the order of every first axis."""
        return self.memory.current.weigher.adapters

    @property
    def strategy(self) -> str:
        """Name the strategy of calls that name none."""
        return self.memory.current.weigher.known.strategy

    @property
    def strategies(self) -> tuple[str, ...]:
        """Name every strategy that needs no argument and can be followed here."""
        return self.memory.current.weigher.followed

    def add_adapter(self, name: str | None, path: AnyPath, progress: Tell = silent) -> str:
        """Load an adapter, which takes part from the next call on, and give its name.

        name  None: the folder's or file's
        path  an adapter GGUF, which has to stay there; a PEFT folder, which is converted into the
              cache; or the Hub's owner/name

        It is measured for the strategy and, where that can be followed, relay. What has begun
        keeps its adapters, and its contexts in memory, to its end. A failure changes nothing.
        """
        check_process()
        return self.memory.add_adapter(name, path, partial(Engine, **self._placing), progress)

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter. What has begun keeps it, as with add_adapter.

        Raises StrategyError for an unknown name, or when the strategy names this adapter.
        """
        check_process()
        self.memory.remove_adapter(name)

    def use_adapters(self, names: Sequence[str]) -> None:
        """Weigh only these adapters from now on; the others are neither probed nor applied.

        names  in any order; the order of the first axes stays that of `loaded_adapters`

        Raises StrategyError for an unknown name, or when the strategy names another adapter.
        """
        self.memory.use_adapters(names)

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy where a call names none. Raises StrategyError."""
        self.memory.use_strategy(strategy)

    def read(self, question: Question, *, parse_special: bool = False) -> Prompt:
        """Turn what is asked into tokens, and find the question in them; see tokenize."""
        with self._core.call():
            return self.memory.current.reader.read(question, parse_special)

    def tokenize(self, prompt: Plain, *, parse_special: bool = False) -> list[int]:
        """Turn a prompt into token ids: text as it is, with BOS where the base asks for it, or ids.

        Raises PromptError when it is empty, longer than n_ctx, or has an id out of range.
        """
        with self._core.call():
            return self.memory.current.reader.tokens(prompt, parse_special)

    def chat_tokens(
        self, messages: Sequence[Any], *, tools: Sequence[Mapping[str, Any]] = (), **how: Any
    ) -> list[int]:
        """Turn a conversation into token ids under the base's chat template.

        how  continue_final_message, add_generation_prompt, chat_template_kwargs: see `chat`

        The bundle's system prompt comes first where the messages have none, then its examples.
        """
        chat = Chat(messages, Tools(tools) if tools else None, **how)
        with self._core.call():
            return self.memory.current.reader.tokens(chat)

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

        current = self.memory.current
        core = current.core
        is_plain = raw or parse_special

        def weigh(one: Any) -> "FusionWeights":
            with core.call():
                read = current.reader.read(as_turn(one, is_plain=is_plain), parse_special)
                choice = current.weigher.choice(read, Weighing(strategy, adapters))
                with PromptReading(core, choice.query, core.cancellation(cancel)) as reading:
                    return choice.weigh(reading)

        prompt = whole(prompt)
        return [weigh(one) for one in prompt] if are_many(prompt) else weigh(prompt)

    def hidden_states(
        self, prompt: Plain, *, adapter: str | None = None, parse_special: bool = False
    ) -> F32:
        """Give the states of the last token after each block: float32 [n_layer, n_embd].

        adapter  the one adapter that is on, at weight 1; None for the base alone
        """
        current = self.memory.current
        core = current.core
        with core.call():
            tokens = current.reader.tokens(prompt, parse_special)
            names = current.weigher.adapters
            if adapter is not None and adapter not in names:
                raise not_loaded(adapter, names)
            rows = core.rows([] if adapter is None else [adapter])
            return np.array(core.run(core.prober.states(tokens, rows))[-1])

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
        from qaflora_edge.answering.answer import score
        from qaflora_edge.prompt.messages import are_many, paired, whole

        prompt = whole(prompt)
        continuation = whole(continuation)
        weighing = Weighing(one_of(weights, strategy))
        current = self.memory.current
        with current.core.call():
            pairs = []
            for question, text in paired(prompt, continuation):
                read = current.reader.read(question, parse_special)
                pairs.append((read, current.reader.continuation(read, text)))
            scores = score(current, weighing, pairs)
        return scores if are_many(prompt) else scores[0]

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

        current = self.memory.current
        with current.core.call():
            return decide(
                current,
                prompt,
                choices,
                Weighing(strategy, adapters),
                compare=compare,
                cancellation=current.core.cancellation(cancel),
            )

    def embed(self, text: Plain, cancel: threading.Event | None = None) -> F32:
        """Embed a text by the base alone: float32 [n_embd], of length 1, to compare by products.

        cancel  once it is set, CancelledError is raised
        """
        current = self.memory.current
        core = current.core
        with core.call():
            steps = core.prober.embedding(current.reader.tokens(text))
            return core.run(steps, core.cancellation(cancel))

    def teach(
        self,
        prompts: Any,
        adapter: str,
        *,
        answers: Sequence[str | None] | None = None,
        keep_text: bool = True,
    ) -> int:
        """Teach that questions belong to an adapter; they count from the next question on.

        prompts  a text, messages, or a list of those. One that was taught of another adapter
                 belongs to this one from now on.
        adapter  its name; "base" for what no adapter should take
        answers  of each question, to test the bundle with
        keep_text  False: only states of the base are kept, no texts

        Only the base reads the questions; they are kept next to the bundle, or with the user's
        data. Returns the number of examples of the adapter. Raises StrategyError for another name.
        """
        current = self.memory.current
        with current.core.call():
            return self.memory.taught.teach(current, prompts, adapter, answers, keep_text)

    def describe(self, adapter: str, text: str) -> None:
        """Say in a sentence what an adapter is for: it counts as one more example."""
        current = self.memory.current
        with current.core.call():
            self.memory.taught.describe(current, adapter, text)

    def unteach(self) -> str | None:
        """Take back this Engine's last call of teach; name its adapter, None without one."""
        return self.memory.taught.undo()

    def forget(self, adapter: str) -> int:
        """Forget the examples and the description of an adapter, and count them."""
        return self.memory.taught.forget(adapter)

    @property
    def taught(self) -> dict[str, int]:
        """Count the example questions that were taught, by adapter and "base"."""
        return self.memory.taught.counts()

    def submit(self, ask: Ask) -> Generation:
        """Answer what is asked, once: an iterator over pieces of text.

        The prompt is weighed before this returns. KV state is reused where prefill would compute
        the same bits: of what the base prefills, and of prompts under the same weights.
        """
        from qaflora_edge.answering.answer import answer

        return answer(self.memory.current, ask)

    def submit_all(self, ask: Ask) -> Iterator[Generation]:
        """Answer what is asked `ask.n` times, weighed once; after cancel() no further answer comes.

        Each answer begins from the same prefill as one alone, bit for bit.
        """
        from qaflora_edge.answering.answer import answers

        return answers(self.memory.current, ask)

    def submit_many(self, asks: Iterable[Ask | QafloraError]) -> Iterator[tuple[int, Generation]]:
        """Answer what is asked, n_parallel of it together; (index, Generation) as they end.

        asks  as generate_many takes requests; an error in place of one ends that one alone
        """
        from qaflora_edge.answering.answer import answer_many

        return answer_many(self.memory.current, asks, self.n_parallel)

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
        return self.submit_many(asked_by(request, options) for request in requests)

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
