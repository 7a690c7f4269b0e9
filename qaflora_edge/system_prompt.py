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
from qaflora_edge.backend.probe_context import KvState
from qaflora_edge.chat.messages import begin_with
from qaflora_edge.chat.tokens import chat_tokens
from qaflora_edge.inference.core import Core
from qaflora_edge.inference.prefix_file import prefix_path, read_prefix, write_prefix
from qaflora_edge.weighing.base_probe import BASE
from qaflora_edge.weighing.strategy import Sequences


class SystemPrompt:
    """What was read of a system prompt.

    hashes   of the base and its adapters
    options  of every context

    reads, in all methods: which sequences read it under the strategy in use, see Strategy.reads.
    """

    def __init__(
        self, core: Core, text: str, hashes: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        self._core = core
        questions = ("?", "A question")
        self._first, self._second = (
            tuple(
                chat_tokens(core.model, begin_with(text, [{"role": "user", "content": question}]))
            )
            for question in questions
        )
        self._rows = tuple(range(len(core.adapters)))
        functions, lib = core.model._functions, core.model._lib
        self._facts = {
            "version": __version__,
            "build": functions.build_info().decode(),
            "cpu": lib.llama_print_system_info().decode(),
            "kernels": os.environ.get("QAFLORA_CPU_KERNELS", ""),
            "hashes": list(hashes),
            "options": {
                name: options[name] for name in ("kv_type", "adapter_type", "flash_attn", *PLACING)
            },
        }

    def _of(self, reads: Sequences) -> dict[str, Any] | None:
        """The facts of its file; None where there is nothing to keep."""
        if reads == "none":
            return None
        pieces = self._core.context.pieces(1 if reads == "base" else 1 + len(self._rows))
        n = pieces.n_alike(self._first, self._second)
        cuts = [pieces.n_full, pieces.n_least, pieces.n_message]
        tokens = list(self._first[:n])
        return {**self._facts, "reads": reads, "pieces": cuts, "tokens": tokens} if n else None

    def pin(self, reads: Sequences) -> None:
        """Take it out of the cache, if it is there: prompts go on from it."""
        facts = self._of(reads)
        if facts is not None and (state := read_prefix(facts)):
            self._pin(reads, state)

    def _pin(self, reads: Sequences, state: KvState) -> None:
        self._core.prober.prefixes.pin(BASE if reads == "base" else self._rows, state)

    def keep(self, reads: Sequences) -> Path | None:
        """Put it into the cache, reading it first where it was not.

        returns  the file, or None where prompts cannot go on from it: where the strategy reads
                 nothing, or it is too short, or a template writes it into the question, or the
                 memory cannot forget an end, or has a sliding window that has moved on

        Raises OutputFileError.
        """
        facts = self._of(reads)
        if facts is None or len(self._first) > self._core.n_ctx:
            return None
        path = prefix_path(facts)
        if path.is_file():
            return path
        prober, n = self._core.prober, len(facts["tokens"])
        if reads == "base":
            state = self._core.run(prober.base.prefix(self._first, n))
        else:
            state = self._core.run(prober.prefix(self._first, self._rows, n))
        if state is None:
            return None
        self._pin(reads, state)
        return write_prefix(facts, state)
