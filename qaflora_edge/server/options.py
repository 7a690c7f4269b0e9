"""What a server is started with, and its limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_HEAD_BYTES = 64 << 10  # of a request: its first line and its headers
MAX_BODY_BYTES = 4 << 20
MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_LIGHT_CHARS = 64 << 10  # of a text that is tokenized without a turn: some take seconds
MAX_TOOLS = 128
MAX_CHOICES = 16  # answers of one request
MAX_STOPS = 16
MAX_WEIGHT = 100.0  # of a request, up or down: states overflow at some number beyond
MAX_FORM_BYTES = 256 << 10  # a grammar, a schema or tools, as JSON

HEAD_S = 60.0  # the longest that a connection may take to send a head
BODY_S = 60.0  # the longest that a body may take to come
PING_S = 5.0  # a stream that has nothing to say says so after as long
PIECE_BYTES = 64 << 10
SEND_S = 60.0  # the longest that a client may take to read a piece of an answer
RETRY_AFTER_S = 2
DRAIN_S = 30.0  # what is running may take as long to end when the server is told to
CUT_S = 5.0  # and then as long to say that it was cut


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server answers.

    api_key       what requests have to carry, None: nothing
    cors_origins  origins of pages that may ask beside our own; "*" is all
    hosts         names that requests may call the server by, None: any
    max_queue     requests that may wait
    timeout_s     the longest that a request may take
    logs_prompts  whether the log holds what was asked
    engine        keywords of every Engine
    sampling      keywords of Engine.generate where a request says nothing
    raw_prompt    chats are joined line by line, without the base's template
    """

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    max_queue: int = 64
    timeout_s: float = 600.0
    logs_prompts: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    raw_prompt: bool = False

    @property
    def n_turn(self) -> int:
        """Requests of a bundle that are answered at once.

        One more than are decoded together: it is weighed meanwhile.
        """
        n_parallel = int(self.engine.get("n_parallel", 1))
        return n_parallel + 1 if n_parallel > 1 else 1
