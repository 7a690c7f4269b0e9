"""The system prompt of a bundle: put before conversations that have none, and read once.

What the probe reads of it depends on nothing that is asked, so it is kept from one Engine to the
next, in a file of the cache.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaflora_edge import __version__
from qaflora_edge.backend.model import PLACING
from qaflora_edge.chat.messages import Message
from qaflora_edge.chat.tokens import chat_tokens
from qaflora_edge.errors import OutputFileError
from qaflora_edge.inference.core import Core
from qaflora_edge.inference.prefix_file import prefix_path, read_prefix, write_prefix


def begin_with(system: str, messages: Sequence[Message]) -> Sequence[Message]:
    """Messages behind a system prompt, where they do not begin with one."""
    if not system or not isinstance(messages, list | tuple) or not messages:
        return messages  # what is no conversation is refused elsewhere
    first = messages[0]
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


class SystemPrompt:
    """What was read of a system prompt, taken out of the cache at once if it is there.

    hashes   of the base and its adapters
    options  of every context
    """

    def __init__(
        self, core: Core, text: str, hashes: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        self._core = core
        questions = ("?", "A question")
        first, second = (
            tuple(
                chat_tokens(core.model, begin_with(text, [{"role": "user", "content": question}]))
            )
            for question in questions
        )
        self._rows = tuple(range(len(core.adapters)))
        pieces = core.context.pieces(1 + len(self._rows))
        self._tokens, self._n_token = first, pieces.n_alike(first, second)
        functions, lib = core.model._functions, core.model._lib
        self._facts = {
            "version": __version__,
            "build": functions.build_info().decode(),
            "cpu": lib.llama_print_system_info().decode(),
            "kernels": os.environ.get("QAFLORA_CPU_KERNELS", ""),
            "pieces": [pieces.n_full, pieces.n_least, pieces.n_message],
            "hashes": list(hashes),
            "options": {
                name: options[name] for name in ("kv_type", "adapter_type", "flash_attn", *PLACING)
            },
            "tokens": list(first[: self._n_token]),
        }
        if self._n_token and (state := read_prefix(self._facts)):
            core.prober.prefixes.pin(self._rows, state)

    def keep(self) -> Path | None:
        """Put what was read of it into the cache, reading it first where it was not.

        returns  the file, or None where prompts cannot go on from it: where it is too short, or a
                 template writes it into the question, or the memory cannot forget an end

        Raises OutputFileError.
        """
        if not self._n_token or len(self._tokens) > self._core.n_ctx:
            return None
        path = prefix_path(self._facts)
        if path.is_file():
            return path
        prober = self._core.prober
        state = self._core.run(prober.prefix(self._tokens, self._rows, self._n_token))
        if state is None:
            return None
        prober.prefixes.pin(self._rows, state)
        return write_prefix(self._facts, state)

    def keep_if_read(self) -> None:
        """The same, where something was probed; a cache that cannot be written to is left alone."""
        if self._core.prober.contexts:
            try:
                self.keep()
            except OutputFileError:
                return
