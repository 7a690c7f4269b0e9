"""Engine: weigh adapters for a query, and answer it with the weighed mix."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qaflora_edge import fusion as fuse
from qaflora_edge.chat import Message, chat_tokens, completion_chunks, completion_dict
from qaflora_edge.errors import BusyError, OptionError, PromptError, StrategyError
from qaflora_edge.fusion import FusionWeights, Strategy
from qaflora_edge.generate import (
    Generation,
    Sampling,
    Timings,
    generate_text,
    generate_tokens,
)
from qaflora_edge.runtime import KV_TYPES, Context, Model, Pack

F32 = NDArray[np.float32]
Prompt = str | Sequence[int]
Weights = FusionWeights | ArrayLike | str | None
Path_ = str | os.PathLike[str]

# adapter -> lens -> typical divergence of each layer, as bundle.json stores it
Typical = Mapping[str, Mapping[str, Sequence[float]]]

_PROBE_CTX_MIN = 256  # tokens; a probe context grows by doubling up to n_ctx


class Engine:
    """A base with its adapters, ready to weigh them for each query.

    bundle    a bundle folder; or give base and adapters (name -> adapter GGUF) instead
    n_ctx     tokens of prompt and answer together
    threads   CPU threads, by default the cores this process may use
    gpu_layers  layers offloaded where the library was built with a GPU backend
    kv_type   f16, f32 or q8_0
    strategy, lens, pool  by default the bundle's; see `qaflora weights --help`
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
        seed: int | None = None,
    ) -> None:
        self._thread_lock = threading.Lock()
        self._is_closed = True  # until everything below has worked
        self._resources: list[Any] = []
        self._probe: Context | None = None
        self._turn = 0
        _check_options(n_ctx, threads, kv_type)

        self._typical: Typical = {}
        defaults: Mapping[str, str] = {}
        if bundle is not None:
            if base is not None or adapters is not None:
                raise OptionError(
                    "Engine got a bundle and also base or adapters; give one or the other."
                )
            from qaflora_edge.bundle import load_bundle

            loaded = load_bundle(Path(bundle))
            base, adapters = loaded.base_path, loaded.adapter_paths
            self._typical, defaults = loaded.typical, loaded.fusion_defaults
        elif base is None:
            raise OptionError("Engine needs a bundle folder, or base= and adapters=.")

        self.adapters: tuple[str, ...] = tuple(adapters or {})
        self.strategy = strategy or defaults.get("strategy", fuse.DEFAULT_STRATEGY)
        self.lens = fuse.check_choice(
            "lens", lens or defaults.get("lens", fuse.DEFAULT_LENS), fuse.LENSES
        )
        self.pool = fuse.check_choice(
            "pool", pool or defaults.get("pool", fuse.DEFAULT_POOL), fuse.POOLS
        )
        self.seed, self.n_ctx = seed, n_ctx
        self._options = {"threads": threads, "kv_type": kv_type, "flash_attn": flash_attn}
        self._parse(self.strategy)

        try:
            self._model = self._keep(Model(base, gpu_layers=gpu_layers))
            self._pack = self._keep(Pack(self._model, list((adapters or {}).values())))
            self._main = self._keep(Context(self._model, self._pack, n_ctx=n_ctx, **self._options))
        except BaseException:
            self._free()
            raise
        self._is_closed = False

    # life

    def _keep(self, resource: Any) -> Any:
        self._resources.append(resource)
        return resource

    def _free(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        while self._resources:
            self._resources.pop().close()

    def close(self) -> None:
        """Free the model, the adapters and all contexts. A second call does nothing."""
        if not self._is_closed:
            with self._in_use():
                self._is_closed = True
                self._free()

    def __enter__(self) -> Engine:
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
        return str(self._model.metadata("general.name") or self._model.path.name)

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
            return self._weigh(strategy, self._tokens(prompt, parse_special))

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
            states = self._states(tokens, "last")
            return states[0 if adapter is None else 1 + self.adapters.index(adapter)]

    def logits(
        self, prompt: Prompt, *, weights: Weights = None, parse_special: bool = False
    ) -> F32:
        """Logits of the token after the prompt: float32 [n_vocab]."""
        with self._in_use():
            tokens = self._tokens(prompt, parse_special)
            self._prefill(tokens, self._weigh(weights, tokens))
            return self._main.logits()

    def _parse(self, text: str) -> Strategy:
        strategy = fuse.parse_strategy(text, self.adapters)
        if strategy.kind == "calibrated":
            self._check_calibrated()
        return strategy

    def _check_calibrated(self) -> None:
        if self.pool != "last":
            raise StrategyError(
                f"Strategy calibrated needs pool last, found {self.pool}: typical divergences "
                "are measured at the last token."
            )
        missing = [name for name in self.adapters if self.lens not in self._typical.get(name, {})]
        if missing:
            raise StrategyError(
                f"Strategy calibrated needs typical divergences, missing for {', '.join(missing)} "
                f"with lens {self.lens}; use a bundle made by `qaflora bundle create`."
            )

    def _weigh(self, weights: Weights, tokens: list[int]) -> FusionWeights:
        if isinstance(weights, FusionWeights):
            if weights.adapters != self.adapters:
                raise StrategyError(
                    f"The weights are for the adapters {', '.join(weights.adapters)}, loaded are "
                    f"{', '.join(self.adapters)}; weigh the prompt with this Engine."
                )
            fuse.check_weights(weights.weights, self.adapters, self.n_layer)
            return weights
        if weights is not None and not isinstance(weights, str):
            array = fuse.check_weights(weights, self.adapters, self.n_layer)
            return self._fusion(array, None, "manual", tokens)
        text = weights or self.strategy
        strategy = self._parse(text)
        if not strategy.is_probed or not self.adapters:
            array = fuse.fixed_weights(strategy, self.adapters, self.n_layer)
            return self._fusion(array, None, text, tokens)
        start = time.perf_counter()
        divergence = self._divergence(tokens, strategy.kind)
        relevance: ArrayLike = divergence
        if strategy.kind == "calibrated":
            typical = [self._typical[name][self.lens] for name in self.adapters]
            relevance = fuse.calibrate(divergence, typical)
        array = fuse.normalise(relevance)
        probe_ms = 1e3 * (time.perf_counter() - start)
        return self._fusion(array, divergence, text, tokens, probe_ms)

    def _fusion(
        self,
        weights: F32,
        divergence: F32 | None,
        strategy: str,
        tokens: list[int],
        probe_ms: float = 0.0,
    ) -> FusionWeights:
        return FusionWeights(
            adapters=self.adapters,
            weights=weights,
            divergence=divergence,
            strategy=strategy,
            lens=self.lens,
            pool=self.pool,
            prompt_tokens=len(tokens),
            probe_ms=probe_ms,
        )

    def _divergence(self, tokens: list[int], kind: str) -> F32:
        """How far each adapter moves the base: [n_adapter, n_layer]."""
        states = self._states(tokens, self.pool)
        if kind == "cosine":
            return fuse.cosine_distance(states[0], states[1:])
        if kind == "euclidean":
            return fuse.euclidean_distance(states[0], states[1:])
        return self._probe_context(len(tokens)).divergence(states[0], states[1:], self.lens)

    def _states(self, tokens: list[int], pool: str) -> F32:
        """States [1 + n_adapter, n_layer, n_embd]: the base, then each adapter alone."""
        context = self._probe_context(len(tokens))
        context.clear()
        context.capture_begin(pool)
        context.decode(tokens, outputs="last" if pool == "last" else "all")
        return np.stack([context.states(seq) for seq in range(context.n_seq)])

    def _probe_context(self, n_token: int) -> Context:
        """A context with room for n_token tokens of the base and of each adapter alone."""
        if self._probe is not None and self._probe.n_ctx >= n_token:
            return self._probe
        n_ctx = _PROBE_CTX_MIN
        while n_ctx < n_token:
            n_ctx *= 2
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        probe = Context(
            self._model,
            self._pack,
            n_ctx=n_ctx,
            n_seq=1 + len(self.adapters),
            probe=True,
            differential=True,
            **self._options,
        )
        for ia in range(len(self.adapters)):
            alone = np.zeros((len(self.adapters), self.n_layer), np.float32)
            alone[ia] = 1.0
            probe.set_weights(alone, seq=1 + ia)
        self._probe = probe
        return probe

    def typical_divergence(
        self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Measure each adapter against itself, for the strategy `calibrated`.

        prompts   neutral texts; in chat form when the base has a template, else as text
        progress  called with (prompts done, prompts in all)
        returns   adapter -> lens -> geometric mean of the divergence at each layer
        """
        measured: dict[str, list[F32]] = {lens: [] for lens in fuse.LENSES}
        with self._in_use():
            for done, prompt in enumerate(prompts, 1):
                tokens = (
                    self._checked(chat_tokens(self._model, [{"role": "user", "content": prompt}]))
                    if self.has_chat_template
                    else self._tokens(prompt, False)
                )
                states = self._states(tokens, "last")
                context = self._probe_context(len(tokens))
                for lens in fuse.LENSES:
                    measured[lens].append(context.divergence(states[0], states[1:], lens))
                if progress is not None:
                    progress(done, len(prompts))
        typical = {lens: fuse.typical_divergence(measured[lens]) for lens in fuse.LENSES}
        return {
            name: {lens: [float(x) for x in typical[lens][ia]] for lens in fuse.LENSES}
            for ia, name in enumerate(self.adapters)
        }

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
        parse_special: bool = False,
    ) -> Generation:
        """Answer a prompt: an iterator over pieces of text, greedy unless temperature > 0.

        The prompt is weighed and read before this returns; tokens follow as they are asked for.
        A later call on this Engine ends the iterator with BusyError.
        """
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=self.seed if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        with self._in_use():
            return self._begin(self._tokens(prompt, parse_special), weights, sampling)

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
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer a conversation in OpenAI's shape: a dict, or chunks with stream=True."""
        generation = self.generate(
            self.chat_tokens(messages),
            weights=weights,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        if stream:
            return completion_chunks(self.name, generation)
        return completion_dict(self.name, generation)

    def _prefill(self, tokens: list[int], fusion: FusionWeights) -> None:
        self._turn += 1
        self._main.clear()
        self._main.set_weights(fusion.weights)
        self._main.decode(tokens)

    def _begin(self, tokens: list[int], weights: Weights, sampling: Sampling) -> Generation:
        fusion = self._weigh(weights, tokens)
        start = time.perf_counter()
        self._prefill(tokens, fusion)
        timings = Timings(fusion.probe_ms, 1e3 * (time.perf_counter() - start))
        generation = Generation(fusion, len(tokens), timings)
        turn = self._turn

        def check() -> None:
            if self._is_closed or self._turn != turn:
                raise BusyError(
                    "This answer cannot go on: its Engine was closed or answered another prompt "
                    "in between. Finish an answer before the next call, or make a second Engine."
                )

        generated = generate_tokens(self._model, self._main, sampling, generation, check)
        pieces = generate_text(generated, self._model, sampling.stop, generation)
        generation._pieces = self._guarded(pieces)
        return generation

    def _guarded(self, pieces: Iterator[str]) -> Iterator[str]:
        """The same pieces; the Engine is in use only while one is being made."""
        while True:
            with self._in_use():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def _check_options(n_ctx: int, threads: int | None, kv_type: str) -> None:
    checks = (
        ("n_ctx", n_ctx, n_ctx >= 1, "a number of tokens from 1 on"),
        ("threads", threads, threads is None or threads >= 1, "a number of threads from 1 on"),
        ("kv_type", kv_type, kv_type in KV_TYPES, f"one of {', '.join(KV_TYPES)}"),
    )
    for name, value, is_good, expected in checks:
        if not is_good:
            raise OptionError(f"Option {name} is {value!r}, expected {expected}.")
