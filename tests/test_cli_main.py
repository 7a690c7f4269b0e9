"""The command as a whole: help, exit codes, streams, signals, and what is imported when."""

import json
import os
import re
import subprocess
import sys

import click
import numpy as np
import pytest
import tiny
from bundles import qaflora, said_by
from patience import PATIENCE_S, python

from qaflora_edge import __version__
from qaflora_edge.cli import VERBS, main

QAFLORA = [sys.executable, "-m", "qaflora_edge"]


def commands() -> dict[str, click.Command]:
    """Every command by the words that name it."""
    found: dict[str, click.Command] = {}
    context = click.Context(main)
    for verb in VERBS:
        command = main.get_command(context, verb)
        assert command is not None
        found[verb] = command
        if isinstance(command, click.Group):
            found |= {f"{verb} {name}": sub for name, sub in command.commands.items()}
    return found


COMMANDS = commands()


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_help_has_sentences_an_example_and_exit_codes_and_fits_a_terminal(words) -> None:
    result = qaflora(*words.split(), "--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    # Examples are to be copied, and so are not wrapped.
    assert [line for line in lines if len(line) > 80 and not line.startswith("    ")] == []
    assert not words or lines[2].rstrip().endswith(".")
    if words not in ("", "bundle"):
        assert f"Example:\n    qaflora {words}" in result.stdout
        assert "\n  Exit codes: 0 done, 1 failed" in result.stdout


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_and_argument_is_explained(words) -> None:
    """DIR is explained by `qaflora --help`, for it is the same everywhere."""
    params = COMMANDS[words].get_params(click.Context(main))
    texts = [param.help or "" for param in params if isinstance(param, click.Option)]
    for text in texts:
        sentence = text.partition("  [")[0]
        assert sentence.endswith("."), (words, text)
        assert not sentence[0].islower(), (words, text)
    said = " ".join([*(COMMANDS[words].help or "").split(), *texts])
    for param in params:
        if isinstance(param, click.Argument):
            name = (param.metavar or param.name or "").upper().strip("[].")
            assert name == "DIR" or name in said, (words, name)


def test_similar_commands_are_offered() -> None:
    for words, near in ((["rnu"], "'run'"), (["bundle", "shwo"], "'show'")):
        assert re.search(f"(?i)did you mean {near}", said_by(qaflora(*words), 2))
    assert "mean" not in qaflora("zzzz").stderr


@pytest.mark.parametrize("verb", VERBS)
def test_listed_line_is_the_first_of_the_help(verb) -> None:
    assert (COMMANDS[verb].help or "").splitlines()[0] == VERBS[verb]
    width = max(map(len, VERBS))
    name = {"list": "list, ls", "remove": "remove, rm"}.get(verb, verb)
    assert f"  {name:<{width}}  {VERBS[verb]}\n" in qaflora("--help").stdout


def test_help_shows_what_is_usual_and_help_all_the_rest() -> None:
    short, whole = (  # a process of its own knows no strategies of other tests
        subprocess.run([*QAFLORA, "run", each], capture_output=True, text=True).stdout
        for each in ("-h", "--help-all")
    )
    sections = ["Prompt", "Answer", "Mix", "Model"]
    assert re.findall(r"^(\w+):$", short, re.M) == sections
    assert re.findall(r"^(\w+):$", whole, re.M) == [*sections, "Advanced"]
    assert len(short.splitlines()) <= 45
    assert all(each in whole and each not in short for each in ("--top-k", "power=P"))
    for flags in ("-s, --system", "-f, --file", "-n, --max-tokens", "-c, --ctx", "-t, --threads"):
        assert f"  {flags} " in short
    assert "--help-all" not in qaflora("convert", "-h").stdout


def test_version() -> None:
    result = qaflora("--version")
    assert (result.exit_code, result.stdout) == (0, f"qaflora, version {__version__}\n")


def test_an_unknown_name_is_told_what_is_accepted_and_the_nearest() -> None:
    stderr = said_by(qaflora("run", "smollm2-135m-instrukt", "hi"), 1)
    assert "expected the folder of a bundle, the .gguf of a base, or a name" in stderr
    assert stderr.endswith("Did you mean smollm2-135m-instruct?\n")


def test_the_nearest_name_may_be_a_bundle_of_the_working_folder(made, monkeypatch) -> None:
    monkeypatch.chdir(made.folder.parent)
    name = made.folder.name
    said = said_by(qaflora("run", f"{name[:-1]}{name[-1]}{name[-1]}", "hi"), 1)
    assert said.endswith(f"Did you mean {name}?\n")


def test_a_prompt_without_quotes_is_told() -> None:
    stderr = said_by(qaflora("run", "DIR", "how", "are", "you"), 2)
    assert 'quote a prompt of several words: "how are you".' in stderr


LOADED = """
import json, sys
from click.testing import CliRunner
from qaflora_edge.cli import main
assert CliRunner().invoke(main, sys.argv[1:]).exit_code == 0
names = ("numpy", "gguf.gguf_writer", "llama_cpp", "huggingface_hub", "jinja2", "matplotlib")
print(json.dumps([name for name in names if name in sys.modules]))
"""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(words) -> None:
    result = python("-c", LOADED, *words)
    assert (result.stderr, json.loads(result.stdout)) == ("", [])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and pipes are POSIX ones")
def test_reader_that_leaves_is_no_failure(made) -> None:
    command = [*QAFLORA, "run", str(made.folder), "the thing", "--max-tokens", "400"]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=PATIENCE_S), errors) == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="a shell closes a stream")
def test_an_answer_that_cannot_be_written_is_no_success() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *QAFLORA, "models"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    expected = "Error: Cannot write the output: stdout is closed. Open it, as with `> FILE`.\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b.gguf"),
         "Cannot use a/b.gguf: No such file or directory. Check that it is there, that you may use "
         "it, and that no other program changes it; try again."),
        (MemoryError(), "There is not enough memory for this. Close other programs, or take a "
         "smaller base, fewer adapters or a smaller --ctx."),
    ],
)  # fmt: skip
def test_what_no_file_reports_itself_is_no_traceback(error, message, monkeypatch) -> None:
    """A file that goes between two looks at it, and memory that is not there."""
    from qaflora_edge.formats import names as registry

    def fail() -> None:
        raise error

    monkeypatch.setattr(registry, "load_registry", fail)
    done = qaflora("models")
    assert (done.exit_code, done.stderr) == (1, f"Error: {message}\n")


STOPPED_WHILE_ANSWERING = """
import os, signal, sys
from qaflora_edge.answering.generation import Generation
from qaflora_edge.cli import main

next_piece = Generation.__next__
count = 0

def interrupted(self):
    global count
    count += 1
    if count == 4:
        signal.raise_signal(signal.SIGINT)
    return next_piece(self)

Generation.__next__ = interrupted
main(sys.argv[1:])
"""


def test_interrupt_is_130(made) -> None:
    args = ("run", made.folder, "the thing", "--max-tokens", 400)
    result = python("-c", STOPPED_WHILE_ANSWERING, *args)
    assert result.returncode == 130
    assert result.stdout.endswith("\n")
    assert "Traceback" not in result.stderr


def test_names_in_a_file_cannot_command_the_terminal(made, tmp_path) -> None:
    peft = tiny.write_tiny_peft(tmp_path / "peft", made.base)
    name = "x\x1b]0;title\x07\u202e\n.weight"
    tensors = {name: np.ones((2, 2), dtype=np.float32)}
    tiny.write_safetensors(peft / "adapter_model.safetensors", tensors)
    args = ["convert", str(peft), "--base", str(made.base.path), "-o", str(tmp_path / "a.gguf")]
    result = qaflora(*args)
    assert result.exit_code == 1
    assert "x\\x1b]0;title\\x07\\u202e .weight" in result.stderr
    assert all(char.isprintable() for char in result.stderr.rstrip("\n"))
