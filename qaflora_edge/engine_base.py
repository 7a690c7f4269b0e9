"""What is opened: an Engine's facts and choices, and its prompts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from qaflora_edge.bundles.open import open_any
from qaflora_edge.chat.messages import Message, begin_with
from qaflora_edge.chat.tokens import QuestionFinder, chat_tokens
from qaflora_edge.config import check, removed
from qaflora_edge.errors import OptionError, StrategyError, wrong_option
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.checksums import check_unchanged
from qaflora_edge.inference.core import Core
from qaflora_edge.inference.lifetime import Lifetime
from qaflora_edge.inference.prompts import Prompt, checked_tokens, prompt_tokens
from qaflora_edge.weighing.weigher import Weigher


class EngineBase:
    """An opened base with its adapters: facts, choices, tokens.

    See Engine.
    """

    def __init__(
        self,
        bundle: AnyPath | None = None,
        *,
        base: AnyPath | None = None,
        adapters: Mapping[str, AnyPath] | None = None,
        n_ctx: int = 2048,
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
        prefix_cache: int = 128,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        options = {"threads": threads, "kv_type": kv_type, "flash_attn": flash_attn}
        others: dict[str, Any] = {"n_ctx": n_ctx, "n_parallel": n_parallel, "seed": seed}
        placing = {"gpu_layers": gpu_layers, "rpc": rpc, "tensor_split": tensor_split}
        others |= {**placing, "adapter_type": adapter_type, "prefix_cache": prefix_cache}
        for name in unknown:
            if (instead := removed(name)) is None:
                raise TypeError(f"Engine() got an unexpected keyword argument {name!r}")
            raise OptionError(instead)
        check("engine", {**options, **others})
        self._lifetime = Lifetime(self)

        opened = open_any(bundle, base, adapters)
        self.seed, self.n_ctx, self.n_parallel = seed, n_ctx, n_parallel
        self._loaded = tuple(opened.adapters)
        self._weigher = Weigher(
            adapters=self._loaded,
            n_layer=0,
            known=opened.known.under(strategy=strategy, lens=lens, pool=pool),
            targets={name: info.targets for name, info in opened.adapters.items()},
        )
        self.system = opened.system

        try:
            self._core = Core(
                self._lifetime,
                opened.header,
                opened.adapters,
                n_ctx=n_ctx,
                n_parallel=n_parallel,
                placing=placing,
                adapter_type=adapter_type,
                options=options,
                prefix_cache=prefix_cache,
            )
            # llama.cpp opened the files by name, after they were checked.
            check_unchanged(opened.states)
        except BaseException:
            self._lifetime.close()
            raise
        self._model = self._core.model
        finder = QuestionFinder(self._model)
        self._weigher = replace(
            self._weigher, n_layer=self._model.n_layer, find_question=finder.find
        )

    # life

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Keep the Engine open during a call.

        Raises BusyError after close(), WorkerError once a worker was lost.
        """
        with self._lifetime.call():
            self._model.check_workers()
            yield

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

    def run_forever(self) -> None:
        """Compute what other threads ask for, until close(); for servers, in a thread of its own.

        Without it each call computes in its caller's thread, and callers that come at once compute
        for each other. With it they only wait, and no core is idle while they take what they have.
        """
        with self._lifetime.call():
            self._core.run_forever()

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
        return self._weigher.known.strategy

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every strategy that it can follow without a word more, as `manual` needs one."""
        return self._weigher.followed

    @property
    def lens(self) -> str:
        """How a layer's state is read, where a bundle or a caller did not say: see Engine."""
        return self._weigher.known.lens

    @property
    def pool(self) -> str:
        """What of a prompt is read: see Engine."""
        return self._weigher.known.pool

    @property
    def n_layer(self) -> int:
        return int(self._model.n_layer)

    @property
    def n_vocab(self) -> int:
        return int(self._model.n_vocab)

    @property
    def prefix_cache_bytes(self) -> int:
        """Size of what is kept of prompts now, at most `prefix_cache`: see Engine."""
        return self._core.prober.prefixes.n_byte

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
        with self._call():
            self._weigher = self._using(names)

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy from now on, where a call names none.

        Raises StrategyError when it is unknown or cannot be followed here.
        """
        with self._call():
            known = replace(self._weigher.known, strategy=strategy)
            self._weigher = replace(self._weigher, known=known)

    def _using(self, names: Sequence[str] | None) -> Weigher:
        """The weigher with these adapters in use; None: as they are."""
        if names is None:
            return self._weigher
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise wrong_option("adapters", names, "a list of their names")
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
        with self._call():
            return prompt_tokens(self._model, prompt, self.n_ctx, parse_special=parse_special)

    def chat_tokens(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation under the base's chat template.

        The bundle's system prompt comes first where the messages have none.
        """
        with self._call():
            messages = begin_with(self.system or None, messages)
            tokens = chat_tokens(self._model, messages, tools=tools)
            return checked_tokens(self._model, tokens, self.n_ctx)
