"""Conversations as data: what is asked, undone, cut to a context, saved and loaded.

A session file is versioned JSON, and may come from anywhere; docs/chat.md has its format.
Loading takes the messages alone.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from qaflora_edge.errors import OutputFileError, PromptError, SessionFileError
from qaflora_edge.files import atomic_path, readable
from qaflora_edge.formats.bundle import is_base, read_bundle_text
from qaflora_edge.formats.inputs import (
    Json,
    WrongField,
    checksum,
    read_as,
    read_input,
    read_json_object,
    shown,
)

Message = dict[str, str]
FORMAT = "qaflora-session/1"
MAX_SESSION_BYTES = 16 << 20


class SaidMessage(Struct, kw_only=True, omit_defaults=True):
    """A message of a session file; finish_reason is of an answer, "stop" when missing."""

    role: Literal["system", "user", "assistant"]
    content: str
    finish_reason: Literal["stop", "length", "cancelled"] | None = None


class Session(Struct, kw_only=True):
    """The fields that are read of a session file.

    messages  after an optional one of the system a user's and an assistant's in turns
    """

    format: Annotated[Literal["qaflora-session/1"], Meta(title=f'"{FORMAT}"')]
    messages: list[SaidMessage]


@dataclass
class Conversation:
    """A system prompt, and turns of two messages, a user's and an assistant's.

    said       an answer's finish_reason is "stop", "length" (cut at a limit) or "cancelled"
    n_dropped  how many of the oldest turns are no longer sent; they are kept all the same
    """

    system: str | None = None
    said: list[Message] = field(default_factory=list)
    n_dropped: int = 0

    @property
    def n_turn(self) -> int:
        return len(self.said) // 2

    def messages(self, question: str, *, n_dropped: int = 0) -> list[Message]:
        """Join the system prompt, the turns without the oldest ones, and a new question."""
        messages = _system(self.system)
        for message in self.said[2 * n_dropped :]:
            messages.append({"role": message["role"], "content": message["content"]})
        messages.append({"role": "user", "content": question})
        return messages

    @property
    def last_question(self) -> list[Message] | None:
        """Give what was sent with the last question, and it; None where nothing was asked."""
        if not self.said:
            return None
        before = Conversation(self.system, self.said[:-2])
        n_dropped = min(self.n_dropped, before.n_turn)
        return before.messages(self.said[-2]["content"], n_dropped=n_dropped)

    def add(self, question: str, answer: str, finish_reason: str = "stop") -> None:
        self.said.append({"role": "user", "content": question})
        self.said.append({"role": "assistant", "content": answer, "finish_reason": finish_reason})

    def undo(self) -> list[Message]:
        """Take back the last turn, if there is one."""
        turn = self.said[-2:]
        self.said = self.said[:-2]
        self.n_dropped = min(self.n_dropped, self.n_turn)
        return turn

    def fit(
        self, question: str, tokenize: Callable[[list[Message]], list[int]], n_most: int
    ) -> list[int]:
        """Tokenize the conversation with a new question, to at most n_most tokens where possible.

        When they are too many, the older half of the turns drops out and stays out (`n_dropped`),
        as often as needed. Dropping one turn each time would prefill every prompt from its start.
        The system prompt and the question always stay.

        tokenize  messages -> token ids; raises PromptError when they are too many

        Raises PromptError, and drops nothing, when system prompt and question alone are too long.
        """
        n_dropped = self.n_dropped
        while n_dropped < self.n_turn:
            with suppress(PromptError):
                tokens = tokenize(self.messages(question, n_dropped=n_dropped))
                if len(tokens) <= n_most:
                    break
            n_dropped += (self.n_turn - n_dropped + 1) // 2
        else:
            tokens = tokenize(self.messages(question, n_dropped=n_dropped))
        self.n_dropped = n_dropped
        return tokens


def bundle_identity(folder: Path) -> Json:
    """Identify a bundle by its bundle.json, or a base alone: `bundle` of a session file."""
    name = readable(folder.name)
    if is_base(folder):
        return {"name": name, "base_sha256": checksum(folder), "adapters": {}}
    text = read_bundle_text(folder)
    return {
        "name": text.name or name,
        "base_sha256": text.base.sha256,
        "adapters": {adapter.name: adapter.sha256 for adapter in text.adapters},
    }


def save_session(path: Path, conversation: Conversation, **how: Any) -> None:
    """Write a session file whole or not at all, over an older session file only.

    how  `bundle`, `strategy` and `adapters` of the file
    """
    if path.exists():
        try:
            load_session(path)
        except SessionFileError as error:
            raise OutputFileError(
                f"Cannot save the session to {path}: something else is there, expected no file or "
                "an older session file. Choose another name."
            ) from error
    messages = [*_system(conversation.system), *conversation.said]
    document = {"format": FORMAT, **how, "messages": messages}
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    with atomic_path(path, mode=0o600) as temporary:  # for its owner alone
        temporary.write_bytes(text.encode("utf-8"))


def load_session(path: Path) -> Conversation:
    """Read the conversation of a session file. Raises SessionFileError when it holds none."""
    try:
        document = read_json_object(read_input(path, MAX_SESSION_BYTES))
        session = read_as(Session, document)
        messages: list[Message] = msgspec.to_builtins(session.messages)
        system = None
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            expected = "a user's and an assistant's in turns, after at most one of system"
            raise WrongField("messages", f"a list of {shown(roles)}", expected)
        return Conversation(system, messages)
    except (OSError, ValueError) as error:  # errors of JSON and UTF-8 too
        reason = error.strerror if isinstance(error, OSError) else error
        raise SessionFileError(
            f"Cannot load the session {path}: {reason}; expected a file written by /save. Check "
            "the name, or take a copy of the file."
        ) from error


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]
