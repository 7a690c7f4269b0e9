"""Measure: what fused adapters cost beside the base and beside llama.cpp's own adapters.

Every part runs its contestants in turn within a round, on a prompt that no round had before, and
begins with a round that is thrown away. Ratios are taken within a round, then the median.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.probe_context import KvState
from qaflora_edge.bench.rig import Prompts, Rig, StockContext, read_prompt
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter import read_adapter_gguf
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.adapter_inputs import QueryProjections
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.probe import Prober, QueryProbe
from qaflora_edge.weighing.reading import run_alone
from qaflora_edge.weighing.strategy import KINDS
from qaflora_edge.weighing.typical import EXTENTS
from qaflora_edge.weighing.weigher import Known, Weigher

Run = dict[str, float]
Row = dict[str, Any]

N_CHANGE = 8  # changes of weights in one run


@dataclass(frozen=True)
class Plan:
    """How often and how much, as `qaflora bench --help` has it."""

    repeat: int
    k: tuple[int, ...]
    probe_k: int
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    probe_tokens: tuple[int, ...]
    turn_tokens: tuple[int, int]
    system_tokens: tuple[int, int]
    callers: tuple[int, ...]
    question_tokens: int
    lens: str
    pool: str


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and ends."""
    q1, median, q3 = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    ends = {"min": min(values), "max": max(values)}
    shown = {"median": median, "q1": q1, "q3": q3, **ends}
    return {name: float(value) for name, value in shown.items()}


def ratios(runs: Sequence[Run], others: Sequence[Run], key: str) -> list[float]:
    """The quotient of two contestants within each round."""
    return [run[key] / other[key] for run, other in zip(runs, others, strict=True)]


# decode


def measure_decode(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Reading a prompt and decoding the same tokens after it, at each length."""
    contestants = _contestants(rig, plan)
    rows: list[Row] = []
    total = len(plan.prompt_tokens) * (1 + plan.repeat)
    for at, length in enumerate(plan.prompt_tokens):
        runs: dict[tuple[str, int], list[Run]] = {who: [] for who in contestants}
        for turn in range(1 + plan.repeat):
            tokens = prompts.draw(length + plan.max_tokens)
            firsts: dict[tuple[str, int], F32] = {}
            for who in in_turn(list(contestants), turn):
                run, firsts[who] = _answer(contestants[who], tokens, length)
                if turn:
                    runs[who].append(run)
            for k in plan.k:
                if turn:  # do both compute the same thing?
                    difference = np.abs(firsts["ours", k] - firsts["stock", k]).max()
                    runs["ours", k][-1]["logits_difference"] = float(difference)
            tell("decode", at * (1 + plan.repeat) + turn + 1, total)
        rows += [_decode_row(length, who, runs) for who in contestants]
    return rows


def _contestants(rig: Rig, plan: Plan) -> dict[tuple[str, int], Context]:
    """The base, and stock and ours for each k, next to each other."""
    contestants: dict[tuple[str, int], Context] = {("base", 0): rig.base()}
    for k in plan.k:
        contestants["stock", k] = rig.stock(k)
        contestants["ours", k] = rig.ours(k)
    return contestants


def in_turn(items: Sequence[Any], turn: int) -> list[Any]:
    """Each round begins with another contestant."""
    at = turn % len(items)
    return [*items[at:], *items[:at]]


def _answer(context: Context, tokens: Sequence[int], length: int) -> tuple[Run, F32]:
    """Read a prompt, and decode what is given after it: times, and the first logits [n_vocab]."""
    context.clear()
    start = time.perf_counter()
    read_prompt(context, tokens[:length])
    first = context.logits()
    read = time.perf_counter()
    for position in range(length, len(tokens)):
        context.decode([tokens[position]], start=position)
        _finish(context)
    prefill_ms, decode_ms = 1e3 * (read - start), 1e3 * (time.perf_counter() - read)
    n_decoded = len(tokens) - length
    run = {
        "prefill_ms": prefill_ms,
        "prefill_tokens_per_second": 1e3 * length / prefill_ms,
        "decode_ms": decode_ms,
        "n_decoded": n_decoded,
        "decode_tokens_per_second": 1e3 * n_decoded / decode_ms,
    }
    return run, first


def _finish(context: Context) -> None:
    """Wait for what a device still computes."""
    context._lib.llama_synchronize(context._pointer)


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
    if name == "ours":
        row["logits_difference"] = max(run["logits_difference"] for run in runs[who])
    row["runs"] = runs[who]
    return row


# change of weights


def measure_change(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """New weights before a token, against the same token without; stock scales beside it."""
    contestants = _contestants(rig, plan)
    del contestants["base", 0]
    runs: dict[tuple[str, int], list[Run]] = {who: [] for who in contestants}
    length = min(plan.prompt_tokens)
    for turn in range(1 + plan.repeat):
        tokens = prompts.draw(length + 1)
        for who in in_turn(list(contestants), turn):
            run = _change(contestants[who], who[1], tokens, seed=turn)
            if turn:
                runs[who].append(run)
        tell("change", turn + 1, 1 + plan.repeat)
    return [_change_row(length, who, runs[who]) for who in contestants]


def _change(context: Context, k: int, tokens: Sequence[int], seed: int) -> Run:
    """Decode one token again and again, every other time with new weights: medians in ms."""
    rng = np.random.default_rng(seed)
    n_layer = context._model.n_layer
    context.clear()
    context.decode(tokens)

    def step(weights: F32 | None) -> tuple[float, float]:
        context.keep_common(tokens)
        start = time.perf_counter()
        if isinstance(context, StockContext):
            if weights is not None:
                context.set_scales(weights[:, 0])
        elif weights is not None:
            context.set_weights(weights)
        set_ = time.perf_counter()
        context.decode([tokens[-1]], start=len(tokens) - 1)
        _finish(context)
        return 1e3 * (set_ - start), 1e3 * (time.perf_counter() - set_)

    step(None)  # the graph for one token is built here
    plain_ms, set_ms, changed_ms, n_built = [], [], [], 0
    for _ in range(N_CHANGE):
        plain_ms.append(step(None)[1])
        weights = rng.random((k, n_layer), np.float32) / np.float32(k)
        before = _n_built(context)
        set_, changed = step(weights)
        n_built += _n_built(context) + isinstance(context, StockContext) - before
        set_ms.append(set_)
        changed_ms.append(changed)
    run = {
        "set_ms": statistics.median(set_ms),
        "plain_ms": statistics.median(plain_ms),
        "changed_ms": statistics.median(changed_ms),
    }
    extra = run["changed_ms"] - run["plain_ms"]
    return {**run, "extra_ms": extra, "cost_ms": run["set_ms"] + extra, "n_graph_built": n_built}


def _n_built(context: Context) -> int:
    """Graphs built so far; of a stock context less the decodes, for it counts the others only."""
    return -context.n_reused if isinstance(context, StockContext) else context.n_graph_built


def _change_row(length: int, who: tuple[str, int], runs: list[Run]) -> Row:
    row: Row = {"prompt_tokens": length, "contestant": who[0], "k": who[1], "n_change": N_CHANGE}
    for key in ("set_ms", "plain_ms", "changed_ms", "extra_ms", "cost_ms"):
        row[key] = spread([run[key] for run in runs])
    return row | {"n_graph_built": sum(int(run["n_graph_built"]) for run in runs), "runs": runs}


# time to the first token


def measure_ttft(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Probe, weights, fused prefill and first logits, against the prefill of the base."""
    methods = _methods(rig, plan)
    weigher = _weigher(rig, plan)
    context = rig.ours(plan.probe_k)

    def measure(name: str, tokens: Sequence[int]) -> Run:
        if name == "plain":
            return _plain(rig.base(), tokens)
        strategy, prober = methods[name]
        return _weighed(context, weigher, strategy, prober, tokens)

    names = ["plain", *methods]
    for name in names:  # probers make their contexts for the longest prompt at once
        measure(name, prompts.draw(max(plan.prompt_tokens)))
    rows: list[Row] = []
    total = len(plan.prompt_tokens) * (1 + plan.repeat)
    for at, length in enumerate(plan.prompt_tokens):
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for turn in range(1 + plan.repeat):
            tokens = prompts.draw(length)
            for name in in_turn(names, turn):
                run = measure(name, tokens)
                if turn:
                    runs[name].append(run)
            tell("ttft", at * (1 + plan.repeat) + turn + 1, total)
        rows += [_ttft_row(length, plan.probe_k, name, runs) for name in names]
    return rows


def _methods(rig: Rig, plan: Plan) -> dict[str, tuple[str, Prober]]:
    """Name -> strategy and a Prober of its own, which knows no other's states."""
    methods = {name: (name, rig.prober(plan.probe_k)) for name in ("qa-flora", "cosine")}
    if _have_query_projections(rig, plan):
        methods["norm"] = ("norm", rig.prober(plan.probe_k))
    infos = map(read_adapter_gguf, rig.paths(plan.probe_k))
    if all({*KINDS} & {*info.targets} for info in infos):
        for name, more in (("two-place", "abstain=never"), ("base alone", "answer=0,question=0")):
            methods[name] = (f"two-place:{more}", rig.prober(plan.probe_k, prefix_cache=128))
    return methods


def _have_query_projections(rig: Rig, plan: Plan) -> bool:
    """Whether the strategy norm can weigh these adapters; the others need not fail with it."""
    try:
        QueryProjections(rig.paths(plan.probe_k), rig.model.n_layer)
    except StrategyError:
        return False
    return True


def _weigher(rig: Rig, plan: Plan) -> Weigher:
    """Weighs prompts as if each were a question, and its adapters as if all were alike."""
    names = rig.names(plan.probe_k)
    usual = {key: {"mean": 0.0, "spread": 1.0} for key in EXTENTS}
    known = Known("qa-flora", plan.lens, plan.pool, typical=dict.fromkeys(names, usual))
    return Weigher(names, rig.model.n_layer, known, find_question=lambda tokens: (0, len(tokens)))


def _weigh(
    weigher: Weigher, strategy: str, tokens: Sequence[int], prober: Prober
) -> tuple[FusionWeights, KvState | None]:
    """Weights, and what the base has read of the prompt, where it answers alone."""
    rows, held = range(len(weigher.adapters)), list[KvState | None]()
    fusion = weigher.weigh(
        strategy, tokens, lambda q: QueryProbe(prober, q, rows, run_alone, held.append)
    )
    return fusion, held[-1] if held and not fusion.weights.any() else None


def _plain(context: Context, tokens: Sequence[int]) -> Run:
    context.clear()
    start = time.perf_counter()
    read_prompt(context, tokens)
    context.logits()
    ms = 1e3 * (time.perf_counter() - start)
    return {"ttft_ms": ms, "prefill_ms": ms}


def _weighed(
    context: Context, weigher: Weigher, strategy: str, prober: Prober, tokens: Sequence[int]
) -> Run:
    start = time.perf_counter()
    fusion, held = _weigh(weigher, strategy, tokens, prober)
    probed = time.perf_counter()
    context.clear()
    context.set_weights(fusion.weights)
    n = len(tokens) - 1
    if held is not None and context.take(held.sequences[0], held.tokens, n, 0):
        context.decode(tokens[n:], start=n)
    else:
        read_prompt(context, tokens)
    context.logits()
    end = time.perf_counter()
    run = {
        "ttft_ms": 1e3 * (end - start),
        "probe_ms": 1e3 * (probed - start),
        "forward_ms": prober.timings.forward_ms,
        "lens_ms": prober.timings.lens_ms,
        "divergence_ms": prober.timings.divergence_ms,
        "prefill_ms": 1e3 * (end - probed),
    }
    return run


def _deviation(weights: F32, exact: F32) -> Run:
    difference = np.abs(weights - exact)
    return {"deviation_worst": float(difference.max()), "deviation_mean": float(difference.mean())}


def _ttft_row(length: int, k: int, name: str, runs: Mapping[str, list[Run]]) -> Row:
    own = runs[name]
    row: Row = {"prompt_tokens": length, "method": name, "k": 0 if name == "plain" else k}
    row |= {key: spread([run[key] for run in own]) for key in own[0] if key.endswith("_ms")}
    if name != "plain":
        row["of_plain"] = spread(ratios(own, runs["plain"], "ttft_ms"))
    return row | {"runs": own}


def _deviations(runs: Sequence[Run]) -> Row:
    """The worst and the mean over all runs."""
    if "deviation_worst" not in runs[0]:
        return {}
    return {
        "deviation_worst": max(run["deviation_worst"] for run in runs),
        "deviation_mean": statistics.fmean(run["deviation_mean"] for run in runs),
    }


# second turn


def measure_turn(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """The probe of a chat's next message after its history, against a probe of all afresh."""
    weigher = _weigher(rig, plan)
    going_on, fresh = rig.prober(plan.probe_k), rig.prober(plan.probe_k)
    n_history, n_new = plan.turn_tokens
    for prober in (going_on, fresh):  # contexts for all tokens are made before anything is timed
        _weigh(weigher, "qa-flora", prompts.draw(n_history + n_new), prober)
    runs: list[Run] = []
    for turn in range(1 + plan.repeat):
        tokens = prompts.draw(n_history + n_new)
        tokens[n_history - 1] = rig.model.end
        _weigh(weigher, "qa-flora", tokens[:n_history], going_on)
        fusions = {}
        for name, prober in in_turn([("turn", going_on), ("fresh", fresh)], turn):
            fusions[name], _ = _weigh(weigher, "qa-flora", tokens, prober)
        if turn:
            runs.append(
                {f"{name}_ms": fusion.probe_ms for name, fusion in sorted(fusions.items())}
                | {"turn_forward_ms": going_on.timings.forward_ms}
                | {"fresh_forward_ms": fresh.timings.forward_ms}
                | _deviation(fusions["turn"].weights, fusions["fresh"].weights)
            )
        tell("turn", turn + 1, 1 + plan.repeat)
    row: Row = {"k": plan.probe_k, "history_tokens": n_history, "new_tokens": n_new}
    row |= {key: spread([run[key] for run in runs]) for key in runs[0] if key.endswith("_ms")}
    row["of_fresh"] = spread([run["turn_ms"] / run["fresh_ms"] for run in runs])
    return [row | _deviations(runs) | {"runs": runs}]
