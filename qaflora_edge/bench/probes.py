"""Measure: what exact weights cost, for numbers of adapters and lengths of a prompt."""

import time
from collections.abc import Sequence

from qaflora_edge.backend.context import Context
from qaflora_edge.bench.measure import Plan, Row, Run, in_turn, spread
from qaflora_edge.bench.rig import Prompts, Rig, read_prompt
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.probe import Prober
from qaflora_edge.weighing.reading import run_alone


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
