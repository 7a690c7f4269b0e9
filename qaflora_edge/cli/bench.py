"""qaflora bench"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import (
    Decorator,
    SharedOptions,
    bundle_argument,
    command,
    json_option,
    shared_options,
)
from qaflora_edge.cli.output import print_json, progress_bars
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.errors import BundleError, OptionError
from qaflora_edge.formats.inputs import Json
from qaflora_edge.show import columns

if TYPE_CHECKING:
    from qaflora_edge.bundles.open import BundleFiles

PARTS = ("decode", "ttft")
Row = Mapping[str, Any]


def _listed(flag: str, allowed: Sequence[Any], default: str, help: str) -> Decorator:
    is_number = isinstance(allowed, range)
    expected = f"a number from 1 to {allowed[-1]}" if is_number else f"one of {', '.join(allowed)}"

    def read(ctx: click.Context, param: click.Parameter, text: str) -> tuple[Any, ...]:
        values = []
        for item in map(str.strip, text.split(",")):
            value = int(item) if is_number and item.isdecimal() else item
            if value not in allowed:
                raise click.BadParameter(f"{item!r} is not {expected}.")
            values.append(value)
        return tuple(dict.fromkeys(values))

    return click.option(
        flag, callback=read, help=help, metavar="A,B,...", default=default, show_default=True
    )


@command("qaflora bench demo", "qaflora bench demo --k 3 --prompt-tokens 128 --only decode,ttft")
@bundle_argument
@json_option("Print one JSON object, with every run.")
@_listed("--only", PARTS, ",".join(PARTS), "Measure these parts only.")
@_listed(
    "--k",
    range(1, 256),
    "1,2,3,4,8",
    "Numbers of adapters in the part decode. Beyond those of the bundle, its adapters are loaded "
    "again; each copy costs what another adapter would.",
)
@_listed("--prompt-tokens", range(1, 1 << 24), "42,512", "Tokens of the prompt.")
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

    Contestants take turns, with a new prompt each round. Ratios are taken within a round.

    decode: prefill and decoding of the base as llama.cpp runs it, of --k adapters through
    llama_set_adapters_lora (stock), and of as many fused by us; each at weight 1/k. ttft: the time
    to the first token under several strategies, each with a prompt of its own, as a multiple of
    the base's prefill (plain).
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
            f"Cannot measure the bundle {loaded.path}: it has no adapters, expected at least "
            "one. Give a bundle with adapters."
        )
    sizes |= {"max_tokens": options.max_tokens}
    measured = _measured(loaded, options, only, sizes)
    result = _facts(loaded, options) | sizes | measured
    if as_json:
        print_json(result)
    else:
        click.echo("\n".join(_table(result)))


def _measured(
    loaded: "BundleFiles", options: SharedOptions, only: Sequence[str], sizes: Json
) -> Json:
    import qaflora_edge.bench as parts
    from qaflora_edge.engine import Engine

    plan = parts.Plan(**sizes)
    longest = max(plan.prompt_tokens)
    n_ctx = longest + plan.max_tokens + 256  # a template
    engine_options = options.engine | {"n_ctx": n_ctx}
    adapters = list(loaded.adapter_paths.values())
    measured = {}
    rig = parts.Rig(loaded.base_path, adapters, engine_options, options.seed or 0)
    with rig, progress_bars() as tell:
        if "decode" in only:
            measured["decode"] = [*parts.measure_decode(rig, plan, tell)]
        if "ttft" in only:
            with Engine(loaded.path, **engine_options) as engine:
                measured["ttft"] = [*parts.measure_first_token(rig, engine, plan, tell)]
    return measured


def _facts(loaded: "BundleFiles", options: SharedOptions) -> Json:
    from qaflora_edge.backend.library import default_threads
    from qaflora_edge.cli.doctor import cpu_name, library_facts, package_facts

    adapters = []
    for name, info in loaded.adapters.items():
        types = {tensor.ggml_type.name for tensor in info.tensors.values()}
        adapters.append({"name": name, "rank": info.rank, "types": sorted(types)})
    facts = {
        "base": loaded.base_path.stem,
        "base_bytes": loaded.header.size_bytes,
        "adapters": adapters,
        "options": vars(options),
        "threads": options.threads or default_threads(),
        "cpu": cpu_name(),
        "library": library_facts(),
    }
    return facts | package_facts()


def _table(result: Row) -> Iterator[str]:
    adapters = []
    for adapter in result["adapters"]:
        types = "/".join(adapter["types"])
        adapters.append(f"{adapter['name']} (rank {adapter['rank']}, {types})")
    yield f"{result['base']}, {result['base_bytes'] / 1e6:.1f} MB; adapters: {', '.join(adapters)}"
    yield f"{result['cpu']}, {result['threads']} threads; {result['library']['build_info']}"
    yield f"medians of {result['repeat']} interleaved runs (lowest-highest); ratios within a run"
    for part in PARTS:
        for length, group in groupby(result.get(part, ()), lambda row: row.get("prompt_tokens")):
            rows = list(group)
            keys = [key for key, value in rows[-1].items() if isinstance(value, dict)]
            table = [[f"{part}, prompt {length} tokens" if length else part]]
            for key in keys:
                title = key[max(0, key.find("of_")) :].replace("_", " ")
                table[0].append(title.replace("tokens per second", "tok/s"))
            for row in rows:
                table.append([row["name"], *(_cell(row, key) for key in keys)])
            yield ""
            yield from columns(table)


def _cell(row: Row, key: str) -> str:
    if key not in row:
        return ""
    spread = row[key]
    if "of_" in key:
        return f"{spread['median']:.2f}"
    digits = 1 if spread["max"] < 1000 else 0
    low, high = (f"{spread[end]:.{digits}f}" for end in ("min", "max"))
    return f"{spread['median']:.{digits}f} ({low}-{high})"
