"""How a server is started."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server answers.

    api_key       what requests have to carry, None: nothing
    cors_origins  origins of pages that may ask beside our own; "*" is all
    hosts         names that requests may call the server by, None: any
    max_queue     requests that may wait
    max_models    bundles that are open at the same time, None: all
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
    max_models: int | None = None
    timeout_s: float = 600.0
    logs_prompts: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    raw_prompt: bool = False

    @property
    def n_slot(self) -> int:
        """Requests of a bundle that are answered at once.

        One more than are decoded together: it is weighed at the same time.
        """
        n_parallel = int(self.engine.get("n_parallel", 1))
        return n_parallel + 1 if n_parallel > 1 else 1
