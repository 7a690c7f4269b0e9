"""What a caller wants: a prompt, who answers it, how, and how tokens are chosen.

Every edge makes an Ask: commands, evaluation, each dialect of HTTP, and the keywords of
Engine. Its values are checked here, once, by `config`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from qaflora_edge.config import DEFAULTS, check
from qaflora_edge.errors import OptionError, QafloraError, wrong_option
from qaflora_edge.progress import Tell, silent

if TYPE_CHECKING:
    from qaflora_edge.prompt.calls import Calls
    from qaflora_edge.weighing.plan import FusionWeights
    from qaflora_edge.weighing.weigher import Weights


@dataclass(frozen=True)
class Thinking:
    """Say how a base writes a thought before its answer to one prompt.

    begin, end  the tags around it
    is_open     whether the prompt has begun it
    n_weighed   tokens of the prompt before a thought that the chat template began: all, if none
    closing     tokens that end a thought
    tags        token -> bytes, of tags that are tokens of their own
    """

    begin: str = "<think>"
    end: str = "</think>"
    is_open: bool = False
    n_weighed: int = 0
    closing: Sequence[int] = ()
    tags: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt as the base reads it; prompt.tokens.read_prompt makes it.

    tokens    ids
    question  where the text of the last user turn begins and ends; None: plain text
    is_later  whether another user turn is before it
    thinking  how the base thinks before it answers; None: it does not
    calls     how it calls the tools that it was told of; None: it was told of none
    neutral   neutral prompts, each as usual, and behind this one's system prompt; none where this
              one begins as usual
    n_weighed tokens up to where the question's answer began, if tools have given results since:
              they are no question; None: nothing has
    """

    tokens: tuple[int, ...]
    question: tuple[int, int] | None = None
    is_later: bool = False
    thinking: Thinking | None = None
    calls: "Calls | None" = None
    neutral: tuple[tuple["Prompt", "Prompt"], ...] = field(default=(), repr=False)
    n_weighed: int | None = None


@dataclass(frozen=True)
class Tools:
    """Name the tools that a conversation offers.

    offered    in OpenAI's shape, checked
    required   those of which one has to be called
    is_single  whether only the first call of an answer counts
    """

    offered: Sequence[Mapping[str, Any]]
    required: Sequence[Mapping[str, Any]] = ()
    is_single: bool = False


@dataclass(frozen=True)
class Chat:
    """Ask with a conversation under the base's chat template.

    messages     in OpenAI's shape
    continue_final_message  whether the answer goes on from the last message; None: where it is an
                 assistant's, without tool calls
    add_generation_prompt   False: end without the beginning of an answer
    chat_template_kwargs    further variables of the template, such as enable_thinking
    untemplated  what is asked of a base without a chat template; None: that is an error
    """

    messages: Sequence[Any]
    tools: Tools | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    untemplated: str | None = None


@dataclass(frozen=True)
class Gap:
    """Ask for what stands between two texts, of a base for code.

    files     other ones of the project: names and texts
    n_answer  tokens to leave for the answer; at least 128, and half of the context at most
    n_prompt  most tokens of the prompt
    """

    prefix: str
    suffix: str
    files: Sequence[tuple[str, str]] = ()
    n_answer: int = 0
    n_prompt: int = 4096


Plain = str | Sequence[int]  # a text as it is, or ids
Question = Prompt | Chat | Gap | Plain


@dataclass(frozen=True)
class Weighing:
    """Say who is weighed, and how.

    by        weights, or a strategy; None: the Engine's
    adapters  those to weigh; None: those in use
    prefill   who prefills the prompt, of config.PREFILLS; None: the Engine's
    relays    False: one mix answers, where the strategy would let one draft and another write
    drafts    whether who answers drafts, unbound, before an answer that a grammar binds; None: an
              adapter does, the base does not
    """

    by: "Weights" = None
    adapters: Sequence[str] | None = None
    prefill: str | None = None
    relays: bool = True
    drafts: bool | None = None

    def __post_init__(self) -> None:
        check("weighing", {"prefill": self.prefill})


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are chosen and when to stop: the options of `config` in group sampling.

    max_tokens   None: until the context is full
    temperature  0, or below 1e-6: greedy
    seed         None: the Engine's, or a new one each time
    stop         texts that end the answer; they are not part of it
    reasoning_budget  tokens of a thought after which it is closed; -1: no limit
    grammar      what the answer follows: GBNF text, or a constraint.Grammar
    logit_bias   token id, as a number or in digits -> what is added to its logit
    logprobs     None, or how many of the likeliest tokens are kept beside each one that is chosen

    Raises OptionError for a wrong value.
    """

    max_tokens: int | None = DEFAULTS["max_tokens"]
    temperature: float = DEFAULTS["temperature"]
    top_p: float = DEFAULTS["top_p"]
    top_k: int = DEFAULTS["top_k"]
    min_p: float = DEFAULTS["min_p"]
    repeat_penalty: float = DEFAULTS["repeat_penalty"]
    presence_penalty: float = DEFAULTS["presence_penalty"]
    frequency_penalty: float = DEFAULTS["frequency_penalty"]
    seed: int | None = DEFAULTS["seed"]
    stop: tuple[str, ...] = DEFAULTS["stop"]
    reasoning_budget: int = DEFAULTS["reasoning_budget"]
    grammar: str | None = DEFAULTS["grammar"]
    logit_bias: Mapping[int | str, float] | None = DEFAULTS["logit_bias"]
    logprobs: int | None = DEFAULTS["logprobs"]

    def __post_init__(self) -> None:
        check("sampling", vars(self))

    def updated(self, options: Mapping[str, Any]) -> Self:
        """Replace what a caller's options say; `stop` is one text, several or None.

        Raises OptionError for an unknown option, or a wrong value.
        """
        changes = dict(options)
        stop = changes.get("stop", self.stop)
        if stop is None:
            stop = ()
        changes["stop"] = (stop,) if isinstance(stop, str) else stop
        check("sampling", changes)
        changes["stop"] = tuple(changes["stop"])
        return replace(self, **changes)


@dataclass(frozen=True)
class Ask:
    """Ask for answers.

    prompt       what is asked: a text as it is, a conversation, a gap in code, or token ids
    json_schema  what the answer fits; True: any JSON; None: sampling.grammar, or nothing
    n            answers; the others have the next seeds
    cancel       once it is set, the answer ends as by Generation.cancel
    on_weights   called with the weights once they are known
    on_progress  called with "weighing" or "reading", how many tokens of the prompt are done, and
                 how many it has
    on_draft     called while drafts decide who answers, with the text so far of the answer that is
                 given unless they decide otherwise
    parse_special  of texts: control tokens that are spelt out are control tokens, and a thought is
                 part of the answer
    waits        prefill before the answer is returned
    """

    prompt: Question
    weighing: Weighing = Weighing()
    sampling: Sampling = Sampling()
    json_schema: Mapping[str, Any] | bool | None = None
    n: int = 1
    cancel: threading.Event | None = None
    on_weights: "Callable[[FusionWeights], Any]" = silent
    on_progress: Tell = silent
    on_draft: Callable[[str], Any] = silent
    parse_special: bool = False
    waits: bool = True

    def __post_init__(self) -> None:
        check("answers", {"n": self.n})
        if self.cancel is not None and not callable(getattr(self.cancel, "is_set", None)):
            raise wrong_option("cancel", self.cancel, "a threading.Event")


def asked(
    prompt: Question,
    *,
    weights: "Weights" = None,
    strategy: str | None = None,
    adapters: Sequence[str] | None = None,
    prefill: str | None = None,
    draft: bool | None = None,
    json_schema: Mapping[str, Any] | bool | None = None,
    n: int = 1,
    parse_special: bool = False,
    on_weights: "Callable[[FusionWeights], Any] | None" = None,
    on_progress: Tell | None = None,
    on_draft: Callable[[str], Any] | None = None,
    cancel: threading.Event | None = None,
    wait: bool = True,
    **sampling: Any,
) -> Ask:
    """Make an Ask of the keywords of Engine.generate."""
    return Ask(
        prompt,
        Weighing(one_of(weights, strategy), adapters, prefill, drafts=draft),
        Sampling().updated(sampling),
        json_schema,
        n,
        cancel,
        on_weights or silent,
        on_progress or silent,
        on_draft or silent,
        parse_special,
        wait,
    )


def one_of(weights: Any, strategy: str | None) -> Any:
    """Give weights, or else the strategy. Raises OptionError for both."""
    if weights is not None and strategy is not None:
        raise OptionError(f"Options strategy={strategy!r} and weights are given, expected one.")
    return weights if strategy is None else strategy


def asked_by(request: Plain | Mapping[str, Any], options: Mapping[str, Any]) -> Ask | QafloraError:
    """Make an Ask of one request of Engine.generate_many, or give what is wrong with it."""
    try:
        if not isinstance(request, Mapping):
            return asked(request, **options)
        keywords = dict(options) | dict(request)
        prompt = keywords.pop("prompt", None)
        messages = keywords.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise OptionError(
                f"A request has {', '.join(map(str, request)) or 'nothing'}, expected either "
                "prompt or messages, and options of generate."
            )
        return asked(Chat(messages) if prompt is None else prompt, **keywords)
    except QafloraError as error:
        return error
