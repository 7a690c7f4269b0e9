"""qaflora run"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import (
    BUNDLE,
    SharedOptions,
    example,
    open_engine,
    prompt_tokens,
    read_prompt,
    shared_options,
)

if TYPE_CHECKING:
    from qaflora_edge.generate import Generation

MAX_TOKENS = 512


@click.command(
    epilog=example(
        """
        qaflora run models/demo "A shirt costs 12 dollars. What do seven shirts cost?"
        qaflora run models/demo "¿Qué es un río?" --strategy calibrated --json
        """
    )
)
@click.argument("bundle", **BUNDLE)
@click.argument("prompt")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@shared_options
def run(bundle: str, prompt: str, as_json: bool, options: SharedOptions) -> None:
    """Answer a prompt with the weighed adapters.

    The answer goes to stdout as it is generated, everything else to stderr. PROMPT `-` reads
    stdin. Greedy unless --temp is given; at most 512 tokens unless --max-tokens says otherwise.
    """
    text = read_prompt(prompt)
    sampling = options.sampling(max_tokens=MAX_TOKENS, temperature=0.0, top_p=1.0)
    with open_engine(bundle, options) as engine:
        answer = engine.generate(prompt_tokens(engine, text, options), **sampling)
        if as_json:
            click.echo(json.dumps(answer_dict(answer), ensure_ascii=False))
            return
        stream_answer(answer)
        click.echo(summary_line(answer), err=True)


def stream_answer(answer: Generation) -> None:
    """Write an answer to stdout piece by piece, and end its line however it ends."""
    try:
        for piece in answer:
            click.echo(piece, nl=False)
    finally:
        click.echo()


def answer_dict(answer: Generation) -> dict[str, Any]:
    """The object that `qaflora run --json` prints; takes the whole answer first."""
    text = answer.text()
    return {
        "text": text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.n_prompt,
            "completion_tokens": answer.n_completion,
        },
        "fusion": answer.fusion.to_dict(),
        "timings": answer.timings.to_dict(),
    }


def summary_line(answer: Generation) -> str:
    """Mix, times and the reason of the end, in one line."""
    from qaflora_edge.cli.show import mix_line

    timings = answer.timings
    parts = [
        mix_line(answer.fusion),
        f"probe {timings.probe_ms:.0f} ms",
        f"prefill {timings.prefill_ms:.0f} ms",
        f"{answer.n_completion} tokens at {timings.tokens_per_second:.1f} tok/s",
    ]
    if answer.finish_reason == "length":
        parts.append("cut at the limit of tokens")
    return f"[{'; '.join(parts)}]"
