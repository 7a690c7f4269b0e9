"""Slash commands of qaflora chat, through a pipe: answers on stdout, everything else on stderr"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.cli import main
from qaflora_edge.cli.chat.commands import COMMANDS, Commands
from qaflora_edge.config import in_group

REPEAT_PENALTY = in_group("sampling")["repeat_penalty"].default_of("chat")
GREEDY = ("--temp", "0", "--max-tokens", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("chat"))


def chat(folder: Path, *lines: str | bytes, args: Sequence[str] = GREEDY) -> Result:
    text = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    # One thread: others would wait for each other on a busy machine, and a tiny base needs none.
    result = CliRunner().invoke(main, ["chat", str(folder), "--threads", "1", *args], input=text)
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


def test_weights_shows_the_heatmap_of_the_last_answer(made: TinyBundle) -> None:
    result = chat(made.folder, "/weights", "the thing", "/weights")
    assert result.stderr.startswith("[nothing has been answered yet]\n")
    assert "strategy qa-flora" in result.stderr
    assert "layers 0 to 2" in result.stderr
    assert result.stdout == as_lines(answers(made.folder, "the thing"))


def test_switched_off_adapters_are_as_if_they_were_not_there(
    made: TinyBundle, tmp_path: Path
) -> None:
    create_bundle(tmp_path / "es", made.base.path, {"es": made.adapter.path})
    result = chat(made.folder, "the thing", "/undo", "/adapters off math", "the thing")
    expected = answers(tmp_path / "es", "the thing")
    assert result.stdout.splitlines()[1:] == as_lines(expected).splitlines()
    assert "math  off\nes    on \n" in result.stderr
    result = chat(made.folder, "/adapters off", "/adapters on", "the thing", "/adapters")
    assert result.stdout == as_lines(answers(made.folder, "the thing"))
    assert "% of the last answer" in result.stderr


FAILING = [
    ("/adapters of math", "/adapters of is no choice; expected /adapters, /adapters on [NAME"),
    ("/adapters off law", "The adapter 'law' is not in this bundle; expected one of: math, es"),
    ("/strategy best", "Strategy 'best' is not known; expected one of qa-flora, "),
    ("/strategy calibrated", "Strategy calibrated needs typical divergences"),
    (
        "/undo 3",
        "/undo 3 cannot be done: expected a number of turns, from 1 to the 2 there are.",
    ),
    ("/undo " + "9" * 5000, "999... cannot be done: expected a number of turns"),
    ("/keep-history yes", "/keep-history yes is no choice; expected /keep-history, /keep-"),
    ("/help wieghts", "There is no command /wieghts; did you mean /help weights?"),
    ("/temp warm", "The temperature 'warm' is no number; expected one such as 0.7."),
    ("/temp -1", "Option temperature is -1.0, expected a number from 0 up."),
    ("/seed 1.5", "The seed '1.5' is no whole number; expected one such as 4096."),
    ("/clear all", "/clear takes nothing after it, found 'all'."),
    ("/save", "/save got no file name; expected /save FILE."),
    ("/load none.json", "Cannot load the session none.json: No such file"),
    ("/load a\0b", "the path has a null character"),
    ("/save ~nobody-here/a.json", "Cannot write ~nobody-here/a.json: the folder"),
    ("/system " + "x" * 5000, "The prompt has"),
    ("/system " + "xyz " * 108, "The system prompt leaves less than a quarter of the context"),
]


def test_commands_that_fail_are_told_and_the_chat_goes_on(made: TinyBundle) -> None:
    lines, messages = zip(*FAILING, strict=True)
    result = chat(made.folder, "on a ring", "and then", *lines, "the thing")
    errors = [row for row in result.stderr.splitlines() if row.startswith("Error: ")]
    assert len(errors) == len(messages)
    for error, message in zip(errors, messages, strict=True):
        assert message in error
    assert result.exit_code == 0
    assert result.stdout == as_lines(answers(made.folder, "on a ring", "and then", "the thing"))


def test_strategy_is_shown_and_changed(made: TinyBundle) -> None:
    result = chat(made.folder, "/strategy", "/strategy single:es", "the thing")
    assert "[strategy qa-flora]\n[strategy single:es]\n" in result.stderr
    assert "es 100 %]" in result.stderr
    expected = answers(made.folder, "the thing", weights="single:es")
    assert result.stdout == as_lines(expected)


def test_system_is_sent_first_and_taken_away(made: TinyBundle) -> None:
    expected = answers(made.folder, "the thing", system="on a ring")
    result = chat(made.folder, "/system", "/system on a ring", "the thing")
    assert result.stdout == as_lines(expected)
    assert result.stderr.startswith("[no system prompt]\n[system prompt: on a ring]\n")
    option = chat(made.folder, "the thing", args=(*GREEDY, "--system", "on a ring"))
    assert option.stdout == result.stdout
    none = chat(made.folder, "/system on a ring", "/system -", "the thing")
    assert none.stdout == as_lines(answers(made.folder, "the thing"))


def test_a_template_without_system_prompt_refuses_it(tmp_path: Path) -> None:
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


def test_undo_and_retry(made: TinyBundle) -> None:
    result = chat(made.folder, "/retry", "/undo", "on a ring", "/undo", "the thing", "/retry")
    assert result.stderr.startswith("[nothing has been asked yet]\n" * 2)
    assert "[taken back: on a ring]" in result.stderr
    again = answers(made.folder, "the thing")
    assert result.stdout == as_lines(answers(made.folder, "on a ring") + again + again)
    # After a retry the conversation has one turn, not two.
    result = chat(made.folder, "the thing", "/retry", "and then", args=(*GREEDY, "--parallel", "2"))
    first, second = answers(made.folder, "the thing", "and then")
    assert result.stdout == as_lines([first, first, second])


def test_keep_history_can_be_switched(made: TinyBundle) -> None:
    lines = ("the thing", "and then", "on a ring")
    kept = chat(made.folder, *lines, args=(*GREEDY, "--keep-history"))
    result = chat(made.folder, "/keep-history", "/keep-history on", *lines)
    assert result.stderr.startswith(
        "[each turn prefills the whole conversation under its own weights]\n"
        "[each turn prefills only what is new; earlier turns keep their KV state]\n"
    )
    assert result.stdout == kept.stdout
    off = chat(made.folder, "/keep-history off", *lines, args=(*GREEDY, "--keep-history"))
    assert off.stdout == as_lines(answers(made.folder, *lines))


def test_a_retry_with_a_seed_is_another_answer_and_repeatable(made: TinyBundle) -> None:
    args = ("--temp", "1.5", "--max-tokens", "12", "--seed", "7")
    results = [chat(made.folder, "the thing", "/retry", args=args).stdout for _ in range(2)]
    assert results[0] == results[1]
    with Engine(made.folder, threads=1) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": "the thing"}])
        texts = [
            engine.generate(
                tokens,
                max_tokens=12,
                temperature=1.5,
                top_p=0.95,
                repeat_penalty=REPEAT_PENALTY,
                seed=seed,
            ).text()
            for seed in (7, 8)
        ]
    assert texts[0] != texts[1]
    assert results[0] == as_lines(texts)


def test_a_saved_chat_goes_on_where_it_was(made: TinyBundle, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    whole = chat(made.folder, "/system on a ring", "/strategy cosine", "the thing", "and then")
    saved = chat(made.folder, "/system on a ring", "/strategy cosine", "the thing", f"/save {path}")
    assert f"[1 turn saved to {path}]" in saved.stderr
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant"]
    loaded = chat(made.folder, f"/load {path}", "and then")
    assert f"[1 turn loaded from {path}; the last question was: the thing]" in loaded.stderr
    assert "warning" not in loaded.stderr
    assert saved.stdout + loaded.stdout == whole.stdout
    option = chat(made.folder, "and then", args=(*GREEDY, "--load", str(path)))
    assert option.stdout == loaded.stdout


def test_another_bundle_is_told(made: TinyBundle, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    chat(made.folder, "/strategy single:math", "the thing", f"/save {path}")
    create_bundle(tmp_path / "es", made.base.path, {"es": made.adapter.path})
    result = chat(tmp_path / "es", f"/load {path}", "and then", "/strategy")
    assert "[warning: saved with another bundle; different here: math]" in result.stderr
    assert "[warning: its strategy is not used here: Strategy 'single:math' names" in result.stderr
    assert "[strategy qa-flora]" in result.stderr
    assert result.stdout.count("\n") == 1


def test_two_slashes_send_one(made: TinyBundle) -> None:
    result = chat(made.folder, "//help me")
    assert result.stdout == as_lines(answers(made.folder, "/help me"))


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("/wieghts", "did you mean /weights?"),
        ("/usr/bin is what?", "see /help."),
    ],
)
def test_an_unknown_command_is_never_sent(made: TinyBundle, line: str, advice: str) -> None:
    result = chat(made.folder, line)
    name = line[1:].split(" ")[0]
    assert result.stderr == (
        f"Error: There is no command /{name}; {advice} For a message that begins with a slash, "
        f"type //{name}.\n"
    )
    assert (result.exit_code, result.stdout) == (0, "")


def test_help_names_every_command_and_quit_leaves(made: TinyBundle) -> None:
    result = chat(made.folder, "/help", "/quit", "the thing")
    for name in COMMANDS:
        assert f"\n/{name} " in f"\n{result.stderr}"
        assert name == "quit" or callable(getattr(Commands, name.replace("-", "_")))
    assert (result.exit_code, result.stdout) == (0, "")
    assert chat(made.folder, "/exit", "the thing").stdout == ""


def test_sampling_is_shown_and_changed(made: TinyBundle) -> None:
    lines = ("/temp", "/penalty", "/seed", "/temp 1.5", "/seed 7", "/penalty off", "the thing")
    result = chat(made.folder, *lines)
    assert result.stderr.startswith(
        "[temperature 0.0]\n[repeat penalty 1.03]\n[no seed]\n"
        "[temperature 1.5]\n[seed 7]\n[no repeat penalty]\n"
    )
    options = {"temperature": 1.5, "seed": 7, "top_p": 0.95, "repeat_penalty": 1.0}
    assert result.stdout == as_lines(answers(made.folder, "the thing", **options))
    off = chat(made.folder, "/seed off", args=(*GREEDY, "--seed", "3"))
    assert off.stderr == "[no seed]\n"


def test_clear_forgets_the_conversation_alone(made: TinyBundle) -> None:
    result = chat(made.folder, "/system on a ring", "and then", "/clear", "the thing", "/undo 2")
    assert "[1 turn forgotten]" in result.stderr
    assert "from 1 to the 1 there is" in result.stderr
    expected = answers(made.folder, "the thing", system="on a ring")
    assert result.stdout.splitlines()[1:] == as_lines(expected).splitlines()


def test_ctx_tells_how_full_the_context_is(made: TinyBundle) -> None:
    result = chat(made.folder, "the thing", "/ctx", args=(*GREEDY, "--ctx", "96"))
    told = r"\[context 96; \d+ tokens of it in use; the base was trained for 512\]"
    assert re.search(told, result.stderr)


def test_a_message_that_is_no_utf8_is_told_and_the_chat_goes_on(made: TinyBundle) -> None:
    result = chat(made.folder, b"the th\xffing", "the thing")
    assert result.stdout == as_lines(answers(made.folder, "the thing"))
    assert result.stderr.startswith(
        "Error: The message is not UTF-8 (at character 6); expected text in UTF-8. Convert it, for "
        "example with iconv.\n"
    )
