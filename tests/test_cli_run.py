"""qaflora run"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from bundles import TinyBundle, make_bundle, qaflora, said_by
from click.testing import Result
from tmux import on_a_terminal

from qaflora_edge import Engine
from qaflora_edge import hub as hub_cache
from qaflora_edge.formats import names as registry

PROMPT = "the thing on a ring"
QAFLORA = [sys.executable, "-m", "qaflora_edge"]


def run(folder: object, *args: object, stdin: str | None = None) -> Result:
    return qaflora("run", folder, *args, stdin=stdin)


def answer(made: TinyBundle, prompt: str | None = None, **options: object) -> str:
    with Engine(made.folder) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": PROMPT}])
        return engine.generate(prompt or tokens, **options).text()  # type: ignore[arg-type]


def test_answer_on_stdout_the_rest_on_stderr(made) -> None:
    result = run(made.folder, PROMPT, "--max-tokens", 8)
    assert result.exit_code == 0
    assert result.stdout == answer(made, max_tokens=8) + "\n"
    assert re.match(r"\[\w+ ×[\d.]+ · \w+ ×[\d.]+; probe \d+ ms; prefill \d+ ms; ", result.stderr)
    assert "8 tokens at" in result.stderr
    assert result.stderr.endswith("cut at the limit of tokens]\n")


def test_json_is_the_contract(made) -> None:
    result = run(made.folder, PROMPT, "--max-tokens", 8, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    with Engine(made.folder) as engine:
        n_prompt = len(engine.chat_tokens([{"role": "user", "content": PROMPT}]))
    assert shown["text"] == answer(made, max_tokens=8)
    assert shown["finish_reason"] == "length"
    assert shown["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 8}
    assert shown["fusion"]["adapters"] == ["math", "es"]
    assert shown["fusion"]["prompt_tokens"] == n_prompt
    times = ["probe_ms", "prefill_ms", "decode_ms", "tokens_per_second"]
    assert list(shown["timings"]) == [*times, "guessed_n", "guessed_n_right"]
    assert min(shown["timings"][name] for name in times) > 0
    assert set(shown) == {"text", "finish_reason", "usage", "fusion", "timings"}


def test_base_without_template_needs_raw_prompt(tmp_path) -> None:
    made = make_bundle(tmp_path, chat_template=None)
    assert said_by(run(made.folder, PROMPT, "--max-tokens", 4), 1) == (
        "Error: The base base.gguf has no chat template (tokenizer.chat_template is missing); "
        "give the prompt as plain text (--raw-prompt), or use an instruct model.\n"
    )
    assert run(made.folder, PROMPT, "--max-tokens", 4, "--raw-prompt").exit_code == 0


@pytest.mark.parametrize(
    ("kind", "name"), [("bundle", "owner/name"), ("base", "smollm2-135m-instruct")]
)
def test_dir_may_be_the_name_of_what_was_pulled(made, monkeypatch, kind, name) -> None:
    pulled: dict[str, Path] = {}
    monkeypatch.setattr(hub_cache, "pulled_path", pulled.get)
    monkeypatch.setattr(registry, "local_path", lambda model: pulled.get(model.name))
    missing = run(name, PROMPT)
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == (
        f"Error: Cannot open the {kind} {name}: there is no such folder, and it was not pulled. "
        f"Fetch it with `qaflora pull {name}`, or give the folder of a bundle.\n"
    )
    pulled[name] = made.folder if kind == "bundle" else made.base.path
    assert run(name, PROMPT, "--max-tokens", 2).exit_code == 0


def test_dir_may_be_a_base(made, monkeypatch) -> None:
    alone = answer(made, max_tokens=8, weights="base")
    result = run(made.base.path, PROMPT, "--max-tokens", 8)
    assert (result.exit_code, result.stdout) == (0, f"{alone}\n"), result.stderr
    assert result.stderr.startswith("[base;")
    with Engine(made.base.path) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": PROMPT}])
        assert engine.adapters == ()
        assert engine.generate(tokens, max_tokens=8).text() == alone


@pytest.mark.parametrize(
    ("verb", "args", "stdin", "shown"),
    [
        ("chat", ["--plain", "--max-tokens", "4"], "a thing\n/save {place}/s.json\n", ""),
        ("weights", [PROMPT], "", "There are no adapters: the base answers alone.\n"),
        ("compare", [PROMPT, "--max-tokens", "4"], "", "base"),
        ("run", ["--prompts", "-", "--max-tokens", "4"], '{"prompt": "a"}', '"index"'),
    ],
)
def test_other_commands_take_a_base(verb, args, stdin, shown, made, tmp_path) -> None:
    stdin = stdin.replace("{place}", str(tmp_path))
    result = qaflora(verb, made.base.path, *args, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert shown in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("printf 'doc\\n' | {run} x", "x\n\ndoc"),
        ("printf 'doc' | {run}", "doc"),
        ("{run} x < doc.txt", "x\n\ndoc"),
        ("{run} x -f doc.txt", "x\n\ndoc"),
        ("{run} --file - < doc.txt", "doc"),
        ("printf -- '-' | {run} -", "-"),
        ("{run} x < /dev/null", "x"),
        ("while read line; do {run} $line; done < doc.txt", "doc"),
    ],
)
def test_what_is_piped_stands_behind_the_prompt(command, asked, made, tmp_path) -> None:
    (tmp_path / "doc.txt").write_text("doc\n")
    run = shlex.join([*QAFLORA, "run", str(made.folder)])
    shell = command.replace("{run}", f"{run} --max-tokens 1 --json")
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    with Engine(made.folder) as engine:
        expected = len(engine.chat_tokens([{"role": "user", "content": asked}]))
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == expected, done.stderr


SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "kind": {"enum": ["ring", "thing"]}},
    "required": ["on", "kind"],
    "additionalProperties": False,
}


def test_a_stop_out_of_the_settings_cuts_no_json(made, tmp_path, config) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    config.write_text('stop = ["\\"", "{"]\n')
    result = run(made.folder, PROMPT, "--json-schema", path)
    assert result.exit_code == 0
    jsonschema.validate(json.loads(result.stdout), SCHEMA)
    assert run(made.folder, PROMPT, "--json-schema", path, "--stop", "x").exit_code == 2


def test_answer_cut_before_its_grammar_ends_is_a_failure(made, tmp_path) -> None:
    grammar = tmp_path / "date.gbnf"
    grammar.write_text('root ::= [0-9]{4} "-" [0-9]{2}\n')
    cut = run(made.folder, PROMPT, "--grammar", grammar, "--max-tokens", 5)
    assert cut.exit_code == 1
    assert re.fullmatch(r"\d{4}-\n", cut.stdout)
    assert cut.stderr.splitlines()[-1] == (
        "Error: The answer is not whole: cut after 5 tokens, where its schema or grammar expects "
        "more. Raise --max-tokens, and --ctx where the context is full, or allow only shorter "
        "answers."
    )
    as_json = run(made.folder, PROMPT, "--grammar", grammar, "--max-tokens", 5, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("option", "text", "wrong"),
    [
        ("--grammar", 'root ::= "a', "The grammar {path} cannot be read: Unexpected end"),
        ("--json-schema", '{"type": "x"}', "The JSON schema {path} cannot be followed: Invalid"),
        ("--json-schema", "[]", "Cannot read the JSON schema {path}: it holds a list, not an obj"),
    ],
)
def test_bad_grammar_is_named_before_the_model_is_loaded(option, text, wrong, tmp_path) -> None:
    path = tmp_path / "grammar"
    path.write_text(text)
    stderr = said_by(run(tmp_path / "no-bundle", PROMPT, option, path), 1)
    assert wrong.format(path=path) in stderr
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-", "--json-schema", "-"], "stdin (`-`) can be read only once."),
        ([PROMPT, "--json-schema", "a", "--grammar", "b"], "Give --json-schema or --grammar, not"),
        ([PROMPT, "--json-schema", "a", "--stop", "}"], "--stop would cut the JSON of --json-"),
        ([PROMPT, "--system", "a", "--raw-prompt"], "--system needs the chat template, which"),
    ],
)
def test_wrong_usage_is_2(args, message, tmp_path) -> None:
    assert message in said_by(run(tmp_path / "no-bundle", *args), 2)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX ones")
def test_answer_moves_no_cursor_of_a_terminal(made, tmp_path) -> None:
    path = tmp_path / "escape.gbnf"
    path.write_text('root ::= "a\\x1b[2Jb\\x07"\n')
    command = [*QAFLORA, "run", str(made.folder), "x", "--no-draft", "--grammar", str(path)]
    assert on_a_terminal(command, TERM="dumb").startswith(b"a?[2Jb?\r\n[")
    piped = subprocess.run(command, capture_output=True)
    assert piped.stdout == b"a\x1b[2Jb\x07\n"
