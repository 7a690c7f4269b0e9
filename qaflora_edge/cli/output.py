"""What commands write: answers, as they come or as JSON, and on stderr how far work is.

Progress is a bar or a spinner on a terminal; elsewhere it is lines, where they are wanted.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

from qaflora_edge.errors import IncompleteAnswerError
from qaflora_edge.formats.inputs import Json
from qaflora_edge.progress import Tell, silent
from qaflora_edge.show import can_show, doubts, visible, who_spoke

if TYPE_CHECKING:
    from rich.status import Status

    from qaflora_edge.answering.generation import Generation

PROMPT_WORK = {"weighing": "Weighing the adapters", "reading": "Reading the prompt"}
_LINES_S = 4.0  # between lines, where nothing can be taken back
_N_SHOWN = 60  # characters of an answer that fit a line


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
    phrases = [who_spoke(answer.fusion), *doubts(answer.fusion), f"probe {timings.probe_ms:.0f} ms"]
    if answer.n_draft:
        phrases.append(f"draft {answer.n_draft} tokens")
    phrases.append(f"prefill {timings.prefill_ms:.0f} ms")
    tokens = f"{answer.n_completion} tokens"
    if timings.n_decoded:  # none where the draft is the answer
        tokens += f" at {timings.tokens_per_second:.1f} tok/s"
    phrases.append(tokens)
    phrases += thought_parts(answer)
    if answer.finish_reason == "length":
        phrases.append("cut at the limit of tokens")
    return f"[{'; '.join(phrases)}]"


def is_shown() -> bool:
    """Tell whether stderr is a terminal that can take back what it shows."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress_bars(*, or_lines: bool = False) -> Iterator[Tell]:
    """Give a function that draws a bar for each thing it is told of.

    or_lines  off a terminal, say every few seconds how far it is; else nothing
    """
    if not is_shown():
        with _lines() if or_lines else nullcontext(silent) as tell:
            yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=max(1, total))

        yield tell


@contextmanager
def _lines() -> Iterator[Tell]:
    """Give a function whose last words are said every few seconds, also while it is not called."""
    last = ""
    is_over = threading.Event()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        last = f"{what}: {done} of {total}"

    def repeat() -> None:
        begun_s = time.monotonic()
        while not is_over.wait(_LINES_S):
            if last:
                click.echo(f"{last}, after {time.monotonic() - begun_s:.0f} s", err=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        is_over.set()
        thread.join()


class Waiting:
    """Show a line while something takes long, and what is told of it meanwhile."""

    def __init__(self, status: "Status | None" = None) -> None:
        self._status = status

    def tell(self, now: str, done: int, total: int) -> None:
        """Say how far work is, as on_progress of Engine.generate does."""
        label = PROMPT_WORK.get(now, now)
        self._show(f"{label} {100 * done // max(1, total)} %", "")

    def expected(self, text: str) -> None:
        """Show the end of an answer of which nothing is decided yet, as on_draft has it."""
        line = visible(" ".join(text.split()))
        self._show(line[-_N_SHOWN:], "dim")

    def _show(self, line: str, style: str) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(line, style))


@contextmanager
def waiting(what: str) -> Iterator[Waiting]:
    """Show a line while the block takes long, and take it back after."""
    if not is_shown():
        yield Waiting()
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(what)) as status:
        yield Waiting(status)
