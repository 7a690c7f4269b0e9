"""qaflora chat, driven through a pipe"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result

from qaflora_edge import Engine
from qaflora_edge.cli import main

GREEDY = ("--temp", "0", "--max-tokens", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("chat"))


def chat(made: TinyBundle, lines: str, *args: str) -> Result:
    return CliRunner().invoke(main, ["chat", str(made.folder), *args], input=lines)


def test_turns_build_on_each_other(made: TinyBundle) -> None:
    result = chat(made, "the thing\n\nand then\n", *GREEDY)
    assert result.exit_code == 0
    messages: list[dict[str, str]] = []
    with Engine(made.folder) as engine:
        for line in ("the thing", "and then"):  # an empty line asks nothing
            messages.append({"role": "user", "content": line})
            text = engine.generate(engine.chat_tokens(messages), max_tokens=6).text()
            messages.append({"role": "assistant", "content": text})
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    status = r"\[cut at --max-tokens; [\d.]+ tok/s; first token \d\.\d\d s; math \d+ %  es \d+ %\]"
    assert all(re.fullmatch(status, line) for line in lines), lines


def test_end_of_input_leaves(made: TinyBundle) -> None:
    result = chat(made, "", *GREEDY)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_last_line_needs_no_end(made: TinyBundle) -> None:
    assert chat(made, "the thing", *GREEDY).stdout == chat(made, "the thing\n", *GREEDY).stdout


def test_oldest_turns_are_dropped_when_the_context_is_full(made: TinyBundle) -> None:
    question = "the thing on a ring"
    lines = f"{question}\n" * 4
    result = chat(made, lines, *GREEDY, "--ctx", "128")
    assert result.exit_code == 0
    assert "[the context is full: the oldest 2 turns are no longer read]" in result.stderr
    assert result.stderr.count("tok/s") == 4


def test_too_long_a_line_is_told_and_the_chat_goes_on(made: TinyBundle) -> None:
    result = chat(made, "hi\n" + "xyz" * 100 + "\nhi\n", *GREEDY, "--ctx", "96")
    assert result.exit_code == 0
    assert "Error: The prompt has" in result.stderr
    assert result.stderr.count("tok/s") == 2


def test_raw_prompt_chats_without_a_template(tmp_path: Path) -> None:
    made = make_bundle(tmp_path, chat_template=None)
    failed = chat(made, "hi\n", *GREEDY)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "has no chat template" in failed.stderr
    assert chat(made, "hi\n", *GREEDY, "--raw-prompt").exit_code == 0


INTERRUPTED = """
import signal, sys
from qaflora_edge.inference.generation import Generation
from qaflora_edge.cli import main

next_piece = Generation.__next__
count = 0

def interrupted(self):
    global count
    count += 1
    if count == 3:
        signal.raise_signal(signal.SIGINT)
    return next_piece(self)

Generation.__next__ = interrupted
main(sys.argv[1:])
"""


def test_interrupt_ends_the_answer_only(made: TinyBundle) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "chat", str(made.folder), *GREEDY],
        input="the thing\nand then\n",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stderr.count("[stopped; ") == 1
    assert result.stderr.count("tok/s") == 2
    assert "Traceback" not in result.stderr
