"""Prompts to tokens: texts, ids, and conversations under the base's own chat template.

They are checked here against the vocabulary and the context.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from numbers import Integral
from typing import Any

from qaflora_edge.ask import Chat, Gap, Plain, Prompt, Question, Thinking
from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.model import Model
from qaflora_edge.config import MAX_CTX
from qaflora_edge.errors import (
    ChatTemplateError,
    ContextError,
    OptionError,
    PromptError,
    QafloraError,
    ToolsError,
    wrong_option,
)
from qaflora_edge.prompt import template as templates
from qaflora_edge.prompt.calls import call_format
from qaflora_edge.prompt.infill import infill_tokens
from qaflora_edge.prompt.messages import Message, begin_with, checked_messages
from qaflora_edge.prompt.typed import TypedText

_PIECE_BYTES = 16  # of a token; most are shorter

Tags = tuple[str, str]  # around a thought
_TAGS: tuple[Tags, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Reader:
    """Turn what is asked into tokens, for one Engine.

    n_ctx      the most tokens of a prompt
    system, examples  begin conversations that have no system prompt
    reasoning  of config.REASONING

    Raises PromptError for a prompt that is empty, longer than n_ctx, or has an id out of range.
    """

    model: Model
    n_ctx: int
    system: str | None
    examples: Sequence[Message]
    reasoning: str

    def read(self, question: Question, parse_special: bool = False) -> Prompt:
        """Read a prompt, and find the question in it."""
        if isinstance(question, Prompt):
            return question
        tokens = self.tokens(question, parse_special)
        place = find_question(self.model, tokens)
        if place is None:
            return Prompt(tuple(tokens))
        start, end, is_later = place
        thinking = _thinking_after(self.model, tokens, end)
        return Prompt(tuple(tokens), (start, end), is_later, thinking)

    def tokens(self, question: Question, parse_special: bool = False) -> list[int]:
        """Give the tokens alone.

        parse_special  control tokens that are spelt out in a text are control tokens
        """
        if isinstance(question, Chat) and question.untemplated and not self.model.chat_template:
            question = question.untemplated
        if isinstance(question, str):
            tokens = self._of_text(question, parse_special)
        elif isinstance(question, Chat):
            tokens = self._of_chat(question)
        elif isinstance(question, Gap):
            tokens = infill_tokens(self.model, question, self.n_ctx)
        else:
            tokens = token_ids(question)
        return checked_tokens(self.model, tokens, self.n_ctx)

    def _of_text(self, text: str, parse_special: bool) -> list[int]:
        if not text:
            raise PromptError("The prompt is empty; give at least one character.")
        check_size(self.model, [text], self.n_ctx)
        return self.model.tokenize(text, add_special=True, parse_special=parse_special)

    def _of_chat(self, chat: Chat) -> list[int]:
        return chat_tokens(
            self.model,
            begin_with(self.system, chat.messages, self.examples),
            tools=chat.tools.offered if chat.tools else (),
            n_ctx=self.n_ctx,
            continue_final_message=chat.continue_final_message,
            add_generation_prompt=chat.add_generation_prompt,
            chat_template_kwargs=chat.chat_template_kwargs,
            reasoning=self.reasoning,
        )

    def continuation(self, prompt: Prompt, text: Plain) -> tuple[int, ...]:
        """Give the tokens of a text that goes on from a prompt; n_ctx holds for both."""
        if isinstance(text, str):
            tokens = self.model.tokenize(text, add_special=False, parse_special=False)
        else:
            tokens = token_ids(text, "continuation")
        if not tokens:
            raise PromptError("The continuation is empty; give at least one token.")
        what = "prompt with its continuation"
        checked_tokens(self.model, [*prompt.tokens, *tokens], self.n_ctx, what)
        return tuple(tokens)


def as_turn(prompt: Any, *, is_plain: bool = False) -> Question:
    """Take messages as a conversation, and so a text where there is a chat template.

    is_plain  a text stays as it is
    """
    if isinstance(prompt, str) and prompt and not is_plain:
        return Chat([{"role": "user", "content": prompt}], untemplated=prompt)
    question: Question = Chat(prompt) if is_conversation(prompt) else prompt
    return question


def chat_tokens(
    model: Model,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    n_ctx: int = MAX_CTX,
    continue_final_message: bool | None = None,
    add_generation_prompt: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    reasoning: str = "auto",
) -> list[int]:
    """Tokenize a conversation under the base's template, ready for an answer.

    continue_final_message  whether the answer goes on from the last message; None: where it is an
                            assistant's, without tool calls
    add_generation_prompt   False: end without the beginning of an answer
    chat_template_kwargs    further variables of the template, such as enable_thinking
    reasoning               one of config.REASONING, where these do not say

    What a person typed is data: a control token spelt out in a message stays text.

    Raises ChatTemplateError without a usable template, ToolsError where it takes no tools,
    PromptError for malformed messages, ContextError for those that n_ctx tokens cannot hold.
    """
    checked = checked_messages(messages)
    begun = _begun(checked, continue_final_message, add_generation_prompt)
    more = _template_kwargs(chat_template_kwargs, reasoning)
    said = [m.get(key, "") for m in checked for key in ("content", "reasoning_content")]
    check_size(model, [*said, begun or ""], n_ctx)
    template = _template_of(model, tools)
    try:
        typed = TypedText(model, templates.literal_text(template), [checked, begun, tools, more])
        variables: dict[str, Any] = {
            # Llama 3's has tools in the question's turn otherwise, where they would be weighed.
            "tools_in_user_message": False,
            **typed.marked(more),
            "messages": [typed.marked(m, is_assistant=m["role"] == "assistant") for m in checked],
            "add_generation_prompt": begun is not None or add_generation_prompt is not False,
        }
        if tools:
            variables["tools"] = typed.marked(tools)
        text = templates.render(template, **_ends(model), **variables)
        is_answered = bool(begun) or more.get("enable_thinking") is False
        if is_answered:
            text = _without_open_thought(template, text)
        if begun is not None:
            text += typed.marked(begun, is_assistant=True)
    except QafloraError:
        raise
    except Exception as err:  # a template is a program of the file's author: anything may come
        raise ChatTemplateError(
            f"The chat template of {model.path.name} refused the conversation: {_reason(err)}. "
            "Give the prompt as plain text (--raw-prompt), or change the messages."
        ) from err
    tokens = typed.tokens(text)
    bos = model._lib.llama_vocab_bos(model.vocab)
    if model._lib.llama_vocab_get_add_bos(model.vocab) and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    return tokens


def _template_kwargs(asked: Any, reasoning: str) -> Mapping[str, Any]:
    """Check further variables of a template, and put in what is asked of thoughts."""
    if asked is None:
        asked = {}
    if not isinstance(asked, Mapping):
        expected = 'an object, as in {"enable_thinking": False}'
        raise wrong_option("chat_template_kwargs", asked, expected)
    if reasoning == "auto":
        return asked
    is_wanted = reasoning == "on"
    return {"enable_thinking": is_wanted, "thinking": is_wanted, **asked}


def _template_of(model: Model, tools: Sequence[Any]) -> str:
    """Give a base's chat template, which has to take the tools."""
    template = str(model.chat_template or "")
    name = model.path.name
    if not template:
        raise ChatTemplateError(
            f"The base {name} has no chat template (tokenizer.chat_template is missing); give the "
            "prompt as plain text (--raw-prompt), or use an instruct model."
        )
    if tools and call_format(template) is None:
        raise ToolsError(
            f"The chat template of {name} has no tools in a form that we read, expected that of "
            "Hermes and Qwen, Llama 3 or Mistral; ask without tools, or use such a base."
        )
    return template


def _ends(model: Model) -> dict[str, str]:
    """Spell the tokens that begin and end a text, as templates write them."""
    ids = {
        "bos_token": model._lib.llama_vocab_bos(model.vocab),
        "eos_token": model._lib.llama_vocab_eos(model.vocab),
    }
    spelt = {}
    for name, token in ids.items():
        piece = model.piece(token, special=True) if token >= 0 else b""
        spelt[name] = piece.decode("utf-8", "replace")
    return spelt


def _without_open_thought(template: str, text: str) -> str:
    """Close a thought that a template began, where no thought is wanted and it cannot do so."""
    begin, end = thought_tags(template) or ("", "")
    is_open = begin and text.rstrip().endswith(begin)
    return f"{text}\n{end}\n\n" if is_open else text


def _begun(
    messages: list[dict[str, Any]], is_continued: bool | None, is_prompted: bool | None
) -> str | None:
    """Take what an answer begins with off a conversation; None where it begins with nothing."""
    last = messages[-1]
    before = messages[-2] if len(messages) > 1 else {}
    is_said = last["role"] == "assistant" and not last.get("tool_calls")
    if is_continued is None:
        is_continued = is_said and not is_prompted
    elif is_continued and (is_prompted or not is_said):
        raise OptionError(
            f"Option continue_final_message is True, found add_generation_prompt {is_prompted} and "
            f"a last message of {last['role']}, expected a text of the assistant to go on from, "
            "and no other beginning; leave one of them out.",
            "continue_final_message",
        )
    if not is_continued:
        return None
    if before.get("role") == "assistant":
        raise PromptError(
            f"Messages {len(messages) - 2} and {len(messages) - 1} are both the assistant's, "
            "expected one to go on from; join them."
        )
    return str(messages.pop()["content"])


def _reason(error: Exception) -> str:
    """Say in one line what went wrong in a template."""
    if isinstance(error, RecursionError):
        return "too many expressions in each other"
    text = (str(error).strip().split("\n")[0] or type(error).__name__)[:300].rstrip(".")
    line = getattr(error, "lineno", None)  # of jinja's syntax errors
    return f"line {line}: {text}" if line else text


def find_question(model: Model, tokens: Sequence[int]) -> tuple[int, int, bool] | None:
    """Find where the last user turn's text begins and ends, and whether it is a later one.

    None without such a turn. Only tokens count: typed text never becomes a control token.
    """
    control, head, rest = _opening(model)
    at = _last_place(head, tokens)
    if at is None:
        return None
    start = at + len(head)
    for token in rest:
        start += start < len(tokens) and tokens[start] == token
    end = next((at for at in range(start, len(tokens)) if tokens[at] in control), len(tokens))
    return (start, end, _last_place(head, tokens[:at]) is not None) if start < end else None


@lru_cache(4)
def _opening(model: Model) -> tuple[set[int], list[int], list[int]]:
    """Learn from two short questions how the base's template begins a user turn.

    Returns all control tokens, the turn's first tokens from a control token on, and the white space
    after them, which may have become one token with the question's first one.
    """
    control = {token.id for token in model.special_tokens if token.is_control}
    samples = ("a", "Some other words.")  # a template has to frame both alike
    try:
        one, other = (chat_tokens(model, [{"role": "user", "content": text}]) for text in samples)
    except QafloraError:  # no template, or one that cannot be used
        return control, [], []
    end = n_common(one, other)
    n = end
    behind = one[len(one) - n_common(one[::-1], other[::-1]) :]
    while end > 0 and not model.piece(one[end - 1], special=True).strip():
        end -= 1
    for start in range(end - 1, -1, -1):
        # Long enough to be no assistant's turn, which may begin with the same token.
        if one[start] in control and _last_place(one[start:end], behind) is None:
            return control, one[start:end], one[end:n]
    return control, [], []


def thought_tags(template: str | None) -> Tags | None:
    """Find the tags of thoughts that a chat template may write; None: it knows no thoughts."""
    literal = templates.literal_text(template or "")
    return next((tags for tags in _TAGS if any(tag in literal for tag in tags)), None)


def _thinking_after(model: Model, tokens: Sequence[int], end: int) -> Thinking | None:
    """Find how a base thinks after a question that ends here; None: it does not.

    Only what follows the last control token counts, where an answer begins.
    """
    tags = thought_tags(model.chat_template)
    if tags is None or end == len(tokens):  # what a person typed may begin with a tag
        return None
    control, closing, tag_tokens = _thought_tokens(model, tags)
    n_before = next(at for at in range(len(tokens), 0, -1) if tokens[at - 1] in control)
    pieces = [model.piece(token, special=True) for token in tokens[n_before:]]
    begun = b"".join(pieces).decode("utf-8", "replace")
    head, tag, thought = begun.partition(tags[0])
    n_weighed = len(tokens)
    if tag and not thought.replace(tags[1], "").strip():  # the template's, with nothing in it
        ends = accumulate(map(len, pieces))
        n_weighed = n_before + sum(end <= len(head.encode()) for end in ends)
    is_open = begun.rfind(tags[0]) > begun.rfind(tags[1])
    return Thinking(*tags, is_open, n_weighed, closing, tag_tokens)


@lru_cache(4)
def _thought_tokens(model: Model, tags: Tags) -> tuple[Any, ...]:
    """Give control tokens but tags, tokens that close a thought, and those that are tags."""
    special = model.special_tokens
    tag_tokens = {token.id: token.text.encode() for token in special if token.text in tags}
    control = {token.id for token in special if token.is_control} - tag_tokens.keys()
    closing = model.tokenize(f"\n{tags[1]}", add_special=False, parse_special=True)
    return control, closing, tag_tokens


def _last_place(part: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Find where a part begins for the last time; None for an empty one."""
    places = range(len(tokens) - len(part), -1, -1) if part else ()
    return next((at for at in places if list(tokens[at : at + len(part)]) == list(part)), None)


def check_size(model: Model, texts: Iterable[str], n_ctx: int) -> None:
    """Raise ContextError for texts that cannot fit; cutting megabytes into tokens takes seconds."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > n_ctx * _PIECE_BYTES and size > n_ctx * model.longest_piece:
        raise ContextError(
            f"The prompt has {size} bytes, more than the context of {n_ctx} tokens can hold; "
            "shorten it, or raise the context (--ctx, n_ctx)."
        )


def whole(prompt: Any) -> Any:
    """Give a list in place of an iterator."""
    return list(prompt) if isinstance(prompt, Iterator) else prompt


def is_conversation(prompt: Any) -> bool:
    """Tell messages from texts and ids."""
    return isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt)


def are_many(prompt: Any) -> bool:
    """Tell a list of prompts from one: a text, messages, or a sequence of ids."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Iterable):
        return False  # one, if a wrong one
    return not is_conversation(prompt) and any(not isinstance(part, Integral) for part in prompt)


def token_ids(prompt: Any, what: str = "prompt") -> list[int]:
    """Check ids. Raises PromptError for what is no sequence of whole numbers."""
    try:
        if not isinstance(prompt, bytes | bytearray | Mapping):  # they would give numbers or keys
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise PromptError(f"The {what} is {prompt!r:.100}, expected a text or a sequence of token ids.")


def checked_tokens(model: Model, tokens: list[int], n_ctx: int, what: str = "prompt") -> list[int]:
    """Check tokens. Raises PromptError for none, too many, or one out of range."""
    if not tokens:
        raise PromptError("The prompt is empty; give at least one token.")
    if len(tokens) > n_ctx:
        raise ContextError(
            f"The {what} has {len(tokens)} tokens, the context {n_ctx}; shorten it, "
            f"or raise the context (--ctx, n_ctx; this base was trained for "
            f"{model.n_ctx_train})."
        )
    for i, token in enumerate(tokens):
        if not 0 <= token < model.n_vocab:
            raise PromptError(
                f"Token {i} of the {what} is {token}, expected an id from 0 to {model.n_vocab - 1}."
            )
    return tokens
