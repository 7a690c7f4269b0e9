"""qaflora bench"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import SharedOptions, bundle_folder, example, shared_options
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.errors import OptionError

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine

DECODE_TOKENS, PROMPT_TOKENS, REPEAT = 64, 128, 5


@click.command(
    epilog=example(
        """
        qaflora bench models/demo
        qaflora bench models/demo --repeat 9 --prompt-tokens 256 --json
        """
    )
)
@click.argument("bundle", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
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
    default=PROMPT_TOKENS,
    show_default=True,
    help="Tokens of the prompt.",
)
@shared_options
def bench(
    bundle: str, as_json: bool, repeat: int, prompt_tokens: int, options: SharedOptions
) -> None:
    """Measure speed on this machine.

    Three engines run the same prompt in turn: the base alone, with the first adapter, and with all
    adapters fused at equal weights. Decoding is greedy, --max-tokens long (64 by default) or
    shorter where the base ends its answer. The probe is timed apart: the pass that reads the
    states, and the rest (projection through the head, divergences).
    """
    n_decode = DECODE_TOKENS if options.max_tokens is None else options.max_tokens
    if options.ctx < prompt_tokens + n_decode:
        raise OptionError(
            f"Option --ctx is {options.ctx}, expected at least {prompt_tokens + n_decode}: "
            f"{prompt_tokens} tokens of prompt and {n_decode} of answer. Raise --ctx, or lower "
            "--prompt-tokens or --max-tokens."
        )
    with contextlib.ExitStack() as stack:
        engines = _engines(bundle, options, stack)
        fused = engines["fused"]
        tokens = _prompt(fused, prompt_tokens)
        steps: list[tuple[str, Callable[[], Mapping[str, float]]]] = [
            (name, _answer_step(engine, tokens, n_decode)) for name, engine in engines.items()
        ]
        if fused.adapters:
            steps.append(("probe", _probe_step(fused, tokens, options.strategy)))
        measured = _measure(steps, repeat)
        result: dict[str, Any] = {
            "base": fused.name,
            "adapters": list(fused.adapters),
            "prompt_tokens": prompt_tokens,
            "max_tokens": n_decode,
            "repeat": repeat,
            "threads": options.threads or _default_threads(),
            "medians": {name: _medians(runs) for name, runs in measured.items()},
        }
    click.echo(json.dumps(result) if as_json else _lines(result))


def _engines(bundle: str, options: SharedOptions, stack: contextlib.ExitStack) -> dict[str, Engine]:
    from qaflora_edge.bundle import load_bundle
    from qaflora_edge.engine import Engine

    loaded = load_bundle(bundle_folder(bundle))
    paths = loaded.adapter_paths
    sets = {"base": {}, "single": dict(list(paths.items())[:1])} if paths else {}
    engines = {
        name: stack.enter_context(
            Engine(base=loaded.base_path, adapters=adapters, strategy="static", **options.engine)
        )
        for name, adapters in sets.items()
    }
    # The fused one is opened as a bundle: the probe may be asked for the calibrated strategy.
    engines["fused"] = stack.enter_context(
        Engine(loaded.folder, strategy=options.strategy, **options.engine)
    )
    return engines


def _prompt(engine: Engine, n_token: int) -> list[int]:
    """Everyday text in many languages, cut or repeated to a number of tokens."""
    from qaflora_edge.neutral import neutral_prompts

    # A character makes at most four tokens, and a prompt must fit the context.
    text = "\n".join(neutral_prompts())[: max(1, (engine.n_ctx - 1) // 4)]
    tokens = engine.tokenize(text)
    while len(tokens) < n_token:
        tokens += tokens
    return tokens[:n_token]


def _answer_step(
    engine: Engine, tokens: Sequence[int], n_decode: int
) -> Callable[[], Mapping[str, float]]:
    def step() -> Mapping[str, float]:
        # Weights given: what is timed here is reading and answering, not weighing.
        answer = engine.generate(tokens, weights="static", max_tokens=n_decode)
        answer.text()
        timings = answer.timings
        return {
            "prefill_ms": timings.prefill_ms,
            "prefill_tokens_per_second": 1e3 * len(tokens) / timings.prefill_ms,
            "decode_ms": timings.decode_ms,
            "decode_tokens": timings.n_decoded,
            "decode_tokens_per_second": timings.tokens_per_second,
        }

    return step


def _probe_step(
    engine: Engine, tokens: Sequence[int], strategy: str | None
) -> Callable[[], Mapping[str, float]]:
    def step() -> Mapping[str, float]:
        engine.hidden_states(tokens[:-1])  # an Engine keeps the states of its last query
        probe_ms = engine.weights(tokens, strategy=strategy).probe_ms
        engine.hidden_states(tokens[:-1])
        start = time.perf_counter()
        engine.hidden_states(tokens)  # the same pass as the probe's, and nothing after it
        states_ms = 1e3 * (time.perf_counter() - start)
        return {
            "probe_ms": probe_ms,
            "states_ms": states_ms,
            "rest_ms": max(0.0, probe_ms - states_ms),
        }

    return step


def _measure(
    steps: Sequence[tuple[str, Callable[[], Mapping[str, float]]]], repeat: int
) -> dict[str, list[Mapping[str, float]]]:
    """Run all steps in turn, `repeat` times, after one round that is thrown away."""
    measured: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    with progress_bars() as tell:
        for index in range(1 + repeat):
            for name, step in steps:
                run = step()
                if index:
                    measured[name].append(run)
            if tell is not None:
                tell("runs", index + 1, 1 + repeat)
    return measured


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def _default_threads() -> int:
    from qaflora_edge.runtime import default_threads

    return default_threads()


def _lines(result: Mapping[str, Any]) -> str:
    medians = result["medians"]
    lines = [
        f"{result['base']}; adapters: {', '.join(result['adapters']) or 'none'}",
        f"{result['prompt_tokens']} tokens of prompt, {result['threads']} threads, "
        f"medians of {result['repeat']} interleaved runs",
        "",
        f"{'':<22}  decode tok/s  of base  tokens  prefill tok/s",
    ]
    labels = {
        "base": "base",
        "single": f"one adapter ({result['adapters'][0]})" if result["adapters"] else "",
        "fused": f"{len(result['adapters'])} adapters fused",
    }
    base = medians.get("base", medians["fused"])["decode_tokens_per_second"]
    for name, label in labels.items():
        if name not in medians:
            continue
        row = medians[name]
        ratio = row["decode_tokens_per_second"] / base if base else 0.0
        lines.append(
            f"{label:<22}  {row['decode_tokens_per_second']:12.1f}  {ratio:7.2f}  "
            f"{row['decode_tokens']:6.0f}  {row['prefill_tokens_per_second']:13.1f}"
        )
    if "probe" in medians:
        probe = medians["probe"]
        lines += [
            "",
            f"probe {probe['probe_ms']:.1f} ms: states {probe['states_ms']:.1f} ms, "
            f"rest {probe['rest_ms']:.1f} ms",
        ]
    return "\n".join(lines)
