"""What `qaflora bench` compares on one base: no adapter, llama.cpp's own adapters, and ours."""

import contextlib
import ctypes
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.backend.context import Context, context_params
from qaflora_edge.backend.library import logged
from qaflora_edge.backend.model import PLACING, Model, Pack
from qaflora_edge.bundles.measure import neutral
from qaflora_edge.chat.messages import Message
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base


class StockContext(Context):
    """A context as llama.cpp makes it: no pack, each adapter at scale 1/k.

    adapters  of llama_adapter_lora_init; none for the base alone
    options   of context_params

    It has llama.cpp's own micro-batch size. Raises BackendError when it cannot be made.
    """

    def __init__(
        self, model: Model, adapters: Sequence[Any], *, n_ctx: int, **options: Any
    ) -> None:
        self._model, self._lib = model, model._lib
        params = context_params(model, n_token=n_ctx, **options)
        self._pointer = self._lib.llama_init_from_model(model._pointer, params) or None
        if self._pointer is None:
            raise BackendError(
                f"A context of {n_ctx} tokens without our adapters cannot be made. "
                f"llama.cpp says: {logged()}."
            )
        self._set_up(n_ctx, params, None)
        if not adapters:
            return
        n = len(adapters)
        pointers = (ctypes.c_void_p * n)(*(ctypes.cast(each, ctypes.c_void_p) for each in adapters))
        array = ctypes.cast(pointers, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))
        scales = (ctypes.c_float * n)(*[1.0 / n] * n)
        if code := self._lib.llama_set_adapters_lora(self._pointer, array, n, scales):
            raise BackendError(f"llama_set_adapters_lora failed with code {code}.")


class Rig(contextlib.ExitStack):
    """One base, the contexts that are timed on it, and prompts; close() frees all of them.

    adapters  for more than these each is loaded again, and costs what another adapter would
    options   keywords of Engine; llama.cpp's own adapters keep the types of their files
    seed      of the prompts
    ends      attribute: the tokens that end an answer
    """

    def __init__(
        self, base: Path, adapters: Sequence[Path], options: Mapping[str, Any], seed: int = 0
    ) -> None:
        super().__init__()
        self._paths, self._adapter_type = adapters, options.get("adapter_type", "auto")
        self._options = {name: options[name] for name in ("threads", "kv_type", "flash_attn")}
        placing: dict[str, Any] = {name: options.get(name) for name in PLACING}
        self.model = self.enter_context(Model(read_base(base), **placing))
        self._stock = self.enter_context(Model(read_base(base), rearrange=True, **placing))
        self._loras: list[Any] = []  # the model frees them
        self._random, self._n_drawn = random.Random(seed), 0
        self._start = self.model.tokenize("", add_special=True, parse_special=False)[:1]
        self.ends = [token for token in range(self.model.n_vocab) if self.model.is_end(token)]

    def stock(self, k: int, n_ctx: int) -> StockContext:
        """Set up k adapters at scale 1/k through llama_set_adapters_lora; 0 for the base alone."""
        for path in self._copies(k)[len(self._loras) :]:
            lora = self._stock._lib.llama_adapter_lora_init(self._stock._pointer, os.fsencode(path))
            if not lora:
                raise BackendError(f"llama.cpp cannot load the adapter {path}; convert it again.")
            self._loras.append(lora)
        model, loras = self._stock, self._loras[:k]
        return self.enter_context(StockContext(model, loras, n_ctx=n_ctx, **self._options))

    def ours(self, k: int, n_ctx: int) -> Context:
        """Set up k adapters of one pack, at weight 1/k in every layer."""
        paths = self._copies(k)
        pack = self.enter_context(Pack(self.model, paths, adapter_type=self._adapter_type))
        context = self.enter_context(Context(self.model, pack, n_ctx=n_ctx, **self._options))
        context.set_weights(np.full((k, self.model.n_layer), 1.0 / k, np.float32))
        return context

    def _copies(self, k: int) -> list[Path]:
        return [self._paths[i % len(self._paths)] for i in range(k)]

    def draw(self, n_token: int) -> list[int]:
        """Draw a prompt out of everyday text in many languages: BOS, a number, text from anywhere.

        Each has another number, so no KV state of one prompt serves the next.
        """
        self._n_drawn += 1
        text, texts = f"{self._n_drawn}. ", neutral("prompts")
        tokens: list[int] = []
        while len(tokens) < n_token:
            tokens += self.model.tokenize(text, add_special=False, parse_special=False)
            self._random.shuffle(texts)
            text = "\n".join(texts) + "\n"
            text = text[self._random.randrange(len(text) // 2) :]
        return (self._start + tokens)[:n_token]

    def draw_chat(
        self, engine: Engine, n_token: int, before: Sequence[Message] = ()
    ) -> tuple[list[Message], list[int]]:
        """Draw a user turn of so many tokens after others: the messages, and the whole prompt."""
        text = self.model.detokenize(self.draw(n_token)).decode("utf-8", "replace")
        messages = [*before, {"role": "user", "content": text}]
        if not engine.has_chat_template:
            return messages, engine.tokenize("\n".join(each["content"] for each in messages))
        return messages, engine.chat_tokens(messages)


def prefill(context: Context, tokens: Sequence[int]) -> None:
    """Prefill a prompt: ours in the chunks of an Engine, llama.cpp's in its own micro-batches."""
    context.clear()
    is_stock = isinstance(context, StockContext)
    for at, end in [(0, len(tokens))] if is_stock else context.chunks().cut(tokens):
        context.decode(tokens[at:end], start=at)
