"""A chat as a file: versioned JSON with the messages and what they were answered with.

    {"format": "qaflora-session/1",
     "bundle": {"name": "...", "base_sha256": "...", "adapters": {"math": "sha256", ...}},
     "strategy": "qa-flora", "adapters": ["math"],
     "messages": [{"role": "user", "content": "..."},
                  {"role": "assistant", "content": "...", "finish_reason": "stop"}]}

`adapters` are those in use. A file may come from anywhere: everything is checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from qaflora_edge.bundles.open import read_bundle_text
from qaflora_edge.chat.conversation import FINISH_REASONS, Conversation, Turn
from qaflora_edge.errors import OutputFileError, SessionFileError
from qaflora_edge.files import open_input, write_text_atomic
from qaflora_edge.formats.json_text import is_unicode, read_json_object

FORMAT = "qaflora-session/1"
MAX_SESSION_BYTES = 16 << 20


@dataclass(frozen=True)
class BundleIdentity:
    """Which bundle a conversation was had with.

    adapters  name -> SHA-256 of its file
    """

    name: str
    base_sha256: str
    adapters: dict[str, str] = field(default_factory=dict)

    def differences(self, other: BundleIdentity) -> list[str]:
        """What is not the same in another bundle, in words; empty when both answer alike."""
        found = []
        if self.base_sha256 != other.base_sha256:
            found.append("the base is another")
        for name in (*self.adapters, *(set(other.adapters) - set(self.adapters))):
            ours, theirs = self.adapters.get(name), other.adapters.get(name)
            if ours != theirs:
                what = "is not here" if theirs is None else "is new" if ours is None else "changed"
                found.append(f"the adapter {name} {what}")
        return found


@dataclass(frozen=True)
class Session:
    """What a session file holds."""

    bundle: BundleIdentity
    conversation: Conversation
    strategy: str
    adapters: tuple[str, ...]


def bundle_identity(folder: Path) -> BundleIdentity:
    """The identity of a bundle by its bundle.json. Raises BundleError."""
    text = read_bundle_text(folder)
    return BundleIdentity(
        name=text.name or folder.name,
        base_sha256=text.base.sha256,
        adapters={adapter.name: adapter.sha256 for adapter in text.adapters},
    )


def save_session(path: Path, session: Session) -> None:
    """Write a session file whole or not at all, over an older session file only.

    Raises OutputFileError when something else is there, or the file cannot be written.
    """
    found = _obstacle(path)
    if found is not None:
        raise OutputFileError(
            f"Cannot save the session to {path}: {found}, expected no file or an older session "
            "file. Choose another name."
        )
    messages: list[dict[str, str]] = list(session.conversation.messages())
    answers = [message for message in messages if message["role"] == "assistant"]
    for message, turn in zip(answers, session.conversation.turns, strict=True):
        message["finish_reason"] = turn.finish_reason
    document = {
        "format": FORMAT,
        "bundle": asdict(session.bundle),
        "strategy": session.strategy,
        "adapters": list(session.adapters),
        "messages": messages,
    }
    write_text_atomic(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def load_session(path: Path) -> Session:
    """Read a session file. Raises SessionFileError when it is missing or not what it should be."""
    fields = _Fields(path, _read(path))
    bundle = fields.object("bundle")
    adapters = bundle.object("adapters")
    identity = BundleIdentity(
        name=bundle.text("name"),
        base_sha256=bundle.text("base_sha256"),
        adapters={name: adapters.text(name) for name in adapters.values},
    )
    in_use = fields.list("adapters")
    if not all(isinstance(name, str) and is_unicode(name) for name in in_use):
        fields.fail("adapters", "a list of names", in_use)
    return Session(
        bundle=identity,
        conversation=_conversation(fields),
        strategy=fields.text("strategy"),
        adapters=tuple(in_use),
    )


def _obstacle(path: Path) -> str | None:
    """What is in the way of a file, in words; None for nothing or an older session."""
    try:
        _read(path)
    except SessionFileError as error:
        reason = error.__cause__
        if isinstance(reason, FileNotFoundError):
            return None
        if isinstance(reason, OSError):
            return f"it cannot be replaced ({reason.strerror})"
        return "it is another kind of file"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_input(path) as file:
            data = file.read(MAX_SESSION_BYTES + 1)
    except OSError as error:
        raise SessionFileError(
            f"Cannot load the session {path}: it cannot be read ({error.strerror}), expected a "
            "file written by /save. Check the name, and that you may read it."
        ) from error
    if len(data) > MAX_SESSION_BYTES:
        raise SessionFileError(
            f"Cannot load the session {path}: it has more than {MAX_SESSION_BYTES} bytes, the most "
            "that a session may have. Check the name."
        )
    try:
        document = read_json_object(data)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise SessionFileError(
            f"Cannot load the session {path}: it is not JSON in UTF-8 ({error}), expected a file "
            "written by /save. Check the name, or take a copy of the file."
        ) from error
    found = document.get("format")
    if found != FORMAT:
        raise SessionFileError(
            f"Cannot load the session {path}: field format is {_show(found)}, expected "
            f'"{FORMAT}". Check the name; a newer qaflora may have written it.'
        )
    return document


def _conversation(fields: _Fields) -> Conversation:
    messages = [
        _Fields(fields.path, message, f"messages[{i}].")
        for i, message in enumerate(fields.list("messages"))
    ]
    system = None
    if messages and messages[0].values.get("role") == "system":
        system = messages.pop(0).text("content")
    for i, message in enumerate(messages):
        expected = "assistant" if i % 2 else "user"
        if message.values.get("role") != expected:
            message.fail("role", f'"{expected}"', message.values.get("role"))
    if len(messages) % 2:
        fields.fail("messages", "an answer to every question", f"{len(messages)} messages")
    return Conversation(system, _turns(messages))


def _turns(messages: Sequence[_Fields]) -> list[Turn]:
    turns = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        reason = answer.values.get("finish_reason", "stop")
        if reason not in FINISH_REASONS:
            answer.fail("finish_reason", f"one of {', '.join(FINISH_REASONS)}", reason)
        if not question.text("content").strip():
            question.fail("content", "a text that is not empty", "")
        turns.append(Turn(question.text("content"), answer.text("content"), reason))
    return turns


class _Fields:
    """An object of the file whose fields are read with their type checked."""

    def __init__(self, path: Path, values: Any, prefix: str = "") -> None:
        self.path, self._prefix = path, prefix
        if not isinstance(values, dict):
            self._prefix = ""
            self.fail(prefix.rstrip("."), "an object", values)
        self.values: dict[str, Any] = values

    def fail(self, key: str, expected: str, found: Any) -> NoReturn:
        raise SessionFileError(
            f"Cannot load the session {self.path}: field {self._prefix}{key} is {_show(found)}, "
            f"expected {expected}. Correct it, or load another file."
        )

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not is_unicode(value):
            self.fail(key, "a text", value)
        return value

    def list(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list):
            self.fail(key, "a list", value)
        return value

    def object(self, key: str) -> _Fields:
        return _Fields(self.path, self.values.get(key), f"{self._prefix}{key}.")


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
