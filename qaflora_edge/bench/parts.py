"""The parts of `qaflora bench`: decode, ttft, callers.

Contestants run in turn within a round, on a prompt that no round had before; each contestant of
ttft has its own. A first round is thrown away. Ratios are taken within a round, then the median.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.context import Context
from qaflora_edge.bench.rig import Prompts, Rig, prefill
from qaflora_edge.engine import Engine
from qaflora_edge.errors import OptionError
from qaflora_edge.progress import Tell, TellCount

Who = TypeVar("Who")
Run = dict[str, float]
Row = dict[str, Any]
METHODS = ("qa-flora", "cosine", "norm", "two-place:abstain=never", "two-place", "static")


@dataclass(frozen=True)
class Plan:
    """How often and how much, as in `qaflora bench --help`."""

    repeat: int
    k: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    callers: tuple[int, ...]


def take_turns(
    names: Sequence[Who], repeat: int, run: Callable[[Who, int], Run], tell: TellCount
) -> dict[Who, list[Run]]:
    """Run all contestants in each of 1 + repeat rounds, another one first each time.

    run      measures a contestant in a round
    returns  contestant -> its runs, without that of the first round
    """
    runs: dict[Who, list[Run]] = {name: [] for name in names}
    for turn in range(1 + repeat):
        at = turn % len(names)
        for name in [*names[at:], *names[:at]]:
            runs[name].append(run(name, turn))
        tell(turn + 1, 1 + repeat)
    return {name: own[1:] for name, own in runs.items()}


def compared(key: str, own: Sequence[Run], **others: Sequence[Run]) -> Row:
    """Give median and ends of a figure, and of its ratios to others' within each round."""
    values = {key: [run[key] for run in own]}
    for name, runs in others.items():
        values[name] = [run[key] / other[key] for run, other in zip(own, runs, strict=True)]
    return {
        name: {"median": median(each), "min": min(each), "max": max(each)}
        for name, each in values.items()
    }


# decode


def measure_decode(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Prefill a prompt and decode given tokens after it, at each length."""
    n_ctx = max(plan.prompt_tokens) + plan.max_tokens
    contexts: dict[tuple[str, int], Context] = {("base", 0): rig.base(n_ctx)}
    for k in plan.k:
        contexts |= {("stock", k): rig.stock(k, n_ctx), ("ours", k): rig.ours(k, n_ctx)}
    rows: list[Row] = []
    for length in plan.prompt_tokens:
        rows += _decode_rows(contexts, length, plan, prompts, tell)
    return rows


def _decode_rows(
    contexts: Mapping[tuple[str, int], Context],
    length: int,
    plan: Plan,
    prompts: Prompts,
    tell: Tell,
) -> list[Row]:
    drawn = [prompts.draw(length + plan.max_tokens) for _ in range(1 + plan.repeat)]
    logits: dict[tuple[str, int], F32] = {}

    def run(who: tuple[str, int], turn: int) -> Run:
        speeds, logits[who] = _decode(contexts[who], drawn[turn], length)
        return speeds

    runs = take_turns(list(contexts), plan.repeat, run, lambda *n: tell("decode", *n))
    rows: list[Row] = []
    for (name, k), own in runs.items():
        row: Row = {"prompt_tokens": length, "contestant": name, "k": k, "runs": own}
        for what in ("prefill", "decode"):
            others = {} if name == "base" else {f"{what}_of_base": runs["base", 0]}
            others |= {f"{what}_of_stock": runs["stock", k]} if name == "ours" else {}
            row |= compared(f"{what}_tokens_per_second", own, **others)
        if name == "ours":  # do both compute the same?
            difference = np.abs(logits["ours", k] - logits["stock", k]).max()
            row["logits_difference"] = float(difference)
        rows.append(row)
    return rows


def _decode(context: Context, tokens: Sequence[int], length: int) -> tuple[Run, F32]:
    """Times of one contestant, and the logits after the prompt: float32 [n_vocab]."""
    start = time.perf_counter()
    prefill(context, tokens[:length])
    first = context.logits()
    middle = time.perf_counter()
    for position in range(length, len(tokens)):
        context.decode([tokens[position]], start=position)
        context._lib.llama_synchronize(context._pointer)  # a device may still compute
    end = time.perf_counter()
    speeds = {
        "prefill_tokens_per_second": length / (middle - start),
        "decode_tokens_per_second": (len(tokens) - length) / (end - middle),
    }
    return speeds, first


# time to the first token


def measure_ttft(rig: Rig, engine: Engine, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Weigh, prefill and choose a first token, next to llama.cpp's prefill of the base."""
    names = [name for name in METHODS if name.partition(":")[0] in engine.strategies]
    base = rig.base(max(plan.prompt_tokens))

    def run(who: tuple[int, str], _: int) -> Run:
        length, name = who
        tokens = prompts.draw(length)  # an Engine keeps what it read of the last one
        start = time.perf_counter()
        if name == "plain":
            prefill(base, tokens)
            base.logits()
        else:
            engine.generate(tokens, weights=name, max_tokens=1).text()
        return {"ttft_ms": 1e3 * (time.perf_counter() - start)}

    every = [(length, name) for length in plan.prompt_tokens for name in ("plain", *names)]
    runs = take_turns(every, plan.repeat, run, lambda *n: tell("ttft", *n))
    return [
        {"prompt_tokens": length, "method": name, "runs": own}
        | compared("ttft_ms", own, of_plain=runs[length, "plain"])
        for (length, name), own in runs.items()
    ]


# callers


def measure_callers(
    engines: Mapping[str, Engine], plan: Plan, prompts: Prompts, tell: Tell
) -> list[Row]:
    """Decode for some callers at once, each with a mix of its own, next to the base alone.

    engines  "base" and "ours", for as many callers as the plan has at most
    """
    length, most, ours = min(plan.prompt_tokens), max(plan.callers), engines["ours"]
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(ours.adapters)), (most, ours.n_layer))
    mixes: dict[str, Any] = {
        "base": [None] * most,
        "ours": drawn.transpose(0, 2, 1).astype(np.float32),
    }
    options = {"max_tokens": plan.max_tokens, "logit_bias": dict.fromkeys(prompts.ends, -100.0)}
    read = [  # of different lengths
        [prompts.draw(length + i) for i in range(most)] for _ in range(1 + plan.repeat)
    ]

    def run(who: tuple[int, str], turn: int) -> Run:
        n, way = who
        pairs = zip(read[turn][:n], mixes[way][:n], strict=True)
        requests = [{"prompt": tokens, "weights": mix} for tokens, mix in pairs]
        answers = engines[way].generate_many(requests, **options)
        return {"tokens_per_second": _speed([answer.timings.token_s for _, answer in answers])}

    every = [(n, way) for n in plan.callers for way in mixes]
    runs = take_turns(every, plan.repeat, run, lambda *n: tell("callers", *n))
    fewest, rows = min(plan.callers), []
    for (n, way), own in runs.items():
        others = {"of_one": runs[fewest, way]} | (
            {} if way == "base" else {"of_base": runs[n, "base"]}
        )
        row = {"callers": n, "way": way, "runs": own}
        rows.append(row | compared("tokens_per_second", own, **others))
    return rows


def _speed(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second from when all are decoded together until the first one has ended."""
    start, first = max(own[0] for own in times), min(times, key=lambda own: own[-1])
    n_step = sum(at > start for at in first)
    if not n_step:
        raise OptionError(
            f"The part callers found an answer that ended before all of {len(times)} callers had "
            "begun, expected that all are decoded together. Raise --max-tokens, lower --callers, "
            "or leave out callers with --only."
        )
    return n_step * len(times) / (first[-1] - start)
