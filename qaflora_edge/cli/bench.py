"""qaflora bench"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import BUNDLE, SharedOptions, bundle_folder, command, shared_options
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.config import MAX_PARALLEL
from qaflora_edge.errors import BundleError, OptionError

if TYPE_CHECKING:
    from qaflora_edge.bench.measure import Plan
    from qaflora_edge.bundles.open import Bundle

PARTS = (
    *("decode", "change", "ttft", "probe", "turn", "system"),
    *("callers", "pause", "memory"),
)
MAX_K, MAX_TOKENS = 255, 2**24  # a probe is one sequence more, llama.cpp allows 256


def _numbers(
    flag: str, default: str, allowed: range, *, help: str, metavar: str = "N,N"
) -> Callable[..., Any]:
    """An option of whole numbers, as in 1,2,4: as many as its metavar names, or any that differ."""
    n = None if metavar == "N,N" else metavar.count(",") + 1

    def read(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
        items = [item.strip() for item in value.split(",")]
        if not all(re.fullmatch(r"[0-9]{1,9}", item) and int(item) in allowed for item in items):
            expected = f"from {allowed[0]} to {allowed[-1]}"
            raise click.BadParameter(f"{value!r} is not a list of numbers {expected}.")
        if n is not None and len(items) != n:
            raise click.BadParameter(f"{value!r} has {len(items)} numbers, expected {n}.")
        numbers = tuple(int(item) for item in items)
        return numbers if n is not None else tuple(dict.fromkeys(numbers))

    shown: dict[str, Any] = {"metavar": metavar, "default": default, "show_default": True}
    return click.option(flag, callback=read, help=help, **shown)


def _parts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in PARTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in names)


@command(
    "qaflora bench models/demo",
    "qaflora bench models/demo --k 3 --prompt-tokens 128 --only decode,ttft",
    "qaflora bench models/demo --repeat 9 --json",
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
    range(1, MAX_K + 1),
    help="Numbers of adapters that decode, and that the part probe probes. Beyond those of the "
    "bundle, its adapters are loaded again, each copy for itself, which costs what other adapters "
    "would.",
)
@click.option(
    "--probe-k",
    type=click.IntRange(1, MAX_K),
    metavar="N",
    help="Adapters in the parts ttft, turn, callers and pause.  [default: the bundle's]",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Interleaved runs; medians are printed.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=2),
    multiple=True,
    default=(42, 512),
    help="Tokens of the prompt; repeatable.  [default: 42 and 512]",
)
# Prompts that are cut in two and that are not; few are powers of two.
@_numbers(
    "--probe-tokens",
    "42,100,256,300",
    range(2, MAX_TOKENS + 1),
    help="Tokens of the prompts in the part probe.",
)
@_numbers(
    "--turn-tokens",
    "300,30",
    range(1, MAX_TOKENS + 1),
    metavar="HISTORY,NEW",
    help="Tokens of a chat so far, and of its next message.",
)
@_numbers(
    "--system-tokens",
    "400,40",
    range(2, MAX_TOKENS + 1),
    metavar="SYSTEM,NEW",
    help="Tokens of a system prompt, and of a question behind it.",
)
@_numbers(
    "--callers",
    "1,2,4,8,16",
    range(1, MAX_PARALLEL + 1),
    help="Callers at once; the fewest are the measure of the others.",
)
@click.option(
    "--question-tokens",
    type=click.IntRange(1, MAX_TOKENS),
    default=1000,
    show_default=True,
    help="Tokens of the question that comes in the part pause.",
)
@shared_options
def bench(
    bundle: str, as_json: bool, only: tuple[str, ...], options: SharedOptions, **sizes: Any
) -> None:
    """Measure speed on this machine.

    In one process and in turn: the base alone as llama.cpp runs it, --k adapters through
    llama.cpp's own llama_set_adapters_lora, and as many fused by us. All read the same prompt and
    decode the same tokens after it (--max-tokens); every round has a new prompt.
    Ratios are taken within a round, then the median. Both kinds of adapters weigh 1/k.

    decode: reading and decoding. change: what new weights cost before a token. ttft: the time to
    the first token (probe, weights, fused prefill, first logits) as a multiple of the base's
    prefill, for the strategies qa-flora, cosine, norm and two-place (which never abstains here),
    and for two-place where it leaves the answer to the base alone. probe: exact weights alone, and
    reading under them, as multiples of the base's prefill, for each of --k and --probe-tokens.
    turn: the probe of a chat's second turn. system: the time to the first token of a question
    behind a system prompt that was probed before. callers: decoding for --callers at once, each
    with a prompt (the shortest length and up) and a mix of its own: the base without adapters and
    llama_decode called by hand (bare C), each a batch of so many sequences, and an Engine by
    generate_many and by as many threads. pause: the longest time that one of two callers waits for
    a token while a question of --question-tokens of the other is probed and read, as a multiple of
    what one micro-batch of either takes alone. memory: the peak of one `qaflora run` with --ctx,
    --strategy and the longest prompt, in a process of its own.
    """
    from qaflora_edge.bundles.open import load_bundle

    _check_tokens(options, only, max(sizes["prompt_tokens"]), sizes["turn_tokens"])
    loaded = load_bundle(bundle_folder(bundle))
    if not loaded.adapter_paths:
        raise BundleError(
            f"Cannot measure the bundle {loaded.folder}: it has no adapters, expected at least "
            "one. Give a bundle with adapters."
        )
    plan = _plan(loaded, options, sizes)
    result = _facts(loaded, plan, options) | {"parts": list(only)}
    result |= _measured(loaded, plan, options, only)
    if as_json:
        click.echo(json.dumps(result))
        return
    from qaflora_edge.cli.bench_table import table

    click.echo(table(result))


def _check_tokens(
    options: SharedOptions, only: Sequence[str], n_prompt: int, turn_tokens: tuple[int, int]
) -> None:
    ctx, n_decode = options.ctx, options.max_tokens
    n_least = 2 if "callers" in only else 1
    if n_decode < n_least:
        raise OptionError(
            f"Option --max-tokens is {n_decode}, expected at least {n_least}: decoding is "
            "measured, that of callers behind their first token. Raise it."
        )
    if ctx < n_prompt + n_decode:
        raise OptionError(
            f"Option --ctx is {ctx}, expected at least {n_prompt + n_decode}: "
            f"{n_prompt} tokens of prompt and {n_decode} of answer. Raise --ctx, or lower "
            "--prompt-tokens or --max-tokens."
        )
    if "turn" in only and ctx < sum(turn_tokens):
        raise OptionError(
            f"Option --ctx is {ctx}, expected at least {sum(turn_tokens)}: {turn_tokens[0]} "
            f"tokens of a chat and {turn_tokens[1]} of its next message. Raise --ctx, lower "
            "--turn-tokens, or leave out turn with --only."
        )


def _plan(loaded: Bundle, options: SharedOptions, sizes: dict[str, Any]) -> Plan:
    from qaflora_edge.bench.measure import Plan

    known = loaded.known.under(lens=options.lens, pool=options.pool)
    sizes["probe_k"] = sizes["probe_k"] or len(loaded.adapter_paths)
    sizes["prompt_tokens"] = tuple(dict.fromkeys(sizes["prompt_tokens"]))
    more = {"max_tokens": options.max_tokens}
    return Plan(**sizes, **more, lens=known.lens, pool=known.pool)


def _measured(
    loaded: Bundle, plan: Plan, options: SharedOptions, only: tuple[str, ...]
) -> dict[str, Any]:
    """What each part gives: rows, and an object for memory; and the base's own facts."""
    from qaflora_edge.backend.model import PLACING
    from qaflora_edge.bench import measure
    from qaflora_edge.bench.callers import measure_callers, measure_pause
    from qaflora_edge.bench.memory import measure_memory
    from qaflora_edge.bench.probes import measure_probe, measure_system
    from qaflora_edge.bench.rig import Prompts, Rig

    engine = options.engine
    rig = Rig(
        loaded.base_path,
        loaded.adapter_paths,
        n_ctx=max(plan.prompt_tokens) + plan.max_tokens,
        placing={name: engine[name] for name in PLACING},
        adapter_type=engine["adapter_type"],
        options={name: engine[name] for name in ("threads", "kv_type", "flash_attn")},
    )
    measures = {  # callers first: it is slower in threads once this one has computed (see Loop)
        "callers": measure_callers,
        "pause": measure_pause,
        "decode": measure.measure_decode,
        "change": measure.measure_change,
        "ttft": measure.measure_ttft,
        "probe": measure_probe,
        "turn": measure.measure_turn,
        "system": measure_system,
    }
    with rig, progress_bars() as tell:
        prompts = Prompts(rig.model, options.seed or 0)
        result: dict[str, Any] = {"base": rig.model.name}
        if "memory" in only:  # first, for it is short and may refuse an option
            tokens = prompts.draw(max(plan.prompt_tokens))
            memory = measure_memory(
                loaded.folder,
                tokens,
                max_tokens=plan.max_tokens,
                strategy=options.strategy,
                engine=engine,
            )
            result["memory"] = {"prompt_tokens": len(tokens), "n_ctx": options.ctx, **memory}
        for part, measured in measures.items():
            if part in only:
                result[part] = measured(rig, plan, prompts, tell)
    return result


def _facts(loaded: Bundle, plan: Plan, options: SharedOptions) -> dict[str, Any]:
    """The machine, the library, the files and the options."""
    from qaflora_edge.backend.context_params import default_threads
    from qaflora_edge.backend.model import PLACING
    from qaflora_edge.cli.doctor import cpu_name, library_facts, package_facts

    header, packages, sizes = loaded.header, package_facts(), asdict(plan)
    sizes["callers_at_once"] = sizes.pop("callers")  # callers are what was measured of them
    return {
        "adapters": list(loaded.adapter_paths),
        **sizes,
        "seed": options.seed or 0,
        "threads": options.threads or default_threads(),
        "ctx": options.ctx,
        "kv_type": options.kv_type,
        "adapter_type": options.adapter_type,
        "flash_attn": options.engine["flash_attn"],
        **{name: getattr(options, name) for name in PLACING},
        "strategy": options.strategy or loaded.known.strategy,
        "base_file": {
            "path": str(loaded.base_path),
            "size_bytes": header.size_bytes,
            "architecture": header.architecture,
            "n_layer": header.n_layer,
            "n_embd": header.n_embd,
            "n_vocab": header.n_vocab,
        },
        "adapter_files": [_adapter_facts(*item) for item in loaded.adapter_paths.items()],
        "machine": {
            "cpu": cpu_name(),
            "n_cpu": default_threads(),
            "platform": packages["platform"],
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "library": library_facts(),
        "versions": packages["versions"],
    }


def _adapter_facts(name: str, path: Path) -> dict[str, Any]:
    from qaflora_edge.formats.adapter import read_adapter_gguf

    info = read_adapter_gguf(path)
    return {
        "name": name,
        "rank": info.rank,
        "alpha": info.alpha,
        "targets": list(info.targets),
        "types": sorted({tensor.ggml_type.name for tensor in info.tensors.values()}),
        "size_bytes": path.stat().st_size,
    }
