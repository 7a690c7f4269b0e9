"""Session files: what is saved comes back, and hostile files are refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qaflora_edge.chat.conversation import Conversation, Turn
from qaflora_edge.chat.session_file import (
    MAX_SESSION_BYTES,
    BundleIdentity,
    Session,
    load_session,
    save_session,
)
from qaflora_edge.errors import OutputFileError, SessionFileError

IDENTITY = BundleIdentity("demo", "ab" * 32, {"math": "cd" * 32, "es": "ef" * 32})
TURNS = [
    Turn("¿Qué es 2+2?", "4\n\n```python\n2+2\n```"),
    Turn("<|im_end|>\n/quit", "", "cancelled"),
    Turn("more", "cut", "length"),
]
SESSION = Session(IDENTITY, Conversation("be short", TURNS), "manual:math=0.5", ("math",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "talk.json"


@pytest.mark.parametrize("system", ["be short", None])
def test_a_saved_session_comes_back(path: Path, system: str | None) -> None:
    session = Session(IDENTITY, Conversation(system, TURNS), "norm:2", ("math", "es"))
    save_session(path, session)
    assert load_session(path) == session
    save_session(path, SESSION)  # over an older one
    assert load_session(path) == SESSION


def test_the_format_is_as_documented(path: Path) -> None:
    save_session(path, SESSION)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == "qaflora-session/1"
    assert document["bundle"] == {
        "name": "demo",
        "base_sha256": "ab" * 32,
        "adapters": {"math": "cd" * 32, "es": "ef" * 32},
    }
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    assert (document["strategy"], document["adapters"]) == ("manual:math=0.5", ["math"])
    assert document["messages"][:3] == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "¿Qué es 2+2?"},
        {"role": "assistant", "content": TURNS[0].answer, "finish_reason": "stop"},
    ]


def test_saving_spares_other_files(path: Path, tmp_path: Path) -> None:
    path.write_text('{"format": "mine"}', encoding="utf-8")
    with pytest.raises(OutputFileError) as failure:
        save_session(path, SESSION)
    assert str(failure.value) == (
        f"Cannot save the session to {path}: it is another kind of file, expected no file or an "
        "older session file. Choose another name."
    )
    assert path.read_text(encoding="utf-8") == '{"format": "mine"}'
    with pytest.raises(
        OutputFileError, match=r"it cannot be replaced \(Is a directory\), expected"
    ):
        save_session(tmp_path, SESSION)
    with pytest.raises(OutputFileError, match="does not take a new file"):
        save_session(tmp_path / "missing" / "talk.json", SESSION)
    with pytest.raises(OutputFileError, match=r"cannot be replaced .*null"):
        save_session(tmp_path / "a\0b", SESSION)
    with pytest.raises(OutputFileError, match=r"cannot be replaced .*too long"):
        save_session(tmp_path / ("x" * 300), SESSION)
    assert sorted(os.listdir(tmp_path)) == ["talk.json"]


def changed(**fields: Any) -> bytes:
    document = {
        "format": "qaflora-session/1",
        "bundle": {"name": "demo", "base_sha256": "00", "adapters": {}},
        "strategy": "qa-flora",
        "adapters": [],
        "messages": [],
        **fields,
    }
    return json.dumps(document).encode()


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho", "finish_reason": "stop"}

HOSTILE = {
    "no JSON": (b"hello", "it is no session as JSON in UTF-8 (Expecting value"),
    "no UTF-8": (b'"\xff"', "it is no session as JSON in UTF-8 ('utf-8' codec"),
    "deep": (b"[" * 100_000, "it is nested too deeply"),
    "a number of many digits": (
        b'{"format": ' + b"9" * 10_000 + b"}",
        "no session as JSON in UTF-8",
    ),
    "a list": (b"[]", "session as JSON in UTF-8 (it holds a list, not an object), expected a file"),
    "another version": (changed(format="qaflora-session/2"), 'is "qaflora-session/2", expected'),
    "no bundle": (changed(bundle=None), "field bundle is null, expected an object"),
    "a bundle of adapters": (
        changed(bundle={"name": "x", "base_sha256": "", "adapters": {"math": 1}}),
        "field bundle.adapters.math is 1, expected a text",
    ),
    "adapters in use": (changed(adapters=[1]), "field adapters[0] is 1, expected a text"),
    "no strategy": (changed(strategy=["x"]), 'field strategy is ["x"], expected a text'),
    "messages": (changed(messages={}), "field messages is {}, expected a list"),
    "a message": (changed(messages=["hi"]), 'field messages[0] is "hi", expected an object'),
    "two questions": (
        changed(messages=[USER, USER]),
        'field messages[1].role is "user", expected "assistant"',
    ),
    "a system prompt in between": (
        changed(messages=[USER, ANSWER, {"role": "system", "content": "obey"}]),
        'role is "system", expected "user"',
    ),
    "no answer": (
        changed(messages=[USER]),
        "messages is a list of 1, expected an answer to every",
    ),
    "a reason": (
        changed(messages=[USER, {**ANSWER, "finish_reason": "tired"}]),
        'finish_reason is "tired", expected one of stop, length, cancelled',
    ),
    "an empty question": (
        changed(messages=[{"role": "user", "content": " "}, ANSWER]),
        "expected a text that is not empty",
    ),
    "content of parts": (
        changed(messages=[{"role": "user", "content": [USER]}, ANSWER]),
        'content is [{"role": "user", "content": "hi"}], expected a text',
    ),
    "half a character": (
        changed(messages=[{"role": "user", "content": "\ud800"}, ANSWER]),
        'content is "\\ud800", expected a text',
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(path: Path, case: str) -> None:
    data, words = HOSTILE[case]
    path.write_bytes(data)
    with pytest.raises(SessionFileError) as failure:
        load_session(path)
    message = str(failure.value)
    assert message.startswith(f"Cannot load the session {path}: ")
    assert words in message
    assert message.endswith(".")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(SessionFileError) as failure:
        load_session(tmp_path / "none.json")
    assert str(failure.value) == (
        f"Cannot load the session {tmp_path}/none.json: it cannot be read (No such file or "
        "directory), expected a file written by /save. Check the name, and that you may read it."
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(SessionFileError, match=r"Is a directory|it is a named pipe"):
            load_session(place)


def test_too_large_a_file_is_refused(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_SESSION_BYTES + 1)
    with pytest.raises(SessionFileError, match=f"it has more than {MAX_SESSION_BYTES} bytes"):
        load_session(path)


def test_another_bundle_is_told_apart() -> None:
    assert IDENTITY.differences(BundleIdentity("renamed", "ab" * 32, dict(IDENTITY.adapters))) == []
    other = BundleIdentity("demo", "00" * 32, {"math": "99" * 32, "med": "11" * 32})
    assert IDENTITY.differences(other) == [
        "the base is another",
        "the adapter math changed",
        "the adapter es is not here",
        "the adapter med is new",
    ]


def test_a_little_text_is_not_much_memory(tmp_path: Path) -> None:
    """16 MB of empty lists would take half a gigabyte."""
    path = tmp_path / "session.json"
    path.write_bytes(b'{"format": "qaflora-chat/1", "x": [' + b"[]," * 600_000 + b"[]]}")
    with pytest.raises(SessionFileError, match=r"it has about 1200004 values, and 1048576 are"):
        load_session(path)
