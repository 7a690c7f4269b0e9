"""The table of `qaflora bench`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from qaflora_edge.cli.tables import columns

Row = Mapping[str, Any]
Cells = tuple[str, ...]
METHODS = {"plain": "base, no probe", "qa-flora": "qa-flora (exact)"}


def table(result: Row) -> str:
    """Medians and, in brackets, the lowest and highest run."""
    lines = _head(result)
    for name, blocks in _PARTS.items():
        for block in blocks(result) if name in result else ():
            lines += ["", *block]
    return "\n".join(lines)


def _head(result: Row) -> list[str]:
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


def _range(spread: Mapping[str, float], digits: int = 1) -> str:
    digits = digits if spread["max"] < 1000 else 0
    low, high = (f"{spread[end]:.{digits}f}" for end in ("min", "max"))
    return f"{spread['median']:.{digits}f} ({low}-{high})"


def _ms(row: Row, part: str) -> str:
    return f"{_range(row[f'{part}_ms'])} ms"


def _median(row: Row, key: str, form: str = ".2f") -> str:
    return f"{row[key]['median']:{form}}" if key in row else ""


def _by_length(rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    for length, found in groupby(rows, key=lambda row: int(row["prompt_tokens"])):
        yield length, list(found)


def _adapters(k: int) -> str:
    return f"{k} adapter{'s' if k > 1 else ''}"


def _who(row: Row) -> str:
    return "base" if row["contestant"] == "base" else f"{row['contestant']} k={row['k']}"


def _decode(result: Row) -> Iterator[list[str]]:
    for length, rows in _by_length(result["decode"]):
        ratios = ("of base", "of stock")
        head = (f"prompt {length} tokens", "decode tok/s", *ratios, "prefill tok/s", *ratios)
        yield columns([head, *([_who(row), *_speeds(row)] for row in rows)])


def _speeds(row: Row) -> Iterator[str]:
    for what in ("decode", "prefill"):
        yield _range(row[f"{what}_tokens_per_second"])
        yield _median(row, f"{what}_of_base")
        yield _median(row, f"{what}_of_stock")


def _change(result: Row) -> Iterator[list[str]]:
    rows = [("new weights", "set ms", "next token ms", "without", "cost ms", "graphs built")]
    for row in result["change"]:
        times = (
            _median(row, "set_ms", ".3f"),
            _median(row, "changed_ms"),
            _median(row, "plain_ms"),
        )
        rows.append((_who(row), *times, _range(row["cost_ms"], 2), str(row["n_graph_built"])))
    yield columns(rows)


def _ttft(result: Row) -> Iterator[list[str]]:
    for length, found in _by_length(result["ttft"]):
        rows: list[Cells] = [("", "ms", "of plain", "forward", "lens", "divergence", "prefill")]
        for row in found:
            parts = (f"{part}_ms" for part in ("forward", "lens", "divergence", "prefill"))
            times = (_median(row, part, ".1f") for part in parts)
            label = METHODS.get(row["method"], str(row["method"]))
            rows.append((label, _range(row["ttft_ms"]), _median(row, "of_plain"), *times))
        title = f"time to first token, prompt {length} tokens, {_adapters(result['probe_k'])}"
        yield [title, *columns(rows)]


def _probe(result: Row) -> Iterator[list[str]]:
    rows = [("exact weights", "ms", "of plain", "forward ms", "fused prefill ms", "of plain")]
    for row in result["probe"]:
        label = f"{row['prompt_tokens']} tokens, k={row['k']}"
        probe = (_range(row["probe_ms"]), _median(row, "probe_of_plain"))
        fused = (_range(row["fused_ms"]), _median(row, "fused_of_plain"))
        rows.append((label, *probe, _median(row, "forward_ms", ".1f"), *fused))
    yield columns(rows)


def _deviation(row: Row) -> str:
    return (
        f"weights differ from the exact ones by {row['deviation_worst']:.2g} at worst, "
        f"{row['deviation_mean']:.2g} on average"
    )


def _turn(result: Row) -> Iterator[list[str]]:
    for row in result["turn"]:
        title = (
            f"second turn of a chat, {row['history_tokens']} tokens of history and "
            f"{row['new_tokens']} new, {_adapters(row['k'])}"
        )
        going_on = ("probe going on", _ms(row, "turn"), _median(row, "of_fresh"), "of all afresh")
        yield [title, *columns([going_on, ("probe afresh", _ms(row, "fresh"))]), _deviation(row)]


def _system(result: Row) -> Iterator[list[str]]:
    for row in result["system"]:
        title = (
            f"question of {row['new_tokens']} tokens behind a system prompt of "
            f"{row['system_tokens']} that was probed before, {_adapters(row['k'])}"
        )
        rows = [
            ("first token", _ms(row, "ttft"), _median(row, "ttft_of_plain"), "of plain"),
            ("probe", _ms(row, "probe"), _median(row, "probe_of_plain")),
            ("fused prefill", _ms(row, "prefill")),
        ]
        yield [title, *columns(rows)]


def _callers(result: Row) -> Iterator[list[str]]:
    rows: list[Cells] = [("", "tok/s", "of one caller", "of base", "of bare C")]
    for row in result["callers"]:
        ratios = (_median(row, f"of_{other}") for other in ("one", "base", "bare"))
        label = f"{row['callers']:>3} {row['way']}"
        rows.append((label, _range(row["tokens_per_second"]), *ratios))
    yield [f"callers at once, {_adapters(result['probe_k'])}, a mix each", *columns(rows)]


def _pause(result: Row) -> Iterator[list[str]]:
    for row in result["pause"]:
        title = (
            f"longest wait for a token while another's {row['question_tokens']} tokens are probed "
            f"and read, {_adapters(row['k'])}"
        )
        rows = [
            ("longest wait", _ms(row, "pause"), _median(row, "of_ubatch"), "of a micro-batch"),
            ("a micro-batch of the probe", _ms(row, "probe_ubatch")),
            ("a micro-batch of the prompt", _ms(row, "prefill_ubatch")),
            ("a token, alone", _ms(row, "alone")),
        ]
        yield [title, *columns(rows)]


def _memory(result: Row) -> Iterator[list[str]]:
    memory = result["memory"]
    parts = {
        "base": "base_bytes",
        f"KV, --ctx {memory['n_ctx']}": "kv_main_bytes",
        "KV of the probe": "kv_probe_bytes",
        "adapters": "adapters_bytes",
        "beyond these": "excess_bytes",
    }
    rows = [("peak memory", _mb(memory["peak_bytes"]))]
    lines = columns(rows + [(f"  {label}", _mb(memory[key])) for label, key in parts.items()])
    lines[-1] += f", {_mb(memory['python_bytes'])} of them Python before it loads the base"
    yield lines


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


_BLOCKS = _decode, _change, _ttft, _probe, _turn, _system, _callers, _pause, _memory
_PARTS = {blocks.__name__.removeprefix("_"): blocks for blocks in _BLOCKS}
