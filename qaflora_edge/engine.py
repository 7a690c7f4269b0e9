"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.bundles.open import Opened, load_bundle, open_files
from qaflora_edge.chat.messages import Message
from qaflora_edge.chat.tokens import chat_tokens
from qaflora_edge.engine_options import check_answers, check_options
from qaflora_edge.errors import OptionError, StrategyError
from qaflora_edge.formats.checksums import check_unchanged
from qaflora_edge.inference.answers import Answers
from qaflora_edge.inference.constraint import grammar_text
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.lifetime import Lifetime
from qaflora_edge.inference.prompts import Prompt, checked_tokens, prompt_tokens
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sampling import MAX_SEED, make_sampling
from qaflora_edge.openai.engine_chat import EngineChat
from qaflora_edge.weighing import numbers as fuse
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.probe import Prober
from qaflora_edge.weighing.strategies import Weigher, Weights, measure_typical

F32 = NDArray[np.float32]
Path_ = str | os.PathLike[str]


class Engine(EngineChat):
    """A base with its adapters, ready to weigh them for each query.

    bundle    a bundle folder; or give base and adapters (name -> adapter GGUF) instead
    n_ctx     tokens of prompt and answer together
    threads   CPU threads, by default the cores this process may use
    gpu_layers  layers offloaded where the library was built with a GPU backend
    kv_type   f16, f32 or q8_0
    strategy, lens, pool  by default the bundle's; see `qaflora weights --help`
    probe_tail  0, or how many tokens at a prompt's end the adapters are probed over, on top of
              what the base read before: faster for long prompts, and no longer exact
    seed      of sampled answers, when a call gives none

    An Engine is used by one thread at a time; a second one gets BusyError. Every failure is a
    QafloraError.
    """

    def __init__(
        self,
        bundle: Path_ | None = None,
        *,
        base: Path_ | None = None,
        adapters: Mapping[str, Path_] | None = None,
        n_ctx: int = 2048,
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
        check_options(n_ctx, threads, kv_type, probe_tail)
        self._lifetime = Lifetime(self)

        opened = _open(bundle, base, adapters)
        defaults = opened.fusion_defaults
        self._weigher = Weigher(
            adapters=tuple(opened.adapters),
            strategy=strategy or defaults.get("strategy", fuse.DEFAULT_STRATEGY),
            lens=lens or defaults.get("lens", fuse.DEFAULT_LENS),
            pool=pool or defaults.get("pool", fuse.DEFAULT_POOL),
            typical=opened.typical,
        )
        self._loaded = self._weigher.adapters
        self.seed, self.n_ctx = seed, n_ctx
        options = {"threads": threads, "kv_type": kv_type, "flash_attn": flash_attn}
        try:
            self._load(opened, gpu_layers, probe_tail, options)
            check_unchanged(
                opened.states
            )  # llama.cpp opened the files by name, after they were checked
        except BaseException:
            self._lifetime.close()
            raise

    # life

    def _load(
        self,
        opened: Opened,
        gpu_layers: int | None,
        probe_tail: int,
        options: dict[str, Any],
    ) -> None:
        keep, stop = self._lifetime.keep, self._lifetime.stop
        self._model = keep(Model(opened.base_path, gpu_layers=gpu_layers, header=opened.header))
        self._pack = keep(Pack(self._model, list(opened.adapter_paths.values())))
        self._main = keep(Context(self._model, self._pack, n_ctx=self.n_ctx, stop=stop, **options))
        self._probe = keep(
            Prober(self._model, self._pack, {**options, "stop": stop}, tail=probe_tail)
        )
        self._answers = Answers(self._model, self._main, self._loaded, self._lifetime)

    def close(self) -> None:
        """Free the model, the adapters and all contexts. A second call does nothing.

        Raises BusyError while another thread uses the Engine: cancel() its call, and wait for it.
        """
        self._lifetime.close()

    def cancel(self) -> None:
        """End what the Engine does now; any thread may call it, and it returns at once.

        An answer that is generated ends with finish_reason "cancelled", and keeps its text so far.
        A call that weighs or reads a prompt raises CancelledError. Nothing else happens: the next
        call works as ever. Without work to end, it does nothing.
        """
        self._lifetime.stop.set()
        self._answers.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            raise StrategyError(
                f"The adapter {unknown[0]!r} is not loaded; expected names out of: "
                f"{', '.join(self._loaded) or 'none is loaded'}."
            )
        rows = [row for row, name in enumerate(self._loaded) if name in names]
        with self._lifetime.in_use():
            self._weigher = replace(self._weigher, adapters=tuple(self._loaded[i] for i in rows))
            self._probe.use(rows)

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy from now on, where a call names none.

        Raises StrategyError when it is unknown or cannot be followed here.
        """
        with self._lifetime.in_use():
            self._weigher = replace(self._weigher, strategy=strategy)

    # prompts

    def tokenize(self, prompt: Prompt, *, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt: text as it is, with BOS where the base asks for it, or ids.

        Raises PromptError when it is empty, longer than n_ctx, or has an id out of range.
        """
        with self._lifetime.in_use():
            return self._tokens(prompt, parse_special)

    def chat_tokens(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation under the base's chat template."""
        with self._lifetime.in_use():
            return self._chat_tokens(messages, tools)

    def _tokens(self, prompt: Prompt, parse_special: bool) -> list[int]:
        return prompt_tokens(self._model, prompt, self.n_ctx, parse_special=parse_special)

    def _chat_tokens(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        tokens = chat_tokens(self._model, messages, tools=tools)
        return checked_tokens(self._model, tokens, self.n_ctx)

    # weights

    def weights(
        self, prompt: Prompt, *, strategy: str | None = None, parse_special: bool = False
    ) -> FusionWeights:
        """Weigh the adapters for a prompt.

        Returns FusionWeights with weights and divergence, float32 [n_adapter, n_layer].
        """
        with self._lifetime.new_work():
            return self._weigher.weigh(strategy, self._tokens(prompt, parse_special), self._probe)

    def hidden_states(
        self, prompt: Prompt, *, adapter: str | None = None, parse_special: bool = False
    ) -> F32:
        """States of the last token after each block: float32 [n_layer, n_embd].

        adapter  the one adapter that is on, at weight 1; None for the base alone
        """
        with self._lifetime.new_work():
            tokens = self._tokens(prompt, parse_special)
            if adapter is not None and adapter not in self.adapters:
                raise StrategyError(
                    f"The adapter {adapter!r} is not loaded; expected one of: "
                    f"{', '.join(self.adapters) or 'none is loaded'}."
                )
            row = 0 if adapter is None else 1 + self.adapters.index(adapter)
            return np.array(self._probe.states(tokens, "last")[row])

    def logits(
        self, prompt: Prompt, *, weights: Weights = None, parse_special: bool = False
    ) -> F32:
        """Logits of the token after the prompt: float32 [n_vocab]."""
        with self._lifetime.new_work():
            tokens = self._tokens(prompt, parse_special)
            self._answers.read(tokens, self._weigher.weigh(weights, tokens, self._probe))
            return self._main.logits()

    def typical_divergence(
        self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Measure each adapter against itself, for the strategy `calibrated`.

        prompts   neutral texts; in chat form when the base has a template, else as text
        progress  called with (prompts done, prompts in all)
        returns   adapter -> lens -> geometric mean of the divergence at each layer
        """
        with self._lifetime.new_work():
            queries = [self._query(prompt) for prompt in prompts]
            return measure_typical(self._probe, self.adapters, queries, progress)

    def _query(self, text: str) -> list[int]:
        """One message in chat form when the base has a template, else as text."""
        if not self.has_chat_template:
            return self._tokens(text, parse_special=False)
        return self._chat_tokens([{"role": "user", "content": text}])

    # answers

    def generate(
        self,
        prompt: Prompt,
        *,
        weights: Weights = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        parse_special: bool = False,
        keep_history: bool = False,
        on_weights: Callable[[FusionWeights], None] | None = None,
        **more: Any,
    ) -> Generation:
        """Answer a prompt: an iterator over pieces of text, greedy unless temperature > 0.

        grammar       GBNF text that the answer follows, with the start `root`
        json_schema   the answer is JSON that is valid under this schema; True: any JSON
        keep_history  what the prompt shares with the last prompt and answer is not read again, but
                      stays as it was read under its turn's weights (as it always does where these
                      are the same and the prompt begins with the last one)
        on_weights    called with the weights once they are known, before the prompt is read
        more          top_k, min_p, repeat_penalty, ...: see sampling.Sampling

        The prompt is weighed and read before this returns; tokens follow as they are asked for.
        A later call on this Engine ends the iterator with BusyError.
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
        with self._lifetime.new_work():
            tokens = self._tokens(prompt, parse_special)
            sampler = Sampler(self._model, sampling)  # a bad grammar is refused before the work
            fusion = self._weigher.weigh(weights, tokens, self._probe)
            if on_weights is not None:
                on_weights(fusion)
            answer = self._answers.begin(tokens, fusion, sampler, keep_history=keep_history)
            answer._engine = self
            return answer

    def answers(
        self, prompt: Prompt, n: int, *, seed: int | None = None, **options: Any
    ) -> Iterator[Generation]:
        """Answer a prompt n times, weighed and read once; after cancel() no further answer comes.

        seed     of the first answer; the others have the next numbers
        options  as generate takes them
        """
        first = self.seed if seed is None else seed
        check_answers(n, first)
        weights = options.pop("weights", None)
        for i in range(n):
            own_seed = None if first is None else (first + i) % MAX_SEED
            answer = self.generate(prompt, weights=weights, seed=own_seed, **options)
            yield answer
            if self._answers.is_cancelled:
                return
            # The same weights: what the context holds of the prompt is what it would read again.
            weights = replace(answer.fusion, probe_ms=0.0)
            options |= {"keep_history": True, "on_weights": None}


def _open(bundle: Path_ | None, base: Path_ | None, adapters: Mapping[str, Path_] | None) -> Opened:
    if bundle is not None:
        if base is not None or adapters is not None:
            raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
        return load_bundle(Path(bundle))
    if base is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    paths = {name: Path(path) for name, path in (adapters or {}).items()}
    return open_files(Path(base), paths)
