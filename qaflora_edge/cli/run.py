"""qaflora run"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qaflora_edge.ask import Ask, Weighing
from qaflora_edge.cli import options as cli
from qaflora_edge.cli.output import (
    answer_dict,
    incomplete,
    print_json,
    stream_answer,
    summary_line,
    waiting,
)
from qaflora_edge.cli.prompts import read_message, read_piped, read_text

if TYPE_CHECKING:
    from qaflora_edge.inference.constraint import Grammar


def _one_prompt(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> str | None:
    if len(words) > 1:
        raise click.BadParameter(f'quote a prompt of several words: "{" ".join(words)}".')
    return words[0] if words else None


@cli.command(
    'qaflora run demo "What is the capital of France, and which river flows through it?"',
    'git diff | qaflora run demo "What does this change?"',
    "qaflora run demo --prompts questions.jsonl -o answers.jsonl",
    sections={"file": "Prompt", "prompts_path": "Prompt"}
    | dict.fromkeys(("as_json", "schema_path", "grammar_path", "no_draft", "out"), "Answer"),
)
@click.argument("bundle", **cli.BUNDLE)
@click.argument("prompt", nargs=-1, metavar="[PROMPT]", callback=_one_prompt)
@cli.own_options
@cli.shared_options
@click.option(
    "-f", "--file", metavar="FILE", help="Put the text of FILE after PROMPT; `-` is stdin."
)
@click.option(
    "--prompts",
    "prompts_path",
    metavar="FILE",
    help="Answer each line of FILE; `-` is stdin. Lines are JSON objects with "
    '"prompt" or "messages", and options of their own, 8 at a time unless --parallel says. Each '
    "answer is an object with `index`, the number of its line from 0, and for a line that failed "
    "`error`; the others go on, and the exit code is 1.",
)
@click.option(
    "-o",
    "--out",
    help="Write the answers to --prompts into FILE. Run again, it resumes.",
    **cli.out_file(),
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object at the end. With --prompts, give the weights of every layer.",
)
@click.option(
    "--json-schema",
    "schema_path",
    metavar="FILE",
    help="Answer in JSON that fits the JSON schema in FILE. An answer that the limit cuts is "
    "printed, and the exit code is 1.",
)
@click.option(
    "--grammar",
    "grammar_path",
    metavar="FILE",
    help="Answer under the grammar in FILE, in GBNF. That is llama.cpp's notation.",
)
@click.option(
    "--no-draft",
    is_flag=True,
    help="Answer under them at once, with no draft.",
)
def run(
    bundle: str,
    prompt: str | None,
    file: str | None,
    prompts_path: str | None,
    out: Path | None,
    system: str | None,
    as_json: bool,
    schema_path: str | None,
    grammar_path: str | None,
    no_draft: bool,
    options: cli.SharedOptions,
) -> None:
    """Answer a prompt with the weighed adapters.

    The answer goes to stdout as it is generated, everything else to stderr. PROMPT `-` reads
    stdin; a pipe's text follows a PROMPT. Without one a terminal opens `qaflora chat`.
    """
    if schema_path is not None and grammar_path is not None:
        raise click.UsageError("Give --json-schema or --grammar, not both.")
    stop_source = click.get_current_context().get_parameter_source("stop")
    if schema_path is not None and stop_source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--stop would cut the JSON of --json-schema.")
    if system is not None and options.raw_prompt:
        raise click.UsageError("--system needs the chat template, which --raw-prompt leaves out.")
    is_asked = prompts_path is not None or "-" in (prompt, file, schema_path, grammar_path)
    piped = "" if is_asked else read_piped()
    is_nothing_asked = prompt is None and file is None and not piped
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_nothing_asked and prompts_path is None and is_terminal:
        return _chat()
    if is_nothing_asked == (prompts_path is None):
        raise click.UsageError("Give PROMPT, -f FILE or text on stdin, or else --prompts FILE.")
    if out is not None and prompts_path is None:
        raise click.UsageError("-o is for the answers to --prompts FILE.")
    if [prompt, file, prompts_path, schema_path, grammar_path].count("-") > 1:
        raise click.UsageError("stdin (`-`) can be read only once.")
    texts = [] if prompt is None else [cli.read_prompt(prompt)]
    texts += [] if file is None else [cli.check_prompt(read_message(file))]
    text = "\n\n".join([*texts, piped] if piped else texts)
    sampling = replace(options.sampling, grammar=_read_grammar(schema_path, grammar_path))
    if schema_path is not None:
        sampling = replace(sampling, stop=())  # one out of the settings is meant for prose
    if prompts_path is not None:
        from qaflora_edge.cli.batch import answer_file

        answer_file(bundle, prompts_path, out, options, sampling, system, as_json, no_draft)
    weighing = Weighing(drafts=False if no_draft else None)
    ask = Ask(cli.question(text, options, system), weighing, sampling)
    with cli.open_engine(bundle, options) as engine:
        with waiting("Weighing the adapters, then prefill") as line:
            ask = replace(ask, on_progress=line.tell, on_draft=line.expected)
            answer = engine.submit(ask)
        if as_json:
            with waiting("Answering"):
                facts = answer_dict(answer)
            print_json(facts)
        else:
            stream_answer(answer)
            click.echo(summary_line(answer), err=True)
    if not answer.is_whole:
        raise incomplete(answer)


def _chat() -> None:
    """Open `qaflora chat` with the arguments of this command. Raises UsageError as it does."""
    from qaflora_edge.cli.settings import file_defaults

    root = click.get_current_context().find_root()
    arguments = click.get_current_context().meta[cli.ARGUMENTS]
    assert isinstance(root.command, click.Group)
    chat = root.command.get_command(root, "chat")
    assert chat is not None
    root.default_map = {"chat": file_defaults("chat")}
    with chat.make_context("chat", list(arguments), parent=root) as ctx:
        chat.invoke(ctx)


def _read_grammar(schema_path: str | None, grammar_path: str | None) -> "Grammar | None":
    if grammar_path is None and schema_path is None:
        return None
    from qaflora_edge.errors import GrammarError
    from qaflora_edge.formats.inputs import read_json_object
    from qaflora_edge.inference.constraint import gbnf_grammar, schema_grammar

    if grammar_path is not None:
        return gbnf_grammar(read_text(grammar_path), source=f"The grammar {grammar_path}")
    assert schema_path is not None
    data = read_text(schema_path).encode("utf-8")
    try:
        schema = read_json_object(data)
    except ValueError as error:
        raise GrammarError(
            f"Cannot read the JSON schema {schema_path}: {error}. Expected a JSON object, such as "
            '{"type": "object"}; correct the file.'
        ) from error
    return schema_grammar(schema, source=f"The JSON schema {schema_path}")
