"""What `qaflora bench` compares: the base, llama.cpp's own adapters, and ours, on one model."""

import contextlib
import ctypes
import os
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.context_params import context_params
from qaflora_edge.backend.library import said
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.bundles.write import neutral_prompts
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BackendError, OptionError
from qaflora_edge.weighing.prefixes import Prefixes
from qaflora_edge.weighing.probe import Prober

T = TypeVar("T")
_N_DRAW = 1000  # tries to find a prompt that shares no beginning with those drawn before


class StockContext(Context):
    """A context as llama.cpp makes it: no pack, one scale per adapter.

    adapters  of llama_adapter_lora_init; none for the base alone
    options   of context_params

    Its parameters are those of a Context, but for llama.cpp's own micro-batch.
    """

    def __init__(
        self, model: Model, adapters: Sequence[Any], *, n_ctx: int, n_seq: int = 1, **options: Any
    ) -> None:
        self._model, self._lib = model, model._lib
        params = context_params(model, n_token=n_ctx * n_seq, n_seq=n_seq, **options)
        self._pointer = self._lib.llama_init_from_model(model._pointer, params) or None
        if self._pointer is None:
            raise BackendError(
                f"A context of {n_seq} x {n_ctx} tokens without our adapters cannot be made. "
                f"llama.cpp says: {said()}."
            )
        self._set_up(n_seq, n_ctx, params, None)
        self._n_adapter = len(adapters)
        self._adapters = (ctypes.c_void_p * len(adapters))(
            *(ctypes.cast(adapter, ctypes.c_void_p) for adapter in adapters)
        )
        self.set_scales(np.full(len(adapters), 1.0 / max(1, len(adapters)), np.float32))

    def set_scales(self, scales: F32) -> None:
        """Scale adapters from the next decode on.

        scales  [n_adapter]
        """
        if self._n_adapter == 0:
            return
        pointers = ctypes.cast(self._adapters, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))
        array = (ctypes.c_float * self._n_adapter)(*scales)
        code = self._lib.llama_set_adapters_lora(self._pointer, pointers, self._n_adapter, array)
        if code != 0:
            raise BackendError(f"llama_set_adapters_lora failed with code {code}.")

    @property
    def n_reused(self) -> int:
        """Micro-batches so far that were computed with the graph of the one before."""
        return int(self._lib.llama_perf_context(self._pointer).n_reused)


class Rig:
    """One base and all that is measured on it; made when first asked for, freed by close().

    adapter_paths  name -> adapter GGUF; more than these are had by loading them again, each copy
                   for itself, so that it costs what another adapter would
    n_ctx          tokens that the contexts which answer can hold
    adapter_type   that ours are converted to; llama.cpp's own stay as their files have them
    options        threads, kv_type and flash_attn of every context
    """

    def __init__(
        self,
        base_path: Path,
        adapter_paths: Mapping[str, Path],
        *,
        n_ctx: int,
        placing: Mapping[str, Any],
        adapter_type: str = "auto",
        options: dict[str, Any],
    ) -> None:
        self._adapter_type = adapter_type
        self._paths, self._n_ctx, self._options = dict(adapter_paths), n_ctx, options
        self._placing = placing
        self._loras: list[Any] = []  # the model frees them
        self._made: dict[tuple[Any, ...], Any] = {}
        self._open = contextlib.ExitStack()
        self.model = Model(base_path, **placing)
        self._open.callback(self.model.close)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self, k: int) -> tuple[str, ...]:
        """Names of k adapters; that of a copy ends in its number, as in math#2."""
        names, n = list(self._paths), len(self._paths)
        return tuple(names[i % n] + (f"#{1 + i // n}" if i >= n else "") for i in range(k))

    def paths(self, k: int) -> list[Path]:
        paths = list(self._paths.values())
        return [paths[i % len(paths)] for i in range(k)]

    def base(self, n_seq: int = 1, *, n_ctx: int | None = None) -> StockContext:
        """The base alone, without any of us."""
        sizes: dict[str, Any] = {"n_seq": n_seq, "n_ctx": n_ctx or self._n_ctx}
        make = partial(StockContext, self.model, [], **sizes, **self._options)
        return self._kept(("base", *sizes.values()), make)

    def stock(self, k: int) -> StockContext:
        """k adapters at scale 1/k through llama_set_adapters_lora."""
        for path in self.paths(k)[len(self._loras) :]:
            self._loras.append(self._load_lora(path))
        loras = self._loras[:k]
        make = partial(StockContext, self.model, loras, n_ctx=self._n_ctx, **self._options)
        return self._kept(("stock", k), make)

    def ours(self, k: int, n_seq: int = 1, *, n_ctx: int | None = None) -> Context:
        """k adapters of one pack, at weight 1/k in every layer of every sequence."""
        sizes: dict[str, Any] = {"n_seq": n_seq, "n_ctx": n_ctx or self._n_ctx}

        def make() -> Context:
            context = Context(self.model, self._pack(k), **sizes, **self._options)
            for seq in range(n_seq):
                weights = np.full((k, self.model.n_layer), 1.0 / k, np.float32)
                context.set_weights(weights, seq=seq)
            return context

        return self._kept(("ours", k, *sizes.values()), make)

    def engine(self, k: int, **options: Any) -> Engine:
        """An Engine of k adapters, with a base of its own; its caller closes it."""
        adapters = dict(zip(self.names(k), self.paths(k), strict=True))
        return Engine(
            base=self.model.path,
            adapters=adapters,
            **self._placing,
            adapter_type=self._adapter_type,
            **self._options,
            **options,
        )

    def prober(self, k: int, *, prefix_cache: int = 0) -> Prober:
        """A new Prober of k adapters, which knows nothing of what others read.

        prefix_cache  MiB for what it reads
        """
        prefixes = Prefixes(prefix_cache << 20)
        prober = Prober(self.model, self._pack(k), self._options, prefixes=prefixes)
        self._open.callback(prober.close)
        return prober

    def _pack(self, k: int) -> Pack:
        make = partial(Pack, self.model, self.paths(k), adapter_type=self._adapter_type)
        return self._kept(("pack", k), make)

    def _kept(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is made when it is first asked for, and freed by close()."""
        if key not in self._made:
            made: Any = make()
            self._open.callback(made.close)
            self._made[key] = made
        found: T = self._made[key]
        return found

    def _load_lora(self, path: Path) -> Any:
        lora = self.model._lib.llama_adapter_lora_init(self.model._pointer, os.fsencode(path))
        if not lora:
            raise BackendError(f"llama.cpp cannot load the adapter {path}; convert it again.")
        return lora


def read_prompt(context: Context, tokens: Sequence[int]) -> None:
    """Read a prompt as its kind of context does: ours in pieces, llama.cpp's cuts it itself."""
    if isinstance(context, StockContext):
        context.decode(tokens)
    else:
        for _ in read_pieces(context, tokens):
            pass


def read_pieces(context: Context, tokens: Sequence[int]) -> Generator[None]:
    """Read a prompt as an Engine does; yields between its pieces."""
    at = 0
    while at < len(tokens):
        if at:
            yield
        end = context.pieces().end(tokens, at)
        context.decode(tokens[at:end], start=at)
        at = end


class Prompts:
    """Draws prompts of everyday text in many languages, none of which begins with another.

    So nothing that was read for one prompt can be used again for the next.
    """

    def __init__(self, model: Model, seed: int) -> None:
        self._model, self._random = model, random.Random(seed)
        self._start = model.tokenize("", add_special=True, parse_special=False)[:1]
        self._drawn: list[list[int]] = []

    def draw(self, n_token: int) -> list[int]:
        """Token ids, from the middle of a sentence on, after BOS where the base asks for it."""
        for _ in range(_N_DRAW):
            tokens = self._text(n_token)
            if not any(_is_beginning(tokens, other) for other in self._drawn):
                self._drawn.append(tokens)
                return tokens
        raise OptionError(
            f"No more different prompts of {n_token} tokens were found; raise --prompt-tokens "
            "or lower --repeat."
        )

    def _text(self, n_token: int) -> list[int]:
        tokens: list[int] = []
        n_skip: int | None = None
        while n_skip is None or len(tokens) < n_skip + n_token:
            prompts = neutral_prompts()
            self._random.shuffle(prompts)
            tokens += self._model.tokenize(
                "\n".join(prompts) + "\n", add_special=False, parse_special=False
            )
            n_skip = self._random.randrange(len(tokens)) if n_skip is None else n_skip
        return (self._start + tokens[n_skip:])[:n_token]


def _is_beginning(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether one of the two begins with the other."""
    n = min(len(a), len(b))
    return list(a[:n]) == list(b[:n])
