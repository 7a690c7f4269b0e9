"""Measure: what exact weights cost, for numbers of adapters and lengths of a prompt."""

import time
from collections.abc import Sequence

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.backend.context import Context
from qaflora_edge.bench.measure import Plan, Row, Run, in_turn, spread
from qaflora_edge.bench.rig import Prompts, Rig, read_prompt
from qaflora_edge.inference.logprobs import log_softmax
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.probe import Prober, QueryProbe
from qaflora_edge.weighing.reading import run_alone
from qaflora_edge.weighing.shaping import without_light
from qaflora_edge.weighing.weigher import Known, Weigher

LEAST = (0.0, 0.02, 0.05, 0.1, 0.2)  # shares below which adapters are left out


def measure_probe(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """The divergences of each adapter, and reading under weights, beside the base's prefill."""
    longest = max(plan.probe_tokens)
    base = rig.base(n_ctx=longest)
    probers = {k: rig.prober(k) for k in plan.k}
    fused = {k: rig.ours(k, n_ctx=longest) for k in plan.k}
    for k, prober in probers.items():  # they make their contexts for the longest prompt at once
        _probe(prober, k, plan, prompts.draw(longest))
    rows: list[Row] = []
    total = len(plan.probe_tokens) * (1 + plan.repeat)
    for at, length in enumerate(plan.probe_tokens):
        runs: dict[int, list[Run]] = {k: [] for k in plan.k}
        for turn in range(1 + plan.repeat):
            tokens = prompts.draw(length)
            round_ = {}
            for k in in_turn([0, *plan.k], turn):
                if k == 0:
                    round_[k] = {"prefill_ms": _read(base, tokens)}
                else:
                    run = _probe(probers[k], k, plan, tokens)
                    round_[k] = run | {"fused_ms": _read(fused[k], tokens)}
            if turn:
                for k in plan.k:
                    runs[k].append(round_[k] | {"prefill_ms": round_[0]["prefill_ms"]})
            tell("probe", at * (1 + plan.repeat) + turn + 1, total)
        rows += [_row(length, k, runs[k]) for k in plan.k]
    return rows


def measure_system(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Questions under one system prompt, which was probed before, beside the base's prefill."""
    k, (n_system, n_new) = plan.probe_k, plan.system_tokens
    n = n_system + n_new
    base, fused, prober = rig.base(n_ctx=n), rig.ours(k, n_ctx=n), rig.prober(k)
    system = [*prompts.draw(n_system - 1), rig.model.end]
    runs: list[Run] = []
    for turn in range(1 + plan.repeat):
        tokens = [*system, *prompts.draw(n_new)]
        run: Run = {}
        for way in in_turn(("plain", "warm"), turn):
            if way == "plain":
                run["plain_ms"] = _read(base, tokens)
            else:
                run |= _probe(prober, k, plan, tokens)
                run["prefill_ms"] = _read(fused, tokens)
        if turn:  # the first one warms
            run["ttft_ms"] = run["probe_ms"] + run["prefill_ms"]
            runs.append(run)
        tell("system", turn + 1, 1 + plan.repeat)
    row: Row = {"k": k, "system_tokens": n_system, "new_tokens": n_new}
    row |= {key: spread([run[key] for run in runs]) for key in runs[0]}
    for what in ("probe", "ttft"):
        row[f"{what}_of_plain"] = spread([run[f"{what}_ms"] / run["plain_ms"] for run in runs])
    return [row | {"runs": runs}]


def measure_light(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Decoding under exact weights of most adapters, without those of a small share.

    Beside the base's decoding, and how far the next token's distribution moves.
    """
    k, length = max(plan.k), min(plan.prompt_tokens)
    base, context, prober = rig.base(), rig.ours(k), rig.prober(k)
    known = Known("qa-flora", plan.lens, plan.pool)
    weigher = Weigher(rig.names(k), rig.model.n_layer, known)
    runs: dict[float, list[Run]] = {least: [] for least in LEAST}
    for turn in range(1 + plan.repeat):
        tokens = prompts.draw(length + plan.max_tokens)
        weights = weigher.weigh(
            None, tokens[:length], lambda query: QueryProbe(prober, query, range(k), run_alone)
        ).weights
        found: dict[float, tuple[Run, F64]] = {}
        base_ms = 0.0
        for least in in_turn([None, *LEAST], turn):
            if least is None:
                base_ms, _ = _decode(base, tokens, length)
                continue
            own = without_light(weights, least)
            context.set_weights(own)
            decode_ms, log_p = _decode(context, tokens, length)
            found[least] = {"decode_ms": decode_ms, "applied": float((own != 0).mean())}, log_p
        full = found[0.0][1]
        for least, (run, log_p) in found.items():
            run |= {"base_ms": base_ms, "kl": float((np.exp(full) * (full - log_p)).sum())}
            if turn:
                runs[least].append(run)
        tell("light", turn + 1, 1 + plan.repeat)
    return [_light_row(k, length, least, runs[least], plan.max_tokens) for least in LEAST]


def _decode(context: Context, tokens: Sequence[int], length: int) -> tuple[float, F64]:
    """Milliseconds of what is decoded behind a prompt, and what the prompt's last token foretells.

    returns  and float64 [n_vocab], log-probabilities
    """
    context.clear()
    read_prompt(context, tokens[:length])
    log_p = log_softmax(context.logits_view())
    start = time.perf_counter()
    for position in range(length, len(tokens)):
        context.decode([tokens[position]], start=position)
    context.logits_view()
    return 1e3 * (time.perf_counter() - start), log_p


def _light_row(k: int, length: int, least: float, runs: Sequence[Run], n_decode: int) -> Row:
    row: Row = {"k": k, "prompt_tokens": length, "min_weight": least}
    row["decode_tokens_per_second"] = spread([1e3 * n_decode / run["decode_ms"] for run in runs])
    row["decode_of_base"] = spread([run["base_ms"] / run["decode_ms"] for run in runs])
    for key in ("applied", "kl"):
        row[key] = spread([run[key] for run in runs])
    return row | {"runs": list(runs)}


def _probe(prober: Prober, k: int, plan: Plan, tokens: Sequence[int]) -> Run:
    start = time.perf_counter()
    run_alone(prober.divergence(tokens, range(k), "kl", plan.lens, plan.pool))
    ms = 1e3 * (time.perf_counter() - start)
    return {"probe_ms": ms, "forward_ms": prober.timings.forward_ms}


def _read(context: Context, tokens: Sequence[int]) -> float:
    """Milliseconds until there are logits."""
    context.clear()
    start = time.perf_counter()
    read_prompt(context, tokens)
    context.logits_view()
    return 1e3 * (time.perf_counter() - start)


def _row(length: int, k: int, runs: Sequence[Run]) -> Row:
    row: Row = {"prompt_tokens": length, "k": k}
    row |= {key: spread([run[key] for run in runs]) for key in runs[0]}
    for what in ("probe", "fused"):
        row[f"{what}_of_plain"] = spread([run[f"{what}_ms"] / run["prefill_ms"] for run in runs])
    return row | {"runs": list(runs)}
