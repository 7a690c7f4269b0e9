"""One chat with one Engine: what is asked, undone, switched, saved and loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qaflora_edge.bundles.open import base_of
from qaflora_edge.chat.conversation import (
    Conversation,
    Message,
    Session,
    Turn,
    bundle_identity,
    load_session,
    save_session,
)
from qaflora_edge.cli.options import SharedOptions, bundle_folder, check_prompt, open_engine
from qaflora_edge.config import MAX_SEED
from qaflora_edge.errors import PromptError, QafloraError, StrategyError
from qaflora_edge.formats.gguf import kv_bytes, read_gguf_header
from qaflora_edge.inference.request import make_sampling

if TYPE_CHECKING:
    from qaflora_edge.inference.generation import Generation
    from qaflora_edge.progress import Tell
    from qaflora_edge.weighing.numbers import FusionWeights

_MESSAGE = ("message", "for example with iconv")
_Asked = tuple[list[int], str, tuple[str, ...]]  # token ids, strategy, adapters in use
_LARGEST, _LEAST = 8192, 2048  # tokens of a context that nobody chose
_MEMORY_PART = 8  # an eighth of this machine's memory for its KV state


def context_size(folder: Path, kv_type: str) -> int:
    """Choose the tokens of a chat's context: what the base was trained for, within memory."""
    base_path = base_of(folder)
    if base_path is None:  # opening the bundle says so
        return _LEAST
    header = read_gguf_header(base_path)
    n_train = header.metadata.get(f"{header.architecture}.context_length")
    size = min(_LARGEST, n_train if isinstance(n_train, int) and n_train > 0 else _LEAST)
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return size
    n_most = memory / _MEMORY_PART / kv_bytes(header, kv_type)
    return size if size <= n_most else max(_LEAST, int(n_most))


class ChatSession:
    """A conversation, the Engine that answers it, and how.

    sampling      keywords of Engine.generate; a retry adds to the seed, or it would change nothing
    keep_history  keep the KV state of earlier turns; may be changed between turns
    fusion        the weights of the last answer, if there was one
    """

    def __init__(
        self,
        bundle: str,
        options: SharedOptions,
        *,
        keep_history: bool = False,
        is_plain: bool = False,
    ) -> None:
        folder = bundle_folder(bundle)
        n_ctx = context_size(folder, options.kv_type) if options.ctx is None else options.ctx
        self._options = options
        self.engine = open_engine(bundle, options, is_quiet=is_plain, n_ctx=n_ctx, n_parallel=1)
        self.identity = bundle_identity(folder)
        self.conversation = Conversation()
        self.fusion: FusionWeights | None = None
        self.sampling, self.keep_history = options.sampling, keep_history
        self._n_retry = 0
        self._asked: _Asked | None = None  # what the last answer answered
        self._asking: _Asked | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    @property
    def title(self) -> list[str]:
        """The base, its adapters, the strategy and the repeat penalty, in words."""
        names = ", ".join(self.engine.adapters) or "no adapters"
        parts = [self.engine.name, names, f"strategy {self.engine.strategy}"]
        penalty = self.sampling["repeat_penalty"]
        return parts if penalty == 1.0 else [*parts, f"repeat penalty {penalty:g}"]

    def check(self) -> None:
        """Raise ChatTemplateError when the base has no usable template and one is needed."""
        if not self._options.raw_prompt:
            self.engine.chat_tokens([{"role": "user", "content": "?"}])

    # turns

    def prepare(
        self, question: str, *, is_retry: bool = False
    ) -> Callable[[threading.Event, Tell], Generation]:
        """Make what answers a question, which is not yet part of the conversation.

        Turns that do not fit drop out (`conversation.n_dropped`). The answer ends once the event
        is set. Raises PromptError when the question cannot be asked.
        """
        check_prompt(question, *_MESSAGE)
        self._n_retry = self._n_retry + 1 if is_retry else 0
        n_ctx = self.engine.n_ctx
        try:
            room = min(self.sampling["max_tokens"], n_ctx // 4)
            tokens = self.conversation.fit(question, self._tokens, n_ctx - room)
        except PromptError as error:
            raise PromptError(
                f"{error} For a larger context: /save FILE, then `qaflora chat --load FILE "
                "--ctx N`."
            ) from error
        sampling = dict(self.sampling)
        if sampling["seed"] is not None:
            sampling["seed"] = (sampling["seed"] + self._n_retry) % MAX_SEED
        self._asking = (tokens, self.engine.strategy, self.engine.adapters)
        sampling["keep_history"] = self.keep_history
        if is_retry and self.fusion is not None and self._asking == self._asked:
            # The same weights: the KV state of the prompt is what prefill would give again.
            sampling |= {"weights": replace(self.fusion, probe_ms=0.0), "keep_history": True}
        self._asked = None  # until there is an answer
        return lambda stop, tell: self.engine.generate(
            tokens, cancel=stop, on_progress=tell, **sampling
        )

    def conclude(self, question: str, answer: str, reason: str, generation: Generation) -> None:
        """Add a question and its answer to the conversation."""
        self.conversation.turns.append(Turn(question, answer, reason))
        self.fusion, self._asked = generation.fusion, self._asking

    def clear(self) -> None:
        """Forget all turns."""
        self.conversation = Conversation(system=self.conversation.system)
        self.fusion = None

    @property
    def n_token(self) -> int:
        """Tokens of the conversation so far, without turns that dropped out."""
        messages = self.conversation.messages(n_dropped=self.conversation.n_dropped)
        return len(self._tokens(messages)) if messages else 0

    def _tokens(self, messages: list[Message]) -> list[int]:
        if self._options.raw_prompt:
            text = "\n".join(message["content"] for message in messages) + "\n"
            return self.engine.tokenize(text)
        return self.engine.chat_tokens(messages)

    # how it is answered

    def set_sampling(self, option: str, value: float | None) -> None:
        """Set a keyword of Engine.generate. Raises OptionError, and changes nothing."""
        sampling = {**self.sampling, option: value}
        make_sampling(**sampling)
        self.sampling = sampling

    def set_system(self, text: str | None) -> None:
        """Change the system prompt of the whole conversation, from the next turn on.

        Raises a QafloraError, and changes nothing, when the base's template takes none or the
        context is too small for it.
        """
        if text is not None:
            check_prompt(text, *_MESSAGE)
            n_ctx = self.engine.n_ctx
            if len(self._tokens(Conversation(system=text).messages("?"))) > n_ctx - n_ctx // 4:
                raise PromptError(
                    f"The system prompt leaves less than a quarter of the context of {n_ctx} "
                    "tokens, expected more room for questions and answers. Shorten it, or raise "
                    "the context (--ctx)."
                )
        self.conversation.system = text

    def switch(self, names: list[str], *, is_on: bool) -> None:
        """Take adapters into use, or out of it; all of them where none is named.

        Raises StrategyError for an unknown name.
        """
        loaded = self.engine.loaded_adapters
        unknown = [name for name in names if name not in loaded]
        if unknown:
            raise StrategyError(
                f"The adapter {unknown[0]!r} is not in this bundle; expected one of: "
                f"{', '.join(loaded) or 'none is there'}. See /adapters."
            )
        chosen, in_use = set(names or loaded), set(self.engine.adapters)
        self.engine.use_adapters(sorted(in_use | chosen if is_on else in_use - chosen))

    # files

    def save(self, path: Path) -> None:
        """Write the session file. Raises OutputFileError."""
        engine = self.engine
        session = Session(self.identity, self.conversation, engine.strategy, engine.adapters)
        save_session(path, session)

    def load(self, path: Path) -> list[str]:
        """Go on with a saved conversation; gives warnings. Raises SessionFileError."""
        session = load_session(path)
        differences = session.bundle.differences(self.identity)
        self.set_system(session.conversation.system)
        self.conversation, self.fusion = session.conversation, None
        others = f"saved with another bundle; different here: {', '.join(differences)}"
        warnings = [others] if differences else []
        off = set(session.bundle.adapters) - set(session.adapters)
        before = self.engine.strategy, self.engine.adapters
        try:
            used = [name for name in self.engine.loaded_adapters if name not in off]
            self._use(session.strategy, used)
        except QafloraError as error:
            self._use(*before)
            warnings.append(f"its strategy is not used here: {error}")
        return warnings

    def _use(self, strategy: str, names: Sequence[str]) -> None:
        self.engine.use_strategy("base")  # which fits any adapters
        self.engine.use_adapters(names)
        self.engine.use_strategy(strategy)
