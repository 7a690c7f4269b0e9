"""Answers, printed as they come or as JSON."""

import json
import sys
from typing import TYPE_CHECKING

import click

from qaflora_edge.errors import IncompleteAnswerError
from qaflora_edge.formats.inputs import Json
from qaflora_edge.show import can_show, doubts, visible, who_spoke

if TYPE_CHECKING:
    from qaflora_edge.answering.generation import Generation


def say(text: str) -> None:
    """Tell the user something on stderr, which no pipe takes for an answer."""
    click.echo(text, err=True)


def stream_answer(answer: "Generation") -> None:
    """Write an answer to stdout piece by piece, and end its line however it ends.

    A terminal gets none of its control characters; a pipe or a file gets it as it is. A relay's
    draft and the thought go to stderr, dimmed, where that is a terminal.
    """
    is_terminal = sys.stdout.isatty()
    is_shown = sys.stderr.isatty()
    try:
        for piece in answer.drafting():
            if is_shown:
                click.secho(visible(piece), nl=False, err=True, dim=True)
        if answer.draft is not None and is_shown:
            click.echo(err=True)
        for thought in answer.thoughts():
            if is_shown:
                click.secho(visible(thought), nl=False, err=True, dim=True)
        if answer.reasoning and is_shown:
            click.echo("\n", err=True)
        for piece in answer:
            click.echo(visible(piece) if is_terminal else piece, nl=False)
    finally:
        click.echo()


def print_json(value: object) -> None:
    """Print JSON on one line; escaped where the output's encoding lacks a character."""
    text = json.dumps(value, ensure_ascii=False)
    click.echo(text if can_show(text, sys.stdout.encoding) else json.dumps(value))


def answer_dict(answer: "Generation", *, with_fusion: bool = True) -> Json:
    """The object that `qaflora run --json` prints; takes the whole answer first."""
    facts: Json = {"text": answer.text()}
    usage = {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_draft + answer.n_completion,
    }
    if answer.reasoning:
        facts["reasoning_content"] = answer.reasoning
        usage["reasoning_tokens"] = answer.n_thought
    facts["finish_reason"] = answer.finish_reason
    facts["usage"] = usage
    if with_fusion:
        facts["fusion"] = answer.fusion.to_dict()
    facts["timings"] = answer.timings.to_dict()
    return facts


def incomplete(answer: "Generation") -> IncompleteAnswerError:
    return IncompleteAnswerError(
        f"The answer is not whole: cut after {answer.n_completion} tokens, where its schema or "
        "grammar expects more. Raise --max-tokens, and --ctx where the context is full, or allow "
        "only shorter answers."
    )


def thought_parts(answer: "Generation") -> list[str]:
    """Say how long the thought was, and what to do where it left no room for an answer."""
    is_all = answer.finish_reason == "length" and answer.n_thought == answer.n_completion
    more = ", no answer: raise --max-tokens, or give --reasoning-budget" if is_all else ""
    return [f"{answer.n_thought} tokens of thought{more}"] if answer.n_thought else []


def summary_line(answer: "Generation") -> str:
    """Mix, times and the reason of the end, in one line."""
    timings = answer.timings
    parts = [who_spoke(answer.fusion), *doubts(answer.fusion), f"probe {timings.probe_ms:.0f} ms"]
    if answer.n_draft:
        parts.append(f"draft {answer.n_draft} tokens")
    parts.append(f"prefill {timings.prefill_ms:.0f} ms")
    tokens = f"{answer.n_completion} tokens"
    if timings.n_decoded:  # none where the draft is the answer
        tokens += f" at {timings.tokens_per_second:.1f} tok/s"
    parts.append(tokens)
    parts += thought_parts(answer)
    if answer.finish_reason == "length":
        parts.append("cut at the limit of tokens")
    return f"[{'; '.join(parts)}]"
