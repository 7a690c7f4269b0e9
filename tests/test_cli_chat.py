"""qaflora chat, driven through a pipe"""

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, qaflora
from click.testing import Result
from patience import python
from rich.console import Console
from rich.markdown import Markdown
from scripted_chat import scripted
from test_cli_main import STOPPED_WHILE_ANSWERING

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.cli.chat.commands import COMMANDS, completions
from qaflora_edge.cli.chat.view import parse_markdown, split_closed
from qaflora_edge.config import in_group
from qaflora_edge.show import visible

REPEAT_PENALTY = in_group("sampling")["repeat_penalty"].defaults["chat"]
GREEDY = ("--temp", "0", "--max-tokens", "6")


def chat(folder: Path, *lines: str | bytes, args: Sequence[str] = GREEDY) -> Result:
    text = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    # One thread: others would wait for each other on a busy machine, and a tiny base needs none.
    result = qaflora("chat", folder, "--threads", 1, *args, stdin=text)
    assert "\x1b" not in result.output
    return result


def answers(folder: Path, *questions: str, system: str | None = None, **options: Any) -> list[str]:
    """What a conversation of these questions is answered, by the Engine alone."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    with Engine(folder, threads=1) as engine:
        for question in questions:
            messages.append({"role": "user", "content": question})
            options = {"max_tokens": 6, "repeat_penalty": REPEAT_PENALTY, **options}
            generation = engine.generate(engine.chat_tokens(messages), **options)
            messages.append({"role": "assistant", "content": generation.text()})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def as_lines(texts: Sequence[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def test_turns_build_on_each_other(made) -> None:
    result = chat(made.folder, "the thing", "", "and then")  # an empty line asks nothing
    assert result.exit_code == 0
    assert result.stdout == as_lines(answers(made.folder, "the thing", "and then"))


def test_the_status_tells_speed_and_mix(made, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "submit", scripted())
    result = chat(made.folder, "the thing", args=())
    status = r"\[9\.0 tok/s; first token \d\.\d\d s; \w+ ×[\d.]+ · \w+ ×[\d.]+\]\n"
    assert re.fullmatch(status, result.stderr), result.stderr
    assert result.stdout == "The thing on a ring is there, and so is another.\n"


def test_oldest_turns_are_dropped_when_the_context_is_full(made, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "submit", scripted("the thing"))
    lines = ["the thing on a ring"] * 4
    result = chat(made.folder, *lines, args=(*GREEDY, "--ctx", "128"))
    assert result.exit_code == 0
    assert "[the context is full: the oldest 2 turns are no longer sent]" in result.stderr
    assert result.stderr.count("tok/s") == 4


def test_too_long_a_line_is_told_and_the_chat_goes_on(made, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "submit", scripted())
    result = chat(made.folder, "hi", "xyz" * 100, "hi", args=(*GREEDY, "--ctx", "96"))
    assert result.exit_code == 0
    assert "Error: The prompt has" in result.stderr
    assert "larger context: /save FILE, then `qaflora chat --load FILE --ctx N`." in result.stderr
    assert result.stderr.count("tok/s") == 2


def test_raw_prompt_chats_without_a_template(tmp_path) -> None:
    made = make_bundle(tmp_path, chat_template=None)
    assert chat(made.folder, "hi").exit_code == 1
    assert chat(made.folder, "hi", args=(*GREEDY, "--raw-prompt")).exit_code == 0


def test_interrupt_ends_the_answer_only(made) -> None:
    words = ("chat", made.folder, "--threads", 1)
    result = python("-c", STOPPED_WHILE_ANSWERING, *words, input="the thing\nand then\n")
    assert result.returncode == 0
    assert result.stderr.count("[stopped; ") == 1
    assert result.stderr.count("tok/s") == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "closed", "rest"),
    [
        ("one\ntwo", [], "one\ntwo"),
        ("one\n\ntwo", ["one"], "two"),
        ("a\n\n\nb\n\nc", ["a", "b"], "c"),
        ("```py\nx\n\ny\n```\n\nend", ["```py\nx\n\ny\n```"], "end"),
        ("```\nx\n\ny", [], "```\nx\n\ny"),
    ],
)
def test_blocks_close_at_a_blank_line_outside_of_code(text, closed, rest) -> None:
    assert split_closed(text) == (closed, rest)


def markdown(text: str) -> str:
    """An answer as it stands on the screen, with single blanks between words."""
    shown = Markdown("")
    shown.parsed = parse_markdown(text)
    console = Console(width=80, file=io.StringIO())
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(
    "text",
    [
        "2*3*4=24",
        "so <<5*6=30>>30 and <<5*6=30>>30",
        r"\(x\) and \[y^2\], \{1,2\}, a \\ b",
        "2**3 and 2**4, (a)**2*(b)**3, |x|*|y|*|z|",
        "def f(*args, **kwargs): __init__ and a_1_b",
        "a[0](1), <tag> <https://example.org/5>",
        "3. three\n5. five\n\n24.",
        "- one\n- two",
    ],
)
def test_markdown_loses_no_digit_and_no_sign(text) -> None:
    assert markdown(text) == " ".join(text.split())


def test_markdown_is_still_markdown() -> None:
    assert markdown("**18** is *it*, `x*y`") == "18 is it, x*y"
    assert "print(1)" in markdown("```python\nprint(1)\n```")
    assert "a b ──── 1 2" in markdown("| a | b |\n|---|---|\n| 1 | 2 |")


def test_weights_shows_the_heatmap_of_the_last_answer(made) -> None:
    result = chat(made.folder, "/weights", "the thing", "/weights")
    assert result.stderr.startswith("[nothing has been answered yet]\n")
    assert "strategy qa-flora" in result.stderr
    assert "layers 0 to 2" in result.stderr
    assert result.stdout == as_lines(answers(made.folder, "the thing"))


def test_switched_off_adapters_are_as_if_they_were_not_there(made, tmp_path) -> None:
    create_bundle(tmp_path / "es", made.base.path, {"es": made.adapter.path})
    result = chat(made.folder, "the thing", "/undo", "/adapters off math", "the thing")
    expected = answers(tmp_path / "es", "the thing")
    assert result.stdout.splitlines()[1:] == as_lines(expected).splitlines()
    assert "math  off\nes    on \n" in result.stderr
    result = chat(made.folder, "/adapters off", "/adapters on", "the thing", "/adapters")
    assert result.stdout == as_lines(answers(made.folder, "the thing"))
    assert " in the last answer" in result.stderr
    only = chat(made.folder, "/adapters only es", "the thing")
    assert only.stdout == as_lines(answers(tmp_path / "es", "the thing"))


FAILING = [
    ("/adapters of x", "/adapters of is no choice; expected /adapters [on|off|only [NAME ...]]."),
    ("/adapters only", "/adapters only is no choice; expected /adapters [on|off|only [NAME ...]]"),
    ("/adapters off law", "The adapter 'law' is not loaded; expected names out of: math, es."),
    ("/strategy best", "Strategy 'best' is not known; expected one of two-place, "),
    ("/strategy calibrated", "Strategy calibrated needs to know what each"),
    ("/set warmth", "/set has no 'warmth'; expected one of max_tokens, temp, "),
    ("/set temp warm", "Option temperature is 'warm', expected a number from 0 up."),
    ("/set seed 1.5", "Option seed is '1.5', expected a whole number"),
    ("/clear all", "Cannot run '/clear all'; expected /clear"),
    ("/save", "Cannot run '/save'; expected /save FILE"),
    ("/load none.json", "Cannot load the session none.json: No such file"),
    ("/load a\0b", "the path has a null character"),
    ("/save ~nobody-here/a.json", "Cannot write ~nobody-here/a.json: the folder"),
    ("/system " + "x" * 5000, "The prompt has"),
    ("/wieghts", "There is no command /wieghts; did you mean /weights?"),
    ("/usr/bin is what?", "There is no command /usr/bin; see /help. For a message that begins"),
]


def test_commands_that_fail_are_told_and_the_chat_goes_on(made) -> None:
    lines, messages = zip(*FAILING, strict=True)
    result = chat(made.folder, "on a ring", "and then", *lines, "the thing")
    errors = [row for row in result.stderr.splitlines() if row.startswith("Error: ")]
    assert len(errors) == len(messages)
    for error, message in zip(errors, messages, strict=True):
        assert message in error
    assert result.exit_code == 0
    assert result.stdout == as_lines(answers(made.folder, "on a ring", "and then", "the thing"))


def test_strategy_is_shown_and_changed(made) -> None:
    result = chat(made.folder, "/strategy", "/strategy single:es", "the thing")
    assert "[strategy qa-flora]\n[strategy single:es]\n" in result.stderr
    assert "es ×1]" in result.stderr
    expected = answers(made.folder, "the thing", weights="single:es")
    assert result.stdout == as_lines(expected)


def test_system_is_sent_first_and_taken_away(made) -> None:
    expected = answers(made.folder, "the thing", system="on a ring")
    result = chat(made.folder, "/system", "/system on a ring", "the thing")
    assert result.stdout == as_lines(expected)
    assert result.stderr.startswith("[no system prompt]\n[system prompt: on a ring]\n")
    option = chat(made.folder, "the thing", args=(*GREEDY, "--system", "on a ring"))
    assert option.stdout == result.stdout
    none = chat(made.folder, "/system on a ring", "/system -", "the thing")
    assert none.stdout == as_lines(answers(made.folder, "the thing"))


def test_a_template_without_system_prompt_refuses_it(tmp_path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    made = make_bundle(tmp_path, chat_template=template)
    result = chat(made.folder, "/system be short", "the thing")
    assert "no system role" in result.stderr
    assert result.stdout == as_lines(answers(made.folder, "the thing"))
    failed = chat(made.folder, args=(*GREEDY, "--system", "be short"))
    assert (failed.exit_code, failed.stdout) == (1, "")


def test_undo_and_retry(made) -> None:
    result = chat(made.folder, "/retry", "/undo", "on a ring", "/undo", "the thing", "/retry")
    assert result.stderr.startswith("[nothing has been asked yet]\n" * 2)
    assert "[taken back: on a ring]" in result.stderr
    again = answers(made.folder, "the thing")
    assert result.stdout == as_lines(answers(made.folder, "on a ring") + again + again)
    # After a retry the conversation has one turn, not two.
    result = chat(made.folder, "the thing", "/retry", "and then", args=GREEDY)
    first, second = answers(made.folder, "the thing", "and then")
    assert result.stdout == as_lines([first, first, second])


def test_a_saved_chat_goes_on_where_it_was(made, tmp_path) -> None:
    path = tmp_path / "my talk.json"
    whole = chat(made.folder, "/system on a ring", "the thing", "and then")
    saved = chat(made.folder, "/system on a ring", "the thing", f"/save {path}")
    assert f"[1 turn saved to {path}]" in saved.stderr
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant"]
    loaded = chat(made.folder, f"/load {path}", "and then")
    shown = f"[system prompt: on a ring]\n> the thing\n{visible(saved.stdout)}"
    assert f"[1 turn loaded from {path}]\n{shown}" in loaded.stderr
    assert saved.stdout + loaded.stdout == whole.stdout
    option = chat(made.folder, "and then", args=(*GREEDY, "--load", str(path)))
    assert option.stdout == loaded.stdout


def test_two_slashes_send_one(made) -> None:
    result = chat(made.folder, "//help me")
    assert result.stdout == as_lines(answers(made.folder, "/help me"))


def test_help_names_every_command_and_quit_leaves(made) -> None:
    result = chat(made.folder, "/help", "/quit", "the thing")
    for name in (*COMMANDS, "quit"):
        assert f"\n/{name} " in f"\n{result.stderr}"
    assert (result.exit_code, result.stdout) == (0, "")
    assert chat(made.folder, "/?").stderr == result.stderr
    for word in ("exit", "quit", "/bye"):
        left = chat(made.folder, word, "the thing")
        assert (left.exit_code, left.stdout, left.stderr) == (0, "", "")


def test_sampling_is_shown_and_changed(made) -> None:
    lines = ("/set", "/set temp 1.5", "/set seed 7", "/set repeat_penalty off", "the thing")
    result = chat(made.folder, *lines)
    assert result.stderr.startswith("[max_tokens 6; temp 0.0; top_p 0.95; ")
    assert "[temp 1.5]\n[seed 7]\n[repeat_penalty 1.0]\n" in result.stderr
    options = {"temperature": 1.5, "seed": 7, "top_p": 0.95, "repeat_penalty": 1.0}
    assert result.stdout == as_lines(answers(made.folder, "the thing", **options))
    off = chat(made.folder, "/set seed off", args=(*GREEDY, "--seed", "3"))
    assert off.stderr == "[seed None]\n"


def test_clear_forgets_the_conversation_alone(made) -> None:
    result = chat(made.folder, "/system on a ring", "and then", "/clear", "the thing")
    assert "[the conversation is forgotten]" in result.stderr
    expected = answers(made.folder, "the thing", system="on a ring")
    assert result.stdout.splitlines()[1:] == as_lines(expected).splitlines()


def test_many_adapters_that_are_read_one_by_one_are_told(made, monkeypatch) -> None:
    monkeypatch.setattr("qaflora_edge.cli.options.N_SLOW", 1)
    told = "qa-flora reads each prompt 3 times, under the base and under each adapter; two-place"
    result = chat(made.folder, "/strategy static", "/strategy qa-flora")
    assert result.stderr.startswith(f"[{told} reads it once]\n[strategy static]\n")
    assert f"[strategy qa-flora; {told}" in result.stderr


def test_a_command_that_takes_words_is_completed_with_a_space(made) -> None:
    with Engine(made.folder, threads=1) as engine:
        assert list(completions("/strat", engine)) == ["/strategy "]
        assert list(completions("/und", engine)) == ["/undo"]
        assert list(completions("/adapters o", engine)) == ["on", "off", "only"]


def test_a_message_that_is_no_utf8_is_told_and_the_chat_goes_on(made) -> None:
    result = chat(made.folder, b"the th\xffing", "the thing")
    assert result.stdout == as_lines(answers(made.folder, "the thing"))
    assert result.stderr.startswith(
        "Error: The message is not UTF-8 (at character 6); expected text in UTF-8. Convert it, for "
        "example with iconv.\n"
    )


def test_adapters_are_added_and_dropped(made, tmp_path) -> None:
    place = shutil.copytree(made.peft, tmp_path / "a folder")
    added = (f"/add {place}", f"/add {made.adapter.path} two")
    result = chat(made.folder, *added, "/drop es", "/add", "/drop", "/drop x", "the thing")
    assert result.exit_code == 0
    assert "[a-folder takes part from now on; strategy qa-flora]\n[two takes" in result.stderr
    assert "[es is unloaded]" in result.stderr
    for expected in ("expected /add PATH [NAME]", "expected /drop NAME", "'x' is not loaded"):
        assert expected in result.stderr
    assert {*re.findall(r"[\w-]+(?= ×[\d.]+)", result.stderr)} == {"math", "a-folder", "two"}
