"""The parts of `qaflora bench`: decode, ttft.

Contestants run in turn within a round, on a prompt that no round had before; each contestant of
ttft has its own. A first round is thrown away. Ratios are taken within a round, then the median.
"""

import contextlib
import ctypes
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from qaflora_edge.backend import branches
from qaflora_edge.backend.context import Context, context_params
from qaflora_edge.backend.library import logged
from qaflora_edge.backend.model import PLACING, Model, Pack
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base
from qaflora_edge.progress import Tell, TellCount
from qaflora_edge.prompt.neutral import neutral

Who = TypeVar("Who")
Run = dict[str, float]
Measure = Callable[[int], Run]  # from the number of a round
Row = dict[str, Any]
CONTEXT_OPTIONS = ("threads", "kv_type", "flash_attn")
METHODS = ("qa-flora", "spectr", "two-place:abstain=never", "two-place", "relay", "static")


@dataclass(frozen=True)
class Plan:
    """How often and how much, as in `qaflora bench --help`."""

    repeat: int
    k: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    max_tokens: int


class StockContext(Context):
    """A context as llama.cpp makes it: no pack, each adapter at scale 1/k.

    adapters  of llama_adapter_lora_init; none for the base alone
    options   of context_params

    It has llama.cpp's own micro-batch size. Raises BackendError when it cannot be made.
    """

    def __init__(
        self, model: Model, adapters: Sequence[Any], *, n_ctx: int, **options: Any
    ) -> None:
        self._model = model
        self._lib = model._lib
        self._functions = model._functions
        params = context_params(model, n_token=n_ctx, **options)
        self._pointer = self._lib.llama_init_from_model(model._pointer, params) or None
        if self._pointer is None:
            raise BackendError(
                f"A context of {n_ctx} tokens without our adapters cannot be made. "
                f"llama.cpp says: {logged()}."
            )
        self._set_up(n_ctx, params, None)
        if adapters:
            self._set_adapters(adapters)

    def _set_adapters(self, adapters: Sequence[Any]) -> None:
        n_adapter = len(adapters)
        pointers = (ctypes.c_void_p * n_adapter)()
        scales = (ctypes.c_float * n_adapter)()
        for index, adapter in enumerate(adapters):
            pointers[index] = ctypes.cast(adapter, ctypes.c_void_p)
            scales[index] = 1.0 / n_adapter
        pointers_type = ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))
        array = ctypes.cast(pointers, pointers_type)
        code = self._lib.llama_set_adapters_lora(self._pointer, array, n_adapter, scales)
        if code:
            raise BackendError(f"llama_set_adapters_lora failed with code {code}.")


class Rig(contextlib.ExitStack):
    """One base, the contexts that are timed on it, and prompts; close() frees all of them.

    adapters  for more than these each is loaded again, and costs what another adapter would
    options   keywords of Engine; llama.cpp's own adapters keep the types of their files
    seed      of the prompts
    """

    def __init__(
        self, base: Path, adapters: Sequence[Path], options: Mapping[str, Any], seed: int = 0
    ) -> None:
        super().__init__()
        self._paths = adapters
        self._adapter_type = options.get("adapter_type", "auto")
        self._options = {name: options[name] for name in CONTEXT_OPTIONS}
        placing: dict[str, Any] = {name: options.get(name) for name in PLACING}
        self.model = Model(read_base(base), **placing)
        self.enter_context(self.model)
        self._stock = Model(read_base(base), rearrange=True, **placing)
        self.enter_context(self._stock)
        self._loras: list[Any] = []  # the model frees them
        self._random = random.Random(seed)
        self._n_drawn = 0
        no_text = self.model.tokenize("", add_special=True)
        self._start = no_text[:1]

    def stock(self, k: int, n_ctx: int) -> StockContext:
        """Set up k adapters at scale 1/k through llama_set_adapters_lora; 0 for the base alone."""
        model = self._stock
        n_loaded = len(self._loras)
        for path in self._copies(k)[n_loaded:]:
            name = os.fsencode(path)
            lora = model._lib.llama_adapter_lora_init(model._pointer, name)
            if not lora:
                raise BackendError(f"llama.cpp cannot load the adapter {path}; convert it again.")
            self._loras.append(lora)
        adapters = self._loras[:k]
        context = StockContext(model, adapters, n_ctx=n_ctx, **self._options)
        return self.enter_context(context)

    def ours(self, k: int, n_ctx: int) -> Context:
        """Set up k adapters of one pack, at weight 1/k in every layer."""
        pack = Pack(self.model, self._copies(k), adapter_type=self._adapter_type)
        self.enter_context(pack)
        context = Context(self.model, pack, n_ctx=n_ctx, **self._options)
        self.enter_context(context)
        shape = (k, self.model.n_layer)
        weights = np.full(shape, 1.0 / k, np.float32)
        context.set_weights(weights)
        return context

    def _copies(self, k: int) -> list[Path]:
        paths = cycle(self._paths)
        return list(islice(paths, k))

    def draw(self, n_token: int) -> list[int]:
        """Draw a prompt out of everyday text in many languages: BOS, a number, text from anywhere.

        Each has another number, so no KV state of one prompt serves the next.
        """
        self._n_drawn += 1
        text = f"{self._n_drawn}. "
        texts = neutral("prompts")
        tokens: list[int] = []
        while len(tokens) < n_token:
            tokens += self.model.tokenize(text)
            self._random.shuffle(texts)
            every_text = "\n".join(texts) + "\n"
            start = self._random.randrange(len(every_text) // 2)
            text = every_text[start:]
        prompt = self._start + tokens
        return prompt[:n_token]

    def draw_chat(self, engine: Engine, n_token: int) -> list[int]:
        """Draw a user turn of so many tokens, in the form of a chat where the base has one."""
        tokens = self.draw(n_token)
        text = self.model.detokenize(tokens).decode("utf-8", "replace")
        if not engine.has_chat_template:
            return engine.tokenize(text)
        message = {"role": "user", "content": text}
        return engine.chat_tokens([message])


def prefill(context: Context, tokens: Sequence[int]) -> None:
    """Prefill a prompt: ours in the chunks of an Engine, llama.cpp's in its own micro-batches."""
    context.clear()
    if isinstance(context, StockContext):
        context.decode(tokens)
        return
    for _ in branches.prefill(context, tokens, 0, "last"):
        pass


def take_turns(
    contestants: Mapping[Who, Measure], repeat: int, tell: TellCount
) -> dict[Who, list[Run]]:
    """Run all contestants in each of 1 + repeat rounds, another one first each time.

    contestants  who -> measures it in a round of this number
    returns      who -> its runs, without that of the first round
    """
    order = list(contestants)
    runs: dict[Who, list[Run]] = {name: [] for name in order}
    n_round = 1 + repeat
    for turn in range(n_round):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            run = contestants[name](turn)
            if turn > 0:
                runs[name].append(run)
        tell(turn + 1, n_round)
    return runs


def compared(key: str, runs: Sequence[Run], **others: Sequence[Run]) -> Row:
    """Give median and ends of a figure, and of its ratios to others' within each round."""
    figures = [run[key] for run in runs]
    row = {key: _spread(figures)}
    for name, their_runs in others.items():
        pairs = zip(runs, their_runs, strict=True)
        ratios = [run[key] / their_run[key] for run, their_run in pairs]
        row[name] = _spread(ratios)
    return row


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def measure_decode(rig: Rig, plan: Plan, tell: Tell) -> Iterator[Row]:
    """Prefill a prompt and decode given tokens after it, at each length."""
    n_ctx = max(plan.prompt_tokens) + plan.max_tokens
    contexts: dict[str, Context] = {"base": rig.stock(0, n_ctx)}
    for k in plan.k:
        contexts[f"stock k={k}"] = rig.stock(k, n_ctx)
        contexts[f"ours k={k}"] = rig.ours(k, n_ctx)
    for length in plan.prompt_tokens:
        n_token = length + plan.max_tokens
        drawn = [rig.draw(n_token) for _ in range(1 + plan.repeat)]
        contestants = {}
        for name, context in contexts.items():
            contestants[name] = partial(_decode, context, drawn, length)
        runs = take_turns(contestants, plan.repeat, partial(tell, "decode"))
        for name in contexts:
            row: Row = {"prompt_tokens": length, "name": name, "runs": runs[name]}
            stock = name.replace("ours", "stock")
            for what in ("decode", "prefill"):
                others = {}
                if name != "base":
                    others[f"{what}_of_base"] = runs["base"]
                if name != stock:
                    others[f"{what}_of_stock"] = runs[stock]
                row |= compared(f"{what}_tokens_per_second", runs[name], **others)
            yield row


def _decode(context: Context, drawn: Sequence[Sequence[int]], length: int, turn: int) -> Run:
    tokens = drawn[turn]
    start = time.perf_counter()
    prefill(context, tokens[:length])
    context.logits()
    middle = time.perf_counter()
    for position in range(length, len(tokens)):
        context.decode([tokens[position]], start=position)
        context._lib.llama_synchronize(context._pointer)  # a device may still compute
    end = time.perf_counter()
    n_decoded = len(tokens) - length
    prefill_s = middle - start
    decode_s = end - middle
    return {
        "prefill_tokens_per_second": length / prefill_s,
        "decode_tokens_per_second": n_decoded / decode_s,
    }


def measure_first_token(rig: Rig, engine: Engine, plan: Plan, tell: Tell) -> Iterator[Row]:
    """Weigh, prefill and choose a chat's first token, next to llama.cpp's prefill of the base."""
    base = rig.stock(0, engine.n_ctx)

    def run(length: int, name: str, turn: int) -> Run:
        tokens = rig.draw_chat(engine, length)
        base.clear()
        start = time.perf_counter()
        if name == "plain":
            base.decode(tokens)
            base.logits()
        else:
            answer = engine.generate(tokens, weights=name, max_tokens=1)
            draft = next(answer.drafting(), None)
            if draft is None:  # else a relay's draft is seen first
                answer.text()
        seconds = time.perf_counter() - start
        return {"ttft_ms": 1e3 * seconds}

    names = ["plain"]
    for method in METHODS:
        strategy = method.partition(":")[0]
        if strategy in engine.strategies:
            names.append(method)
    contestants = {}
    for length in plan.prompt_tokens:
        for name in names:
            contestants[length, name] = partial(run, length, name)
    runs = take_turns(contestants, plan.repeat, partial(tell, "ttft"))
    for length, name in contestants:
        its_runs = runs[length, name]
        row: Row = {"prompt_tokens": length, "name": name, "runs": its_runs}
        plain = runs[length, "plain"]
        row |= compared("ttft_ms", its_runs, of_plain=plain)
        yield row
