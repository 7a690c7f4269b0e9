"""qaflora bench"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import BUNDLE, SharedOptions, bundle_folder, command, shared_options
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.config import MAX_PARALLEL
from qaflora_edge.errors import BundleError, OptionError
from qaflora_edge.show.text import columns

if TYPE_CHECKING:
    from qaflora_edge.bundles.open import Bundle

PARTS = ("decode", "ttft", "callers", "memory")
Row = Mapping[str, Any]


def _numbers(flag: str, default: str, most: int, help: str) -> Callable[..., Any]:
    """An option of different whole numbers from 1, as in 1,2,4."""

    def read(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
        items = [item.strip() for item in value.split(",")]
        if not all(item.isdecimal() and 1 <= int(item) <= most for item in items):
            raise click.BadParameter(f"{value!r} is not a list of numbers from 1 to {most}.")
        return tuple(dict.fromkeys(map(int, items)))

    return click.option(
        flag, callback=read, help=help, metavar="N,N", default=default, show_default=True
    )


def _parts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in PARTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in names)


@command(
    "qaflora bench models/demo",
    "qaflora bench models/demo --k 3 --prompt-tokens 128 --only decode,ttft",
)
@click.argument("bundle", **BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every run.")
@click.option(
    "--only",
    callback=_parts,
    metavar="PART,PART",
    default=",".join(PARTS),
    show_default=True,
    help="Measure these parts only.",
)
@_numbers(
    "--k",
    "1,2,3,4,8",
    255,
    "Numbers of adapters in the part decode. Beyond those of the bundle, its adapters are loaded "
    "again; each copy costs what another adapter would.",
)
@_numbers("--prompt-tokens", "42,512", 2**24, "Tokens of the prompt.")
@_numbers("--callers", "1,2,4,8,16", MAX_PARALLEL, "Callers at once.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Interleaved runs; medians are printed.",
)
@shared_options
def bench(
    bundle: str, as_json: bool, only: tuple[str, ...], options: SharedOptions, **sizes: Any
) -> None:
    """Measure speed on this machine.

    Contestants take turns in one process, and every round has a new prompt. Ratios are taken within
    a round, then the median.

    decode: prefill and decoding of the base as llama.cpp runs it, of --k adapters through
    llama_set_adapters_lora, and of as many fused by us; each at weight 1/k. ttft: the time to the
    first token under several strategies, as a multiple of the base's prefill. callers: decoding
    for --callers at once, each with a mix of its own, next to the base in one batch. memory: the
    peak of one answer in a process of its own.
    """
    from qaflora_edge.bundles.open import load_bundle

    if options.max_tokens < 2:
        raise OptionError(
            f"Option --max-tokens is {options.max_tokens}, expected at least 2: decoding is "
            "measured after the first token. Raise it."
        )
    loaded = load_bundle(bundle_folder(bundle))
    if not loaded.adapter_paths:
        raise BundleError(
            f"Cannot measure the bundle {loaded.folder}: it has no adapters, expected at least "
            "one. Give a bundle with adapters."
        )
    sizes |= {"max_tokens": options.max_tokens}
    result = _facts(loaded, options) | sizes | _measured(loaded, options, only, sizes)
    click.echo(json.dumps(result) if as_json else _table(result))


def _measured(
    loaded: Bundle, options: SharedOptions, only: Sequence[str], sizes: dict[str, Any]
) -> dict[str, Any]:
    """Rows of each part; an object for memory."""
    from qaflora_edge.backend.model import PLACING
    from qaflora_edge.bench import parts
    from qaflora_edge.bench.memory import measure_memory
    from qaflora_edge.bench.rig import Prompts, Rig
    from qaflora_edge.engine import Engine

    plan = parts.Plan(**sizes)
    given = options.engine
    longest = max(plan.prompt_tokens)
    size = {"n_ctx": longest + max(plan.callers) + plan.max_tokens, "strategy": options.strategy}
    rig = Rig(
        loaded.base_path,
        loaded.adapter_paths,
        placing={name: given[name] for name in PLACING},
        adapter_type=given["adapter_type"],
        options={name: given[name] for name in ("threads", "kv_type", "flash_attn")},
    )
    result: dict[str, Any] = {}
    with rig, progress_bars() as tell:
        prompts = Prompts(rig.model, options.seed or 0)
        if "memory" in only:  # first: it is short and may refuse an option
            tokens = prompts.draw(longest)
            result["memory"] = measure_memory(
                loaded.folder, tokens, plan.max_tokens, {**given, **size}
            )
        if "callers" in only:
            many = given | size | {"n_parallel": max(plan.callers)}
            alone = Engine(base=loaded.base_path, **many | {"strategy": None})
            with alone as base, Engine(loaded.folder, **many) as ours:
                both = {"base": base, "ours": ours}
                result["callers"] = parts.measure_callers(both, rig.model, plan, prompts, tell)
        if "decode" in only:
            result["decode"] = parts.measure_decode(rig, plan, prompts, tell)
        if "ttft" in only:
            with Engine(loaded.folder, **given | size) as engine:
                result["ttft"] = parts.measure_ttft(rig, engine, plan, prompts, tell)
    return result


def _facts(loaded: Bundle, options: SharedOptions) -> dict[str, Any]:
    """The machine, the library, the files and the options."""
    from qaflora_edge.backend.context import default_threads
    from qaflora_edge.cli.doctor import cpu_name, library_facts, package_facts
    from qaflora_edge.formats.adapter import read_adapter_gguf

    packages = package_facts()
    adapters = []
    for name, path in loaded.adapter_paths.items():
        info = read_adapter_gguf(path)
        types = sorted({tensor.ggml_type.name for tensor in info.tensors.values()})
        adapters.append({"name": name, "rank": info.rank, "types": types})
    return {
        "base": loaded.base_path.stem,
        "base_bytes": loaded.header.size_bytes,
        "adapters": adapters,
        "options": vars(options),
        "threads": options.threads or default_threads(),
        "cpu": cpu_name(),
        "platform": packages["platform"],
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "library": library_facts(),
        "versions": packages["versions"],
    }


# the table


def _table(result: Row) -> str:
    """Medians and, in brackets, the lowest and highest run."""
    adapters = ", ".join(
        f"{each['name']} (rank {each['rank']}, {'/'.join(each['types'])})"
        for each in result["adapters"]
    )
    lines = [
        f"{result['base']}, {_mb(result['base_bytes'])}; adapters: {adapters}",
        f"{result['cpu']}, {result['threads']} threads; {result['library']['build_info']}",
        f"medians of {result['repeat']} interleaved runs (lowest-highest); ratios within a run",
    ]
    tables: dict[str, Callable[[Any], Iterator[Any]]]
    tables = {"decode": _decode, "ttft": _ttft, "callers": _callers, "memory": _memory}
    for part, rows in tables.items():
        if part in result:
            for table in rows(result[part]):
                lines += ["", *columns(table)]
    return "\n".join(lines)


def _decode(rows: Sequence[Row]) -> Iterator[list[Sequence[str]]]:
    for length, found in groupby(rows, key=lambda row: row["prompt_tokens"]):
        ratios = ("of base", "of llama.cpp's")
        head = (f"prompt {length} tokens", "decode tok/s", *ratios, "prefill tok/s", *ratios)
        table: list[Sequence[str]] = [head]
        for row in found:
            cells = [f"{row['contestant']} k={row['k']}" if row["k"] else "base"]
            for what in ("decode", "prefill"):
                cells.append(_range(row[f"{what}_tokens_per_second"]))
                cells += [_median(row, f"{what}_of_base"), _median(row, f"{what}_of_stock")]
            table.append(cells)
        yield table


def _ttft(rows: Sequence[Row]) -> Iterator[list[Sequence[str]]]:
    for length, found in groupby(rows, key=lambda row: row["prompt_tokens"]):
        head = (f"first token, prompt {length} tokens", "ms", "of the base's prefill")
        own = [(row["method"], _range(row["ttft_ms"]), _median(row, "of_plain")) for row in found]
        yield [head, *own]


def _callers(rows: Sequence[Row]) -> Iterator[list[Sequence[str]]]:
    table: list[Sequence[str]] = [("callers", "tok/s", "of the fewest", "of base")]
    for row in rows:
        cells = (_range(row["tokens_per_second"]), _median(row, "of_one"), _median(row, "of_base"))
        table.append((f"{row['callers']:>3} {row['way']}", *cells))
    yield table


def _memory(memory: Row) -> Iterator[list[Sequence[str]]]:
    names = {"peak": "peak memory", "base": "the base's file", "adapters": "adapters"}
    names |= {"python": "Python before the base is loaded"}
    yield [(label, _mb(memory[f"{key}_bytes"])) for key, label in names.items()]


def _range(spread: Mapping[str, float]) -> str:
    digits = 1 if spread["max"] < 1000 else 0
    low, high = (f"{spread[end]:.{digits}f}" for end in ("min", "max"))
    return f"{spread['median']:.{digits}f} ({low}-{high})"


def _median(row: Row, key: str) -> str:
    return f"{row[key]['median']:.2f}" if key in row else ""


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
