"""qaflora bench"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import BUNDLE, SharedOptions, bundle_folder, command, shared_options
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.config import MAX_PARALLEL
from qaflora_edge.errors import BundleError, OptionError
from qaflora_edge.show.text import columns

if TYPE_CHECKING:
    from qaflora_edge.bundles.open import Opened

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
    first token under several strategies, each with a prompt of its own, as a multiple of the base's
    prefill. callers: decoding for --callers at once, each with a mix of its own, next to the base
    in one batch. memory: the peak of one answer in a process of its own.
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
            f"Cannot measure the bundle {loaded.place}: it has no adapters, expected at least "
            "one. Give a bundle with adapters."
        )
    sizes |= {"max_tokens": options.max_tokens}
    result = _facts(loaded, options) | sizes
    del result["callers"]  # the rows of that part have the numbers
    result |= _measured(loaded, options, only, sizes)
    click.echo(json.dumps(result) if as_json else _table(result))


def _measured(
    loaded: Opened, options: SharedOptions, only: Sequence[str], sizes: dict[str, Any]
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
        list(loaded.adapter_paths.values()),
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
                loaded.place, tokens, plan.max_tokens, {**given, **size}
            )
        if "callers" in only:
            many = given | size | {"n_parallel": max(plan.callers)}
            alone = Engine(base=loaded.base_path, **many | {"strategy": None})
            with alone as base, Engine(loaded.place, **many) as ours:
                both = {"base": base, "ours": ours}
                result["callers"] = parts.measure_callers(both, plan, prompts, tell)
        if "decode" in only:
            result["decode"] = parts.measure_decode(rig, plan, prompts, tell)
        if "ttft" in only:
            with Engine(loaded.place, **given | size) as engine:
                result["ttft"] = parts.measure_ttft(rig, engine, plan, prompts, tell)
    return result


def _facts(loaded: Opened, options: SharedOptions) -> dict[str, Any]:
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
    for part, (title, label, cells) in _TABLES.items():
        for length, rows in groupby(result.get(part, ()), lambda row: row.get("prompt_tokens")):
            head = (title.format(length), *(name for name, _ in cells))
            table = [(label(row), *(_cell(row, key) for _, key in cells)) for row in rows]
            lines += ["", *columns([head, *table])]
    if "memory" in result:
        sizes = result["memory"]
        facts = [(label, _mb(sizes[f"{key}_bytes"])) for key, label in _MEMORY.items()]
        lines += ["", *columns(facts)]
    return "\n".join(lines)


# Part -> the title of its tables, the label of a row, and its columns with their keys.
_TABLES: dict[str, tuple[str, Callable[[Row], str], tuple[tuple[str, str], ...]]] = {
    "decode": (
        "prompt {} tokens",
        lambda row: f"{row['contestant']} k={row['k']}" if row["k"] else "base",
        (
            ("decode tok/s", "decode_tokens_per_second"),
            ("of base", "decode_of_base"),
            ("of llama.cpp's", "decode_of_stock"),
            ("prefill tok/s", "prefill_tokens_per_second"),
            ("of base", "prefill_of_base"),
            ("of llama.cpp's", "prefill_of_stock"),
        ),
    ),
    "ttft": (
        "first token, prompt {} tokens",
        itemgetter("method"),
        (("ms", "ttft_ms"), ("of the base's prefill", "of_plain")),
    ),
    "callers": (
        "callers",
        lambda row: f"{row['callers']:>3} {row['way']}",
        (("tok/s", "tokens_per_second"), ("of the fewest", "of_one"), ("of base", "of_base")),
    ),
}
_MEMORY = {"peak": "peak memory", "adapters": "adapters"}


def _cell(row: Row, key: str) -> str:
    """A ratio's median, or a median with the lowest and highest run."""
    if key not in row:
        return ""
    spread = row[key]
    if "of_" in key:
        return f"{spread['median']:.2f}"
    digits = 1 if spread["max"] < 1000 else 0
    low, high = (f"{spread[end]:.{digits}f}" for end in ("min", "max"))
    return f"{spread['median']:.{digits}f} ({low}-{high})"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
