"""A chat as a file: versioned JSON with the messages and what they were answered with.

    {"format": "qaflora-session/1",
     "bundle": {"name": "...", "base_sha256": "...", "adapters": {"math": "sha256", ...}},
     "strategy": "qa-flora", "adapters": ["math"],
     "messages": [{"role": "user", "content": "..."},
                  {"role": "assistant", "content": "...", "finish_reason": "stop"}]}

`adapters` are those in use. A file may come from anywhere: everything is checked before use.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from qaflora_edge.chat.conversation import Conversation, Turn
from qaflora_edge.errors import OutputFileError, SessionFileError
from qaflora_edge.files import atomic_path, read_input, readable
from qaflora_edge.formats.bundle import is_base, read_bundle_text
from qaflora_edge.formats.checksums import checksum
from qaflora_edge.formats.json_text import WrongField, check_schema, read_json_object, shown

FORMAT = "qaflora-session/1"
MAX_SESSION_BYTES = 16 << 20
_IDENTITY = ("name", "base_sha256", "adapters")


@dataclass(frozen=True)
class BundleIdentity:
    """Which bundle a conversation was had with.

    adapters  name -> SHA-256 of its file
    """

    name: str
    base_sha256: str
    adapters: dict[str, str] = field(default_factory=dict)

    def differences(self, other: Self) -> list[str]:
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
    """The identity of a bundle by its bundle.json, or of a base alone. Raises BundleError."""
    if is_base(folder):
        return BundleIdentity(readable(folder.name), checksum(folder))
    text = read_bundle_text(folder)
    return BundleIdentity(
        name=text.name or readable(folder.name),
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
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    with atomic_path(path, mode=0o600) as temporary:  # for its owner alone
        temporary.write_bytes(text.encode("utf-8"))


def load_session(path: Path) -> Session:
    """Read a session file. Raises SessionFileError when it is missing or not what it should be."""
    document = _read(path)
    try:
        check_schema(document, "session")
        return Session(
            bundle=BundleIdentity(**{key: document["bundle"][key] for key in _IDENTITY}),
            conversation=_conversation(document["messages"]),
            strategy=document["strategy"],
            adapters=tuple(document["adapters"]),
        )
    except WrongField as problem:
        raise SessionFileError(
            f"Cannot load the session {path}: {problem}. Correct it, or load another file."
        ) from problem


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
        document = read_json_object(read_input(path, MAX_SESSION_BYTES))
    except OSError as error:
        raise SessionFileError(
            f"Cannot load the session {path}: it cannot be read ({error.strerror}), expected a "
            "file written by /save. Check the name, and that you may read it."
        ) from error
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise SessionFileError(
            f"Cannot load the session {path}: it is no session as JSON in UTF-8 ({error}), "
            "expected a file written by /save. Check the name, or take a copy of the file."
        ) from error
    found = document.get("format")
    if found != FORMAT:
        raise SessionFileError(
            f"Cannot load the session {path}: field format is {shown(found)}, expected "
            f'"{FORMAT}". Check the name; a newer qaflora may have written it.'
        )
    return document


def _conversation(messages: Sequence[Mapping[str, str]]) -> Conversation:
    n_system = int(bool(messages) and messages[0]["role"] == "system")
    for place, message in enumerate(messages[n_system:], n_system):
        expected = "assistant" if (place - n_system) % 2 else "user"
        if message["role"] != expected:
            field = f"messages[{place}].role"
            raise WrongField(field, shown(message["role"]), shown(expected))
        if expected == "user" and not message["content"].strip():
            field = f"messages[{place}].content"
            raise WrongField(field, shown(message["content"]), "a text that is not empty")
    questions, answers = messages[n_system::2], messages[n_system + 1 :: 2]
    if len(questions) != len(answers):
        raise WrongField("messages", f"a list of {len(messages)}", "an answer to every question")
    return Conversation(
        messages[0]["content"] if n_system else None,
        [
            Turn(question["content"], answer["content"], answer.get("finish_reason", "stop"))
            for question, answer in zip(questions, answers, strict=True)
        ],
    )
