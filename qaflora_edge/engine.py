"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qaflora_edge import fusion as fuse
from qaflora_edge.chat import (
    Message,
    chat_tokens,
    completion_chunks,
    completion_dict,
    response_schema,
)
from qaflora_edge.checksums import FileState, check_unchanged
from qaflora_edge.errors import BackendError, BusyError, OptionError, PromptError, StrategyError
from qaflora_edge.fusion import FusionWeights
from qaflora_edge.generate import (
    Generation,
    Timings,
    generate_text,
    generate_tokens,
)
from qaflora_edge.probe import Prober
from qaflora_edge.runtime import KV_TYPES, MAX_CTX, MAX_THREADS, Context, Model, Pack
from qaflora_edge.sampling import Sampler, Sampling, grammar_text
from qaflora_edge.weigh import Typical, Weigher, Weights

F32 = NDArray[np.float32]
Prompt = str | Sequence[int]
_THREADS_RANGE = f"a number of threads from 1 to {MAX_THREADS}"
Path_ = str | os.PathLike[str]


class Engine:
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
        self._thread_lock = threading.Lock()
        self._is_closed = True  # until everything below has worked
        self._resources: list[Any] = []
        # An Engine that nobody closed: contexts are freed before the model that they use.
        self._finalizer = weakref.finalize(self, _free, self._resources)
        self._finalizer.atexit = False
        self._turn = 0
        _check_options(n_ctx, threads, kv_type, probe_tail)

        typical: Typical = {}
        defaults: Mapping[str, str] = {}
        states: Mapping[Path, FileState] = {}
        if bundle is not None:
            if base is not None or adapters is not None:
                raise OptionError(
                    "Engine got a bundle and also base or adapters; give one or the other."
                )
            from qaflora_edge.bundle import load_bundle

            loaded = load_bundle(Path(bundle))
            base, adapters = loaded.base_path, loaded.adapter_paths
            typical, defaults, states = loaded.typical, loaded.fusion_defaults, loaded.states
        elif base is None:
            raise OptionError("Engine needs a bundle folder, or base= and adapters=.")

        self._weigher = Weigher(
            adapters=tuple(adapters or {}),
            strategy=strategy or defaults.get("strategy", fuse.DEFAULT_STRATEGY),
            lens=lens or defaults.get("lens", fuse.DEFAULT_LENS),
            pool=pool or defaults.get("pool", fuse.DEFAULT_POOL),
            typical=typical,
        )
        self._loaded = self._weigher.adapters
        self.seed, self.n_ctx = seed, n_ctx

        try:
            self._model: Model = self._keep(Model(base, gpu_layers=gpu_layers))
            self._pack: Pack = self._keep(Pack(self._model, list((adapters or {}).values())))
            options: dict[str, Any] = {
                "threads": threads,
                "kv_type": kv_type,
                "flash_attn": flash_attn,
            }
            self._main: Context = self._keep(
                Context(self._model, self._pack, n_ctx=n_ctx, **options)
            )
            self._probe: Prober = self._keep(
                Prober(self._model, self._pack, options, tail=probe_tail)
            )
            check_unchanged(states)  # llama.cpp opened the files by name, after they were checked
        except BaseException:
            _free(self._resources)
            raise
        self._is_closed = False

    # life

    def _keep(self, resource: Any) -> Any:
        self._resources.append(resource)
        return resource

    def close(self) -> None:
        """Free the model, the adapters and all contexts. A second call does nothing."""
        if not self._is_closed:
            with self._in_use():
                self._is_closed = True
                _free(self._resources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        if not self._thread_lock.acquire(blocking=False):
            raise BusyError(
                "This Engine is in use by another thread; an Engine serves one thread at a time. "
                "Wait for the other call, or make a second Engine."
            )
        try:
            if self._is_closed:
                raise BusyError("This Engine is closed; make a new one.")
            yield
        finally:
            self._thread_lock.release()

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
        with self._in_use():
            adapters = tuple(self._loaded[row] for row in rows)
            self._weigher = replace(self._weigher, adapters=adapters)
            self._probe.use(rows)

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy from now on, where a call names none.

        Raises StrategyError when it is unknown or cannot be followed here.
        """
        with self._in_use():
            self._weigher = replace(self._weigher, strategy=strategy)

    # prompts

    def tokenize(self, prompt: Prompt, *, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt: text as it is, with BOS where the base asks for it, or ids.

        Raises PromptError when it is empty, longer than n_ctx, or has an id out of range.
        """
        with self._in_use():
            return self._tokens(prompt, parse_special)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation under the base's chat template."""
        with self._in_use():
            return self._checked(chat_tokens(self._model, messages))

    def _tokens(self, prompt: Prompt, parse_special: bool) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("The prompt is empty; give at least one character.")
            tokens = self._model.tokenize(prompt, add_special=True, parse_special=parse_special)
        else:
            tokens = [int(token) for token in prompt]
        return self._checked(tokens)

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise PromptError("The prompt is empty; give at least one token.")
        if len(tokens) > self.n_ctx:
            raise PromptError(
                f"The prompt has {len(tokens)} tokens, the context {self.n_ctx}; shorten it, "
                f"or raise the context (--ctx, n_ctx; this base was trained for "
                f"{self._model.n_ctx_train})."
            )
        for i, token in enumerate(tokens):
            if not 0 <= token < self._model.n_vocab:
                raise PromptError(
                    f"Token {i} of the prompt is {token}, expected an id from 0 to "
                    f"{self._model.n_vocab - 1}."
                )
        return tokens

    # weights

    def weights(
        self, prompt: Prompt, *, strategy: str | None = None, parse_special: bool = False
    ) -> FusionWeights:
        """Weigh the adapters for a prompt.

        Returns FusionWeights with weights and divergence, float32 [n_adapter, n_layer].
        """
        with self._in_use():
            return self._weigher.weigh(strategy, self._tokens(prompt, parse_special), self._probe)

    def hidden_states(
        self, prompt: Prompt, *, adapter: str | None = None, parse_special: bool = False
    ) -> F32:
        """States of the last token after each block: float32 [n_layer, n_embd].

        adapter  the one adapter that is on, at weight 1; None for the base alone
        """
        with self._in_use():
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
        with self._in_use():
            tokens = self._tokens(prompt, parse_special)
            self._prefill(tokens, self._weigher.weigh(weights, tokens, self._probe))
            return self._main.logits()

    def typical_divergence(
        self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Measure each adapter against itself, for the strategy `calibrated`.

        prompts   neutral texts; in chat form when the base has a template, else as text
        progress  called with (prompts done, prompts in all)
        returns   adapter -> lens -> geometric mean of the divergence at each layer
        """
        measured: dict[str, list[NDArray[np.float64]]] = {lens: [] for lens in fuse.LENSES}
        with self._in_use():
            for done, prompt in enumerate(prompts, 1):
                tokens = self._query(prompt)
                for lens in fuse.LENSES:
                    measured[lens].append(self._probe.divergence(tokens, "qa-flora", lens, "last"))
                if progress is not None:
                    progress(done, len(prompts))
        typical = {lens: fuse.typical_divergence(measured[lens]) for lens in fuse.LENSES}
        return {
            name: {lens: [float(x) for x in typical[lens][ia]] for lens in fuse.LENSES}
            for ia, name in enumerate(self.adapters)
        }

    def _query(self, text: str) -> list[int]:
        """One message in chat form when the base has a template, else as text."""
        if not self.has_chat_template:
            return self._tokens(text, parse_special=False)
        return self._checked(chat_tokens(self._model, [{"role": "user", "content": text}]))

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
    ) -> Generation:
        """Answer a prompt: an iterator over pieces of text, greedy unless temperature > 0.

        grammar       GBNF text that the answer follows, with the start `root`
        json_schema   the answer is JSON that is valid under this schema; True: any JSON
        keep_history  what the prompt shares with the last prompt and answer is not read again,
                      but stays as it was read under the weights of its own turn

        The prompt is weighed and read before this returns; tokens follow as they are asked for.
        A later call on this Engine ends the iterator with BusyError.
        """
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=self.seed if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            grammar=grammar_text(grammar, json_schema),
        )
        with self._in_use():
            tokens = self._tokens(prompt, parse_special)
            return self._begin(tokens, weights, sampling, keep_history)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        weights: Weights = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        grammar: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        keep_history: bool = False,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer a conversation in OpenAI's shape: a dict, or chunks with stream=True.

        response_format  {"type": "json_object"}, or {"type": "json_schema", "json_schema":
                         {"schema": ...}}
        grammar, keep_history  see generate
        """
        generation = self.generate(
            self.chat_tokens(messages),
            weights=weights,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            grammar=grammar,
            json_schema=response_schema(response_format),
            keep_history=keep_history,
        )
        if stream:
            return completion_chunks(self.name, generation)
        return completion_dict(self.name, generation)

    def _prefill(
        self, tokens: list[int], fusion: FusionWeights, keep_history: bool = False
    ) -> None:
        self._turn += 1
        n_kept = 0
        if keep_history:
            n_kept = self._main.keep_common(tokens)
        else:
            self._main.clear()
        weights = np.zeros((len(self._loaded), self.n_layer), np.float32)
        weights[[self._loaded.index(name) for name in self.adapters]] = fusion.weights
        self._main.set_weights(weights)
        self._main.decode(tokens[n_kept:], start=n_kept)
        if np.isnan(self._main.logits()).any():
            self._main.clear()
            raise BackendError(
                "The logits after the prompt are NaN, expected numbers: an adapter that weighs "
                f"more than 0 here ({', '.join(fusion.adapters) or 'none'}), or the base, is "
                "damaged. Convert or fetch it again, or leave it out."
            )

    def _begin(
        self, tokens: list[int], weights: Weights, sampling: Sampling, keep_history: bool
    ) -> Generation:
        sampler = Sampler(self._model, sampling)  # a bad grammar is refused before the work
        fusion = self._weigher.weigh(weights, tokens, self._probe)
        start = time.perf_counter()
        self._prefill(tokens, fusion, keep_history)
        timings = Timings(fusion.probe_ms, 1e3 * (time.perf_counter() - start))
        generation = Generation(fusion, len(tokens), timings)
        turn = self._turn

        def check() -> None:
            if self._is_closed or self._turn != turn:
                raise BusyError(
                    "This answer cannot go on: its Engine was closed or answered another prompt "
                    "in between. Finish an answer before the next call, or make a second Engine."
                )

        generated = generate_tokens(self._model, self._main, sampler, generation, check)
        pieces = generate_text(generated, self._model, sampling.stop, generation)
        generation._pieces = _Guarded(pieces, self._in_use)
        return generation


def _free(resources: list[Any]) -> None:
    """Close in reverse order of making."""
    while resources:
        resources.pop().close()


class _Guarded(Iterator[str]):
    """Pieces of text; the Engine is in use only while one is being made."""

    def __init__(self, pieces: Iterator[str], in_use: Callable[[], Any]) -> None:
        self._pieces, self._in_use = pieces, in_use

    def __next__(self) -> str:
        with self._in_use():
            piece = next(self._pieces, None)
        if piece is None:
            raise StopIteration
        return piece


def _check_options(n_ctx: int, threads: int | None, kv_type: str, probe_tail: int) -> None:
    checks = (
        ("n_ctx", n_ctx, 1 <= n_ctx <= MAX_CTX, f"a number of tokens from 1 to {MAX_CTX}"),
        ("threads", threads, threads is None or 1 <= threads <= MAX_THREADS, _THREADS_RANGE),
        ("kv_type", kv_type, kv_type in KV_TYPES, f"one of {', '.join(KV_TYPES)}"),
        ("probe_tail", probe_tail, probe_tail >= 0, "0 (off) or a number of tokens"),
    )
    for name, value, is_good, expected in checks:
        if not is_good:
            raise OptionError(f"Option {name} is {value!r}, expected {expected}.")
