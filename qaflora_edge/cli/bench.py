"""qaflora bench"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import BUNDLE, SharedOptions, bundle_folder, example, shared_options
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.config import FAST_TAIL, MAX_PARALLEL
from qaflora_edge.errors import BundleError, OptionError

if TYPE_CHECKING:
    from qaflora_edge.bench.measure import Plan
    from qaflora_edge.bundles.open import Bundle

PARTS = (
    *("decode", "change", "ttft", "probe", "turn", "system", "light"),
    *("callers", "pause", "memory"),
)
PROMPT_TOKENS, REPEAT = (42, 512), 5
KS, MAX_K = "1,2,3,4,8", 255  # a probe is one sequence more, llama.cpp allows 256
TURN_TOKENS, SYSTEM_TOKENS = "300,30", "400,40"
CALLERS, QUESTION_TOKENS = "1,2,4,8,16", 1000
PROBE_TOKENS = "42,100,256,300"  # what is cut in two and what is not; few are powers of two


Callback = Callable[[click.Context, click.Parameter, str], Any]


def _numbers(low: int, high: int, *, n: int | None = None) -> Callback:
    """Read n whole numbers from low to high, as in 1,2,4; without n, any that differ."""

    def read(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
        items = [item.strip() for item in value.split(",")]
        if not all(
            re.fullmatch(r"[0-9]{1,9}", item) and low <= int(item) <= high for item in items
        ):
            raise click.BadParameter(f"{value!r} is not a list of numbers from {low} to {high}.")
        if n is not None and len(items) != n:
            raise click.BadParameter(f"{value!r} has {len(items)} numbers, expected {n}.")
        numbers = tuple(int(item) for item in items)
        return numbers if n is not None else tuple(dict.fromkeys(numbers))

    return read


def _parts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in PARTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in names)


@click.command(
    epilog=example(
        """
        qaflora bench models/demo
        qaflora bench models/demo --k 3 --prompt-tokens 128 --only decode,ttft
        qaflora bench models/demo --repeat 9 --json
        """
    )
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
@click.option(
    "--k",
    "ks",
    callback=_numbers(1, MAX_K),
    metavar="N,N",
    default=KS,
    show_default=True,
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
    default=REPEAT,
    show_default=True,
    help="Interleaved runs; medians are printed.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=2),
    multiple=True,
    default=PROMPT_TOKENS,
    help=f"Tokens of the prompt; repeatable.  [default: {' and '.join(map(str, PROMPT_TOKENS))}]",
)
@click.option(
    "--probe-tokens",
    callback=_numbers(2, 2**24),
    metavar="N,N",
    default=PROBE_TOKENS,
    show_default=True,
    help="Tokens of the prompts in the part probe.",
)
@click.option(
    "--turn-tokens",
    callback=_numbers(1, 2**24, n=2),
    metavar="HISTORY,NEW",
    default=TURN_TOKENS,
    show_default=True,
    help="Tokens of a chat so far, and of its next message.",
)
@click.option(
    "--system-tokens",
    callback=_numbers(2, 2**24, n=2),
    metavar="SYSTEM,NEW",
    default=SYSTEM_TOKENS,
    show_default=True,
    help="Tokens of a system prompt, and of a question behind it.",
)
@click.option(
    "--callers",
    callback=_numbers(1, MAX_PARALLEL),
    metavar="N,N",
    default=CALLERS,
    show_default=True,
    help="Callers at once; the fewest are the measure of the others.",
)
@click.option(
    "--question-tokens",
    type=click.IntRange(1, 2**24),
    default=QUESTION_TOKENS,
    show_default=True,
    help="Tokens of the question that comes in the part pause.",
)
@shared_options
def bench(
    bundle: str,
    as_json: bool,
    only: tuple[str, ...],
    ks: tuple[int, ...],
    probe_k: int | None,
    repeat: int,
    prompt_tokens: tuple[int, ...],
    probe_tokens: tuple[int, ...],
    turn_tokens: tuple[int, int],
    system_tokens: tuple[int, int],
    callers: tuple[int, ...],
    question_tokens: int,
    options: SharedOptions,
) -> None:
    """Measure speed on this machine.

    In one process and in turn: the base alone as llama.cpp runs it, --k adapters through
    llama.cpp's own llama_set_adapters_lora, and as many fused by us. All read the same prompt and
    decode the same tokens after it (--max-tokens); every round has a new prompt.
    Ratios are taken within a round, then the median. Both kinds of adapters weigh 1/k.

    decode: reading and decoding. change: what new weights cost before a token. ttft: the time to
    the first token (probe, weights, fused prefill, first logits) as a multiple of the base's
    prefill, for the strategies qa-flora, cosine and norm, and for qa-flora with --probe-tail (by
    default that of --fast). probe: exact weights alone, and reading under them, as multiples of the
    base's prefill, for each of --k and --probe-tokens. turn: the probe of a chat's second turn.
    system: the time to the first token of a question behind a system prompt that was probed before.
    light: decoding with the most of --k under exact weights, as it is and with --min-weight of some
    sizes, and the divergence of the next token (KL, in nats) that comes of it. callers: decoding
    for --callers at once, each with a prompt (the shortest length and up) and a mix of its own: the
    base without adapters and llama_decode called by hand (bare C), each a batch of so many
    sequences, and an Engine by generate_many and by as many threads. pause: the longest time that
    one of two callers waits for a token while a question of --question-tokens of the other is
    probed and read, as a multiple of what one micro-batch of either takes alone. memory: the peak
    of one `qaflora run` with --ctx, --strategy and the longest prompt, in a process of its own.
    """
    from qaflora_edge.bundles.open import load_bundle

    lengths = tuple(dict.fromkeys(prompt_tokens))
    _check_tokens(
        options.ctx, max(lengths), options.max_tokens, turn_tokens if "turn" in only else None
    )
    loaded = load_bundle(bundle_folder(bundle))
    if not loaded.adapter_paths:
        raise BundleError(
            f"Cannot measure the bundle {loaded.folder}: it has no adapters, expected at least "
            "one. Give a bundle with adapters."
        )
    plan = _plan(
        loaded,
        options,
        ks=ks,
        probe_k=probe_k or len(loaded.adapter_paths),
        repeat=repeat,
        lengths=lengths,
        probe_lengths=probe_tokens,
        turn=turn_tokens,
        system=system_tokens,
        callers=callers,
        n_question=question_tokens,
    )
    result = _facts(loaded, plan, options) | {"parts": list(only)}
    result |= _measured(loaded, plan, options, only)
    if as_json:
        click.echo(json.dumps(result))
        return
    from qaflora_edge.cli.bench_table import table

    click.echo(table(result))


def _check_tokens(
    ctx: int, n_prompt: int, n_decode: int, turn_tokens: tuple[int, int] | None
) -> None:
    if n_decode < 1:
        raise OptionError(
            "Option --max-tokens is 0, expected at least 1: decoding is measured. Raise it."
        )
    if ctx < n_prompt + n_decode:
        raise OptionError(
            f"Option --ctx is {ctx}, expected at least {n_prompt + n_decode}: "
            f"{n_prompt} tokens of prompt and {n_decode} of answer. Raise --ctx, or lower "
            "--prompt-tokens or --max-tokens."
        )
    if turn_tokens is not None and ctx < sum(turn_tokens):
        raise OptionError(
            f"Option --ctx is {ctx}, expected at least {sum(turn_tokens)}: {turn_tokens[0]} "
            f"tokens of a chat and {turn_tokens[1]} of its next message. Raise --ctx, lower "
            "--turn-tokens, or leave out turn with --only."
        )


def _plan(loaded: Bundle, options: SharedOptions, **own: Any) -> Plan:
    from qaflora_edge.bench.measure import Plan
    from qaflora_edge.weighing import numbers as fusion

    defaults = loaded.fusion_defaults
    return Plan(
        n_decode=options.max_tokens,
        tail=options.probe_tail or FAST_TAIL,
        lens=options.lens or defaults.get("lens", fusion.DEFAULT_LENS),
        pool=options.pool or defaults.get("pool", fusion.DEFAULT_POOL),
        **own,
    )


def _measured(
    loaded: Bundle, plan: Plan, options: SharedOptions, only: tuple[str, ...]
) -> dict[str, Any]:
    """What each part gives: rows, and an object for memory; and the base's own facts."""
    from qaflora_edge.bench import measure
    from qaflora_edge.bench.callers import measure_callers, measure_pause
    from qaflora_edge.bench.memory import measure_memory
    from qaflora_edge.bench.probes import measure_light, measure_probe, measure_system
    from qaflora_edge.bench.rig import Prompts, Rig

    engine = options.engine
    rig = Rig(
        loaded.base_path,
        loaded.adapter_paths,
        n_ctx=max(plan.lengths) + plan.n_decode,
        gpu_layers=options.gpu_layers,
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
        "light": measure_light,
    }
    with rig, progress_bars() as tell:
        prompts = Prompts(rig.model, options.seed or 0)
        result: dict[str, Any] = {"base": rig.model.name}
        if "memory" in only:  # first, for it is short and may refuse an option
            tokens = prompts.draw(max(plan.lengths))
            memory = measure_memory(
                loaded.folder,
                tokens,
                max_tokens=plan.n_decode,
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
    from qaflora_edge.backend.context import default_threads
    from qaflora_edge.bench.machine import cpu_name
    from qaflora_edge.cli.doctor import library_facts, package_facts

    header = loaded.header
    packages = package_facts()
    return {
        "adapters": list(loaded.adapter_paths),
        "prompt_tokens": list(plan.lengths),
        "max_tokens": plan.n_decode,
        "repeat": plan.repeat,
        "k": list(plan.ks),
        "probe_k": plan.probe_k,
        "probe_tail": plan.tail,
        "probe_tokens": list(plan.probe_lengths),
        "turn_tokens": list(plan.turn),
        "system_tokens": list(plan.system),
        "callers_at_once": list(plan.callers),
        "question_tokens": plan.n_question,
        "lens": plan.lens,
        "pool": plan.pool,
        "seed": options.seed or 0,
        "threads": options.threads or default_threads(),
        "ctx": options.ctx,
        "kv_type": options.kv_type,
        "adapter_type": options.adapter_type,
        "flash_attn": options.engine["flash_attn"],
        "gpu_layers": options.gpu_layers,
        "strategy": options.strategy or loaded.fusion_defaults.get("strategy"),
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
    from qaflora_edge.formats.adapter_gguf import read_adapter_gguf

    info = read_adapter_gguf(path)
    return {
        "name": name,
        "rank": info.rank,
        "alpha": info.alpha,
        "targets": list(info.targets),
        "types": sorted({tensor.ggml_type.name for tensor in info.tensors.values()}),
        "size_bytes": path.stat().st_size,
    }
