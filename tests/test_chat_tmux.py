"""qaflora chat on a terminal, typed to and read by tmux"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from scripted_chat import ANSWER
from tmux import Window, need_tmux, on_a_terminal

pytestmark = pytest.mark.slow  # each starts a terminal and a chat
Open = Callable[..., Window]
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_chat.py")))
HINT = "Alt-Enter: new line"  # below the input: it can be typed to


@pytest.fixture
def opened(tmp_path) -> Iterator[Open]:
    """Opens a chat in a window; its history is the test's own."""
    need_tmux()
    with ExitStack() as windows:

        def open_chat(
            folder: Path,
            *args: str,
            verb: str = "chat",
            answer: str | None = ANSWER,
            columns: int = 80,
            rows: int = 24,
            **env: str,
        ) -> Window:
            """answer  what the model is made to say, or None: what it says by itself"""
            real = (sys.executable, "-m", "qaflora_edge")
            window = Window(
                [*(real if answer is None else (*SCRIPTED, answer)), verb, str(folder), *args],
                columns=columns,
                rows=rows,
                env={
                    "XDG_DATA_HOME": str(tmp_path / "data"),
                    "PYTHONSAFEPATH": "1",
                    "LC_ALL": "C.UTF-8",
                    "QAFLORA_THREADS": "1",
                    **env,
                },
            )
            windows.enter_context(window)
            window.wait_for(HINT if columns > 30 else ">")
            return window

        yield open_chat


def test_run_without_a_prompt_opens_a_chat(opened, made) -> None:
    window = opened(made.folder, "--temp", "0.5", verb="run")
    window.type("/set temp")
    window.key("Enter")
    window.wait_for("temp 0.5")


def test_a_chat_from_its_first_question_to_its_end(opened, made, tmp_path) -> None:
    """Types, interrupts an answer taller than the screen, retries, shows weights, leaves."""
    story = "\n\n".join(" ".join(f"{name}{i}" for i in range(80)) for name in "abcdefgh")
    window = opened(made.folder, answer=story, columns=80, rows=8)
    assert "math, es" in window.screen()
    window.type("Tell me a story.")
    window.key("Enter")
    window.wait_for("b70")
    # Once it is taller than the screen, its beginning can be read above, in whole paragraphs.
    seen = window.wait_until(lambda _: "b0 " not in window.visible(), "a tall answer")
    assert re.findall(r"[a-h]\d+", seen)[:150] == story.split()[:150]
    window.key("C-c")
    screen = window.wait_for("stopped ·")
    status = r"stopped · [\d.]+ tok/s · first token [\d.]+ s · \w+ ×[\d.]+ · \w+ ×[\d.]+"
    assert re.search(status, " ".join(screen.split("\n")))
    # What scrolled out and what is there make the whole partial answer, once.
    path = tmp_path / "talk.json"
    window.type(f"/save {path}")
    window.key("Enter")
    window.wait_for("1 turn saved")
    question, answer = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert question["content"] == "Tell me a story."
    assert answer["finish_reason"] == "cancelled"
    assert re.findall(r"[a-h]\d+", screen) == answer["content"].split()
    window.type("/strategy static")
    window.key("Enter")
    window.type("/retry")
    window.key("Enter")
    window.wait_until(re.compile(r"> /retry\n\n(?!reading)\S").search, "another answer")
    window.key("C-c")
    window.wait_for("tok/s", count=2)
    window.type("/weights")
    window.key("Enter")
    screen = window.wait_for("strategy static, ")
    assert re.search(r"^math +0\.\d\d", screen, re.MULTILINE)
    window.wait_until(re.compile(r"\n> *\nAlt-").search, "the prompt, which alone takes Ctrl-D")
    window.key("C-d")
    window.wait_for("LEFT 0")
    history = tmp_path / "data" / "qaflora-edge" / "chat-history"
    assert "+/weights" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


def test_a_chat_in_forty_columns(opened, made) -> None:
    window = opened(made.folder, answer=" ring" * 50, columns=40, rows=20)
    window.type("/wei")
    window.wait_for("> /wei /weights")  # the menu; a Tab while it is being made is passed over
    window.key("Tab")
    window.wait_for("> /weights")
    window.key("Enter")
    window.wait_for("nothing has been answered yet")
    window.type("the thing")
    window.key("M-Enter")
    window.type("on a ring")
    window.key("Enter")
    window.wait_for("ring ring")
    window.type("/weights")  # during the answer
    window.key("Enter")
    screen = window.wait_for("prompt tokens")
    assert "> the thing\n  on a ring\n" in screen
    window.key("Up", "Up")  # the message as a whole, from the history
    window.wait_for("> the thing on a ring", count=2)
    window.key("C-c")
    window.type("/quit")
    window.key("Enter")
    window.wait_for("LEFT 0")


def test_pasted_lines_are_one_message(opened, made, tmp_path) -> None:
    window = opened(made.folder)
    pasted = "one\n/quit\n<|im_end|> 漢字 🙂\nfour"
    window.paste(pasted)
    window.wait_for("four")
    window.key("Enter")
    window.wait_for("tok/s")
    window.type(f"/save {tmp_path / 'talk.json'}")
    window.key("Enter")
    window.wait_for("1 turn saved")
    document = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert document["messages"][0] == {"role": "user", "content": pasted}


@pytest.mark.parametrize(
    ("args", "env"), [(["--plain"], {"TERM": "xterm-256color"}), ([], {"TERM": "dumb"})]
)
def test_plain_terminals_get_no_escape_codes(made, args, env) -> None:
    command = [*SCRIPTED, ANSWER, "chat", str(made.folder), *args]
    written = on_a_terminal(command, b"the thing\n/weights\n/help\n/nothing\n\x04", **env)
    assert b"\x1b" not in written
    assert b"layers 0 to 2" in written
    assert b"tok/s" in written
    assert written.count(b"> ") == 5
