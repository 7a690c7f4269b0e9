"""The parts of `qaflora bench`: decode, ttft, callers, memory.

Contestants run in turn within a round, on a prompt that no round had before; each contestant of
ttft has its own. A first round is thrown away. Ratios are taken within a round, then the median.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model
from qaflora_edge.bench.rig import Prompts, Rig, prefill
from qaflora_edge.engine import Engine
from qaflora_edge.errors import OptionError
from qaflora_edge.progress import Tell

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


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and ends."""
    q1, median, q3 = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    ends = {"min": min(values), "max": max(values)}
    return {k: float(v) for k, v in {"median": median, "q1": q1, "q3": q3, **ends}.items()}


def ratios(runs: Sequence[Run], others: Sequence[Run], key: str) -> list[float]:
    """The quotient of two contestants within each round."""
    return [run[key] / other[key] for run, other in zip(runs, others, strict=True)]


def in_turn(items: Sequence[Any], turn: int) -> list[Any]:
    """Begin each round with another contestant."""
    at = turn % len(items)
    return [*items[at:], *items[:at]]


# decode


def measure_decode(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Prefill a prompt and decode given tokens after it, at each length."""
    n_ctx = max(plan.prompt_tokens) + plan.max_tokens
    contestants: dict[tuple[str, int], Context] = {("base", 0): rig.base(n_ctx)}
    for k in plan.k:
        contestants |= {("stock", k): rig.stock(k, n_ctx), ("ours", k): rig.ours(k, n_ctx)}
    rows: list[Row] = []
    total = len(plan.prompt_tokens) * (1 + plan.repeat)
    for at, length in enumerate(plan.prompt_tokens):
        runs: dict[tuple[str, int], list[Run]] = {who: [] for who in contestants}
        for turn in range(1 + plan.repeat):
            tokens = prompts.draw(length + plan.max_tokens)
            firsts: dict[tuple[str, int], F32] = {}
            for who in in_turn(list(contestants), turn):
                run, firsts[who] = _decode(contestants[who], tokens, length)
                if turn:
                    runs[who].append(run)
            for k in plan.k if turn else ():  # do both compute the same?
                difference = np.abs(firsts["ours", k] - firsts["stock", k]).max()
                runs["ours", k][-1]["logits_difference"] = float(difference)
            tell("decode", at * (1 + plan.repeat) + turn + 1, total)
        rows += [_decode_row(length, who, runs) for who in contestants]
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


def _decode_row(
    length: int, who: tuple[str, int], runs: Mapping[tuple[str, int], list[Run]]
) -> Row:
    name, k = who
    row: Row = {"prompt_tokens": length, "contestant": name, "k": k}
    for what in ("prefill", "decode"):
        key = f"{what}_tokens_per_second"
        row[key] = spread([run[key] for run in runs[who]])
        if name != "base":
            row[f"{what}_of_base"] = spread(ratios(runs[who], runs["base", 0], key))
        if name == "ours":
            row[f"{what}_of_stock"] = spread(ratios(runs[who], runs["stock", k], key))
    return row | {"runs": runs[who]}


# time to the first token


def measure_ttft(rig: Rig, engine: Engine, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Weigh, prefill and choose a first token, next to llama.cpp's prefill of the base."""
    names = ["plain", *(name for name in METHODS if name in engine.strategies)]
    names += [name for name in METHODS if ":" in name and name.partition(":")[0] in names]
    base = rig.base(max(plan.prompt_tokens))
    rows: list[Row] = []
    total = len(plan.prompt_tokens) * (1 + plan.repeat)
    for at, length in enumerate(plan.prompt_tokens):
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for turn in range(1 + plan.repeat):
            for name in in_turn(names, turn):
                tokens = prompts.draw(length)  # an Engine keeps what it read of the last one
                start = time.perf_counter()
                if name == "plain":
                    prefill(base, tokens)
                    base.logits()
                else:
                    engine.generate(tokens, weights=name, max_tokens=1).text()
                if turn:
                    runs[name].append({"ttft_ms": 1e3 * (time.perf_counter() - start)})
            tell("ttft", at * (1 + plan.repeat) + turn + 1, total)
        for name, own in runs.items():
            row: Row = {"prompt_tokens": length, "method": name, "runs": own}
            row["ttft_ms"] = spread([run["ttft_ms"] for run in own])
            row["of_plain"] = spread(ratios(own, runs["plain"], "ttft_ms"))
            rows.append(row)
    return rows


# callers


def measure_callers(
    engines: Mapping[str, Engine], model: Model, plan: Plan, prompts: Prompts, tell: Tell
) -> list[Row]:
    """Decode for some callers at once, each with a mix of its own, next to the base alone.

    engines  "base" and "ours", for as many callers as the plan has at most
    """
    length, most, n_adapter = (
        min(plan.prompt_tokens),
        max(plan.callers),
        len(engines["ours"].adapters),
    )
    drawn = np.random.default_rng(0).dirichlet(np.ones(n_adapter), (most, model.n_layer))
    mixes: dict[str, Any] = {
        "base": [None] * most,
        "ours": drawn.transpose(0, 2, 1).astype(np.float32),
    }
    ends = [token for token in range(model.n_vocab) if model.is_end(token)]
    options = {"max_tokens": plan.max_tokens, "logit_bias": dict.fromkeys(ends, -100.0)}
    runs: dict[tuple[int, str], list[Run]] = {(n, way): [] for n in plan.callers for way in mixes}
    for turn in range(1 + plan.repeat):
        for n in plan.callers:
            read = [prompts.draw(length + i) for i in range(n)]  # of different lengths
            for way in in_turn(list(mixes), turn):
                pairs = zip(read, mixes[way][:n], strict=True)
                requests = [{"prompt": tokens, "weights": mix} for tokens, mix in pairs]
                answers = engines[way].generate_many(requests, **options)
                speed = _speed([answer.timings.token_s for _, answer in answers])
                if turn:
                    runs[n, way].append({"tokens_per_second": speed})
        tell("callers", turn + 1, 1 + plan.repeat)
    return [_caller_row(n, way, runs, min(plan.callers)) for n, way in runs]


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


def _caller_row(n: int, way: str, runs: dict[tuple[int, str], list[Run]], fewest: int) -> Row:
    key, own = "tokens_per_second", runs[n, way]
    row: Row = {"callers": n, "way": way, key: spread([run[key] for run in own])}
    row["of_one"] = spread(ratios(own, runs[fewest, way], key))
    if way != "base":
        row["of_base"] = spread(ratios(own, runs[n, "base"], key))
    return row | {"runs": own}
