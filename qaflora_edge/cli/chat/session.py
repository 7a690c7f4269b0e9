"""One chat with one Engine: what is asked, undone, switched, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qaflora_edge.chat.conversation import Conversation, Message, Turn
from qaflora_edge.chat.session_file import BundleIdentity, Session, load_session, save_session
from qaflora_edge.cli.options import check_prompt
from qaflora_edge.config import MAX_SEED
from qaflora_edge.errors import PromptError, QafloraError, StrategyError
from qaflora_edge.inference.request import make_sampling

if TYPE_CHECKING:
    from qaflora_edge.cli.chat.reply import Reply
    from qaflora_edge.engine import Engine
    from qaflora_edge.inference.generation import Generation
    from qaflora_edge.weighing.numbers import FusionWeights

_MESSAGE = ("message", "for example with iconv")
_Asked = tuple[list[int], str, tuple[str, ...]]  # token ids, strategy, adapters in use


class ChatSession:
    """A conversation, the Engine that answers it, and how.

    open_engine   opens the bundle with a context of so many tokens
    is_remote     whether it is an Engine of a server: it has what is used here of one
    n_ctx         that of the first Engine
    sampling      keywords of Engine.generate; a retry adds to the seed, or it would change nothing
    keep_history  whether earlier turns stay as they were read; may be changed between turns
    fusion        the weights of the last answer, if there was one
    progress      what is done before an answer, in words, once that is known
    """

    def __init__(
        self,
        open_engine: Callable[[int], Engine],
        n_ctx: int,
        identity: BundleIdentity,
        *,
        sampling: dict[str, Any],
        raw_prompt: bool = False,
        keep_history: bool = False,
        is_remote: bool = False,
    ) -> None:
        self._open_engine = open_engine
        self.engine, self.identity = open_engine(n_ctx), identity
        self.conversation = Conversation()
        self.fusion: FusionWeights | None = None
        self.progress: str | None = None
        self.sampling = sampling
        self._raw_prompt = raw_prompt
        self.keep_history, self.is_remote = keep_history, is_remote
        self._n_retry = 0
        self._asked: _Asked | None = None  # what the last answer answered
        self._asking: _Asked | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    @property
    def title(self) -> list[str]:
        """The base, its adapters, the strategy and what sampling holds off, in words."""
        names = ", ".join(self.engine.adapters) or "no adapters"
        parts = [self.engine.name, names, f"strategy {self.engine.strategy}"]
        penalty = self.sampling["repeat_penalty"]
        return parts if penalty == 1.0 else [*parts, f"repeat penalty {penalty:g}"]

    def check(self) -> None:
        """Raises ChatTemplateError when the base has no usable template and one is needed."""
        if not self._raw_prompt:
            self.engine.chat_tokens([{"role": "user", "content": "?"}])

    # turns

    def prepare(self, question: str, *, is_retry: bool = False) -> Callable[[], Generation]:
        """What makes the answer to a question, which is then not yet part of the conversation.

        Turns that have no room beside it drop out (`conversation.n_dropped`).

        Raises PromptError when the question cannot be asked.
        """
        check_prompt(question, *_MESSAGE)
        self._n_retry = self._n_retry + 1 if is_retry else 0
        n_ctx = self.engine.n_ctx
        room = min(self.sampling["max_tokens"], n_ctx // 4)
        tokens = self._fitted(question, n_ctx - room)
        sampling = dict(self.sampling)
        if sampling["seed"] is not None:
            sampling["seed"] = (sampling["seed"] + self._n_retry) % MAX_SEED
        self._asking = (tokens, self.engine.strategy, self.engine.adapters)
        keep_history = self.keep_history
        if is_retry and self.fusion is not None and self._asking == self._asked:
            # The same weights: what the context holds of the prompt is what it would read again.
            sampling["weights"] = replace(self.fusion, probe_ms=0.0)
            keep_history = True
        self._asked = None  # until there is an answer
        self.progress = None

        def tell(what: str, done: int, total: int) -> None:
            self.progress = f"{what} {100 * done // total} %"

        return lambda: self.engine.generate(
            tokens, keep_history=keep_history, on_progress=tell, **sampling
        )

    def _fitted(self, question: str, n_most: int) -> list[int]:
        try:
            return self.conversation.fit(question, self._tokens, n_most)
        except PromptError as error:
            raise PromptError(
                f"{error} In this chat /ctx N makes it larger, and the message is still in the "
                "history (Up)."
            ) from error

    def conclude(self, question: str, reply: Reply) -> str:
        """Add a question and what was answered to it; gives the reason of the answer's end.

        An answer that was stopped before it began adds nothing.
        """
        generation = reply.generation
        reason = "cancelled" if reply.is_stopped or generation is None else None
        reason = reason or (generation and generation.finish_reason) or "cancelled"
        if reason == "cancelled" and not reply.text:
            return reason
        self.conversation.turns.append(Turn(question, reply.text, reason))
        self.fusion = None if generation is None else generation.fusion
        self._asked = self._asking
        return reason

    def clear(self) -> None:
        """Forget all turns."""
        self.conversation = Conversation(system=self.conversation.system)
        self.fusion = None

    @property
    def n_token(self) -> int:
        """Tokens of the conversation so far, without turns that dropped out."""
        messages = self.conversation.messages(n_dropped=self.conversation.n_dropped)
        return len(self._tokens(messages)) if messages else 0

    def is_beyond(self, generation: Generation) -> bool:
        """Whether an answer went on where the base was not trained to."""
        return generation.n_prompt + generation.n_completion > self.engine.n_ctx_train

    def is_full(self, generation: Generation) -> bool:
        """Whether an answer ended because the context has no room for more."""
        return generation.n_prompt + generation.n_completion > self.engine.n_ctx

    def _tokens(self, messages: list[Message]) -> list[int]:
        if self._raw_prompt:
            text = "\n".join(message["content"] for message in messages) + "\n"
            return self.engine.tokenize(text)
        return self.engine.chat_tokens(messages)

    # how it is answered

    def set_sampling(self, option: str, value: float | None) -> None:
        """Set a keyword of Engine.generate. Raises OptionError, and changes nothing."""
        sampling = {**self.sampling, option: value}
        make_sampling(**sampling)
        self.sampling = sampling

    def reopen(self, n_ctx: int) -> None:
        """Change the size of the context, by another Engine.

        Raises a QafloraError, and stays with the size as it was, when that cannot be.
        """
        before = self.engine
        before.close()
        try:
            self.engine = self._open_engine(n_ctx)
        except QafloraError:
            self.engine = self._open_engine(before.n_ctx)
            raise
        finally:
            self._use(before.strategy, before.adapters)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt of the whole conversation, from the next turn on.

        Raises a QafloraError, and changes nothing, when the base's template takes none or the
        context is too small for it.
        """
        self._check_system(text)
        self.conversation.system = text

    def _check_system(self, text: str | None) -> None:
        if text is None:
            return
        check_prompt(text, *_MESSAGE)
        n_ctx = self.engine.n_ctx
        if len(self._tokens(Conversation(system=text).messages("?"))) > n_ctx - n_ctx // 4:
            raise PromptError(
                f"The system prompt leaves less than a quarter of the context of {n_ctx} tokens, "
                "expected more room for questions and answers. Shorten it, or raise the context "
                "(--ctx)."
            )

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
        chosen = set(names or loaded)
        in_use = set(self.engine.adapters)
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
        self._check_system(session.conversation.system)
        self.conversation, self.fusion = session.conversation, None
        warnings = [f"saved with another bundle: {', '.join(differences)}"] if differences else []
        return warnings + self._follow(session)

    def _follow(self, session: Session) -> list[str]:
        """Answer as the saved session did, as far as this bundle can."""
        off = set(session.bundle.adapters) - set(session.adapters)
        names = [name for name in self.engine.loaded_adapters if name not in off]
        before = self.engine.strategy, self.engine.adapters
        try:
            self._use(session.strategy, names)
        except QafloraError as error:
            self._use(*before)
            return [f"its strategy is not used here: {error}"]
        return []

    def _use(self, strategy: str, names: Sequence[str]) -> None:
        self.engine.use_strategy("base")  # which fits any adapters
        self.engine.use_adapters(names)
        self.engine.use_strategy(strategy)
