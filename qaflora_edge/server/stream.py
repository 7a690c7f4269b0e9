"""Answers as bytes: JSON, and server-sent events."""

import json
from typing import Any

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def encoded(value: Any) -> bytes:
    """JSON in UTF-8; half of a surrogate pair, which a model may be made to write, is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii")


def event(value: Any, name: str = "") -> bytes:
    """One event of a stream."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encoded(value) + b"\n\n"
