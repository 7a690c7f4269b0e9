"""qaflora chat, driven through a pipe"""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result
from rich.console import Console
from rich.markdown import Markdown
from scripted_chat import scripted

from qaflora_edge import Engine
from qaflora_edge.cli import main
from qaflora_edge.cli.chat.session import context_size
from qaflora_edge.cli.chat.view import parse_markdown, split_closed
from qaflora_edge.config import in_group

REPEAT_PENALTY = in_group("sampling")["repeat_penalty"].default_of("chat")
TESTS = str(Path(__file__).parent)
GREEDY = ("--temp", "0", "--max-tokens", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("chat"))


def chat(made: TinyBundle, lines: str, *args: str) -> Result:
    # One thread: others would wait for each other on a busy machine, and a tiny base needs none.
    args = ("chat", str(made.folder), "--threads", "1", *args)
    return CliRunner().invoke(main, args, input=lines)


def test_turns_build_on_each_other(made: TinyBundle) -> None:
    result = chat(made, "the thing\n\nand then\n", *GREEDY)
    assert result.exit_code == 0
    messages: list[dict[str, str]] = []
    with Engine(made.folder, threads=1) as engine:
        for line in ("the thing", "and then"):  # an empty line asks nothing
            messages.append({"role": "user", "content": line})
            answer = engine.generate(
                engine.chat_tokens(messages), max_tokens=6, repeat_penalty=REPEAT_PENALTY
            )
            messages.append({"role": "assistant", "content": answer.text()})
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)


def test_the_status_tells_speed_and_mix(made: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "generate", scripted())
    result = chat(made, "the thing\n")
    status = r"\[9\.0 tok/s; first token \d\.\d\d s; \w+ \d+ % · \w+ \d+ %\]\n"
    assert re.fullmatch(status, result.stderr), result.stderr
    assert result.stdout == "The thing on a ring is there, and so is another.\n"


def test_a_byte_order_mark_hides_no_command(made: TinyBundle) -> None:
    result = chat(made, "\ufeff/strategy base\n", *GREEDY)
    assert (result.stdout, result.stderr) == ("", "[strategy base]\n")


def test_oldest_turns_are_dropped_when_the_context_is_full(
    made: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "generate", scripted("the thing"))
    question = "the thing on a ring"
    lines = f"{question}\n" * 4
    result = chat(made, lines, *GREEDY, "--ctx", "128")
    assert result.exit_code == 0
    assert "[the context is full: the oldest 2 turns are no longer sent]" in result.stderr
    assert result.stderr.count("tok/s") == 4


def test_too_long_a_line_is_told_and_the_chat_goes_on(
    made: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "generate", scripted())
    result = chat(made, "hi\n" + "xyz" * 100 + "\nhi\n", *GREEDY, "--ctx", "96")
    assert result.exit_code == 0
    assert "Error: The prompt has" in result.stderr
    assert "larger context: /save FILE, then `qaflora chat --load FILE --ctx N`." in result.stderr
    assert result.stderr.count("tok/s") == 2


def test_raw_prompt_chats_without_a_template(tmp_path: Path) -> None:
    made = make_bundle(tmp_path, chat_template=None)
    failed = chat(made, "hi\n", *GREEDY)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "has no chat template" in failed.stderr
    assert chat(made, "hi\n", *GREEDY, "--raw-prompt").exit_code == 0


INTERRUPTED = """
import signal, sys
sys.path.insert(0, sys.argv.pop(1))
import scripted_chat

words = scripted_chat.ScriptedGeneration.__iter__
n_answer = 0

def interrupted(self):
    global n_answer
    n_answer += 1
    for count, word in enumerate(words(self)):
        if n_answer == 1 and count == 3:
            signal.raise_signal(signal.SIGINT)
        yield word

scripted_chat.ScriptedGeneration.__iter__ = interrupted
scripted_chat.Engine.generate = scripted_chat.scripted(pause_s=0.05)
scripted_chat.main(sys.argv[1:])
"""


def test_interrupt_ends_the_answer_only(made: TinyBundle) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, TESTS, "chat", str(made.folder), "--threads", "1"],
        input="the thing\nand then\n",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stderr.count("[stopped; ") == 1
    assert result.stderr.count("tok/s") == 2
    assert "Traceback" not in result.stderr


def test_more_than_the_base_was_trained_for_is_told_once(
    made: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "generate", scripted())
    long = "the thing " * 60
    result = chat(made, f"hi\n{long}\n{long}\n/clear\nhi\n", "--ctx", "4096")
    warning = (
        "[warning: the base was trained for 512 tokens, and the conversation has more; answers may "
        "fall apart. /clear begins again]"
    )
    assert result.stderr.count(warning) == 1
    assert result.stderr.index(warning) > result.stderr.index("tok/s")


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
def test_blocks_close_at_a_blank_line_outside_of_code(
    text: str, closed: list[str], rest: str
) -> None:
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
def test_markdown_loses_no_digit_and_no_sign(text: str) -> None:
    assert markdown(text) == " ".join(text.split())


def test_markdown_is_still_markdown() -> None:
    assert markdown("**18** is *it*, `x*y`") == "18 is it, x*y"
    assert "print(1)" in markdown("```python\nprint(1)\n```")
    assert "a b ──── 1 2" in markdown("| a | b |\n|---|---|\n| 1 | 2 |")


def test_context_size_is_what_the_base_was_trained_for(made: TinyBundle) -> None:
    assert context_size(made.folder, "f16") == 512


@pytest.mark.parametrize("word", ["exit", "/bye"])
def test_words_that_leave(made: TinyBundle, word: str) -> None:
    result = chat(made, f"{word}\nthe thing\n", *GREEDY)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
