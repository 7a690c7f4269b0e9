"""The table of `qaflora bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
METHODS = {"plain": "base, no probe", "qa-flora": "qa-flora (exact)"}
_LABEL = 18


def table(result: Result) -> str:
    """Medians and, in brackets, the lowest and highest run."""
    lines = _head(result)
    for length in result["prompt_tokens"] if "decode" in result else ():
        lines += ["", *_decode(result, length)]
    if "change" in result:
        lines += ["", *_change(result["change"])]
    for length in result["prompt_tokens"] if "ttft" in result else ():
        lines += ["", *_ttft(result, length)]
    if "probe" in result:
        lines += ["", *_probe(result["probe"])]
    for row in result.get("turn", ()):
        lines += ["", *_turn(row)]
    for row in result.get("system", ()):
        lines += ["", *_system(row)]
    if "light" in result:
        lines += ["", *_light(result["light"])]
    if "callers" in result:
        lines += ["", *_callers(result)]
    for row in result.get("pause", ()):
        lines += ["", *_pause(row)]
    if "memory" in result:
        lines += ["", *_memory(result["memory"])]
    return "\n".join(lines)


def _head(result: Result) -> list[str]:
    base, machine, library = result["base_file"], result["machine"], result["library"]
    kind = result["adapter_type"]
    converted = "" if kind == "auto" else f"; ours as {kind}"
    adapters = ", ".join(
        f"{adapter['name']} (rank {adapter['rank']}, {'/'.join(adapter['types'])})"
        for adapter in result["adapter_files"]
    )
    lines = [
        f"{result['base']}, {_mb(base['size_bytes'])}; adapters: {adapters}{converted}",
        f"{machine['cpu']}, {result['threads']} threads; {library['build_info']}",
        f"medians of {result['repeat']} interleaved runs (lowest-highest); ratios are taken within "
        "a run",
    ]
    n_adapter = len(result["adapters"])
    if max(*result["k"], result["probe_k"]) > n_adapter:
        lines.append(
            f"k > {n_adapter}: the bundle's adapters are loaded again, each copy for itself"
        )
    return lines


def _decode(result: Result, length: int) -> list[str]:
    lines = [
        _line(
            f"prompt {length} tokens",
            "decode tok/s",
            "of base",
            "of stock",
            "prefill tok/s",
            "of base",
            "of stock",
        )
    ]
    for row in result["decode"]:
        if row["prompt_tokens"] != length:
            continue
        cells = [
            cell
            for what in ("decode", "prefill")
            for cell in (
                _range(row[f"{what}_tokens_per_second"]),
                _ratio(row.get(f"{what}_of_base")),
                _ratio(row.get(f"{what}_of_stock")),
            )
        ]
        lines.append(_line(_who(row), *cells))
    return lines


def _who(row: Mapping[str, Any]) -> str:
    return "base" if row["contestant"] == "base" else f"{row['contestant']} k={row['k']}"


def _line(label: str, *cells: str) -> str:
    """One line of the parts decode and change."""
    widths = (22, 9, 10, 24, 9, 10)
    columns = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
    return f"{label:<{_LABEL}}{''.join(columns)}".rstrip()


def _range(spread: Mapping[str, float], digits: int = 1) -> str:
    digits = digits if spread["max"] < 1000 else 0
    low, high = (f"{spread[end]:.{digits}f}" for end in ("min", "max"))
    return f"{spread['median']:.{digits}f} ({low}-{high})"


def _ratio(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f}"


def _change(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{'new weights':<{_LABEL}}{'set ms':>10}{'next token ms':>15}{'without':>10}"
        f"{'cost ms':>23}{'graphs built':>14}"
    ]
    for row in rows:
        lines.append(
            f"{_who(row):<{_LABEL}}{row['set_ms']['median']:>10.3f}"
            f"{row['changed_ms']['median']:>15.2f}{row['plain_ms']['median']:>10.2f}"
            f"{_range(row['cost_ms'], 2):>23}{row['n_graph_built']:>14}"
        )
    return lines


def _ttft(result: Result, length: int) -> list[str]:
    lines = [
        f"time to first token, prompt {length} tokens, {_adapters(result['probe_k'])}",
        f"{'':<{_LABEL}}{'ms':>23}{'of plain':>10}{'forward':>10}{'lens':>9}{'divergence':>12}"
        f"{'prefill':>10}",
    ]
    for row in result["ttft"]:
        if row["prompt_tokens"] != length:
            continue
        label = METHODS.get(row["method"], row["method"])
        if row["method"] == "tail":
            label = f"--probe-tail {result['probe_tail']}"
        line = f"{label:<{_LABEL}}{_range(row['ttft_ms']):>23}{_ratio(row.get('of_plain')):>10}"
        for key, width in (("forward_ms", 10), ("lens_ms", 9), ("divergence_ms", 12)):
            line += f"{row[key]['median']:>{width}.1f}" if key in row else " " * width
        lines.append(f"{line}{row['prefill_ms']['median']:>10.1f}")
        if "deviation_worst" in row:
            lines.append(f"{'':<{_LABEL}}{_deviation(row)}")
    return lines


def _probe(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{'exact weights':<{_LABEL}}{'ms':>23}{'of plain':>10}{'forward ms':>12}"
        f"{'fused prefill ms':>26}{'of plain':>10}"
    ]
    for row in rows:
        label = f"{row['prompt_tokens']} tokens, k={row['k']}"
        lines.append(
            f"{label:<{_LABEL}}{_range(row['probe_ms']):>23}{_ratio(row['probe_of_plain']):>10}"
            f"{row['forward_ms']['median']:>12.1f}{_range(row['fused_ms']):>26}"
            f"{_ratio(row['fused_of_plain']):>10}"
        )
    return lines


def _adapters(k: int) -> str:
    return f"{k} adapter{'s' if k > 1 else ''}"


def _deviation(row: Mapping[str, Any]) -> str:
    return (
        f"weights differ from the exact ones by {row['deviation_worst']:.2g} at worst, "
        f"{row['deviation_mean']:.2g} on average"
    )


def _turn(row: Mapping[str, Any]) -> list[str]:
    return [
        f"second turn of a chat, {row['history_tokens']} tokens of history and "
        f"{row['new_tokens']} new, {_adapters(row['k'])}",
        f"{'probe going on':<{_LABEL}}{_range(row['turn_ms']):>23} ms"
        f"{_ratio(row['of_fresh']):>10} of all afresh",
        f"{'probe afresh':<{_LABEL}}{_range(row['fresh_ms']):>23} ms",
        f"{'':<{_LABEL}}{_deviation(row)}",
    ]


def _system(row: Mapping[str, Any]) -> list[str]:
    return [
        f"question of {row['new_tokens']} tokens behind a system prompt of {row['system_tokens']} "
        f"that was probed before, {_adapters(row['k'])}",
        f"{'first token':<{_LABEL}}{_range(row['ttft_ms']):>23} ms"
        f"{_ratio(row['ttft_of_plain']):>10} of plain",
        f"{'probe':<{_LABEL}}{_range(row['probe_ms']):>23} ms{_ratio(row['probe_of_plain']):>10}",
        f"{'fused prefill':<{_LABEL}}{_range(row['prefill_ms']):>23} ms",
    ]


def _light(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"decoding under exact weights, {_adapters(rows[0]['k'])}, without those of a small share",
        f"{'':<{_LABEL}}{'decode tok/s':>23}{'of base':>9}{'applied':>9}"
        f"{'KL of the next token':>22}",
    ]
    for row in rows:
        label = f"--min-weight {row['min_weight']:g}" if row["min_weight"] else "all of them"
        lines.append(
            f"{label:<{_LABEL}}{_range(row['decode_tokens_per_second']):>23}"
            f"{_ratio(row['decode_of_base']):>9}{row['applied']['median']:>9.2f}"
            f"{row['kl']['median']:>22.2g}"
        )
    return lines


def _callers(result: Result) -> list[str]:
    lines = [
        f"callers at once, {_adapters(result['probe_k'])}, a mix each",
        f"{'':<{_LABEL}}{'tok/s':>22}{'of one caller':>15}{'of base':>9}{'of bare C':>11}",
    ]
    for row in result["callers"]:
        lines.append(
            f"{row['callers']:>3} {row['way']:<{_LABEL - 4}}{_range(row['tokens_per_second']):>22}"
            f"{_ratio(row['of_one']):>15}{_ratio(row.get('of_base')):>9}"
            f"{_ratio(row.get('of_bare')):>11}".rstrip()
        )
    return lines


def _pause(row: Mapping[str, Any]) -> list[str]:
    return [
        f"longest wait for a token while another's {row['question_tokens']} tokens are probed and "
        f"read, {_adapters(row['k'])}",
        f"{'':<{_LABEL}}{_range(row['pause_ms']):>23} ms{_ratio(row['of_ubatch']):>10} of a "
        "micro-batch",
        f"{'a micro-batch':<{_LABEL}}{_range(row['probe_ubatch_ms']):>23} ms of the probe, "
        f"{_range(row['prefill_ubatch_ms'])} ms of the prompt",
        f"{'a token, alone':<{_LABEL}}{_range(row['alone_ms']):>23} ms",
    ]


def _memory(memory: Mapping[str, Any]) -> list[str]:
    parts = {
        "base": "base_bytes",
        f"KV, --ctx {memory['n_ctx']}": "kv_main_bytes",
        "KV of the probe": "kv_probe_bytes",
        "adapters": "adapters_bytes",
        "beyond these": "excess_bytes",
    }
    lines = [f"{'peak memory':<{_LABEL}}{_mb(memory['peak_bytes']):>12}"]
    lines += [f"  {label:<{_LABEL - 2}}{_mb(memory[key]):>12}" for label, key in parts.items()]
    lines[-1] += f", {_mb(memory['python_bytes'])} of them Python before it loads the base"
    return lines


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
