"""Prompts to tokens: texts, ids, gaps in code, and conversations under the base's chat template.

They are checked here against the vocabulary and the context.
"""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qaflora_edge.ask import Chat, Gap, Plain, Prompt, Question, Thinking
from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.model import PIECE_BYTES, Model
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
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.prompt import template as templates
from qaflora_edge.prompt.messages import Message, begin_with, checked_messages
from qaflora_edge.prompt.neutral import behind_system, few
from qaflora_edge.prompt.typed import TypedText

N_EARLIER = 3  # user turns before the last one, that tell of a conversation's subject

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
        n_weighed = None
        asked = _without_results(question)
        if asked is not None:
            n_weighed = n_common(self.tokens(asked), tokens)
        span = find_question(self.model, tokens[:n_weighed])
        if span is None:
            return Prompt(tuple(tokens))
        start, end, is_later = span
        thinking = _thinking_after(self.model, tokens, end)
        n_before = _n_before_turns(self.model, tokens)
        neutral = self._neutral(tuple(tokens[:n_before]))
        return Prompt(
            tuple(tokens), (start, end), is_later, thinking, neutral=neutral, n_weighed=n_weighed
        )

    def _neutral(self, system: tuple[int, ...]) -> tuple[tuple[Prompt, Prompt], ...]:
        """Pair neutral prompts, as usual and behind a system prompt that is not the usual one."""
        usual = (self.model, self.system, json.dumps([*self.examples]))
        beginning = _usual_beginning(*usual)
        if beginning == system:
            return ()
        return behind_system(system, len(beginning), _usual_prompts(*usual))

    def tokens(self, question: Question, parse_special: bool = False) -> list[int]:
        """Give the tokens alone.

        parse_special  control tokens that are spelt out in a text are control tokens
        """
        if isinstance(question, Chat) and question.untemplated and not self.model.chat_template:
            question = question.untemplated
        if isinstance(question, str):
            if not question:
                raise PromptError("The prompt is empty; give at least one character.")
            check_size(self.model, [question], self.n_ctx)
            tokens = self.model.tokenize(
                question, add_special=True, parse_special=parse_special, n_most=self.n_ctx
            )
        elif isinstance(question, Chat):
            messages = begin_with(self.system, question.messages, self.examples)
            chat = replace(question, messages=messages)
            tokens = chat_tokens(self.model, chat, n_ctx=self.n_ctx, reasoning=self.reasoning)
        elif isinstance(question, Gap):
            from qaflora_edge.prompt.infill import infill_tokens

            tokens = infill_tokens(self.model, question, self.n_ctx)
        else:
            tokens = token_ids(question)
        return checked_tokens(self.model, tokens, self.n_ctx)

    def continuation(self, prompt: Prompt, text: Plain) -> tuple[int, ...]:
        """Give the tokens of a text that goes on from a prompt; n_ctx holds for both."""
        if isinstance(text, str):
            tokens = self.model.tokenize(text)
        else:
            tokens = token_ids(text, "continuation")
        if not tokens:
            raise PromptError("The continuation is empty; give at least one token.")
        what = "prompt with its continuation"
        checked_tokens(self.model, [*prompt.tokens, *tokens], self.n_ctx, what)
        return tuple(tokens)


def _without_results(question: Question) -> Chat | None:
    """Give a conversation up to the question that tools gave results for; None: none did.

    Many templates write a result as a user's turn. It would be weighed as a question, and JSON in
    it would take an adapter that writes JSON.
    """
    if not isinstance(question, Chat):
        return None
    messages = list(question.messages)
    roles = [message.get("role") for message in messages]
    results = 0
    while roles and roles[-1] != "user":
        results += roles.pop() == "tool"
    if not results or not roles:
        return None
    return replace(question, messages=messages[: len(roles)], continue_final_message=False)


def chat_tokens(
    model: Model, chat: Chat, *, n_ctx: int = MAX_CTX, reasoning: str = "auto"
) -> list[int]:
    """Tokenize a conversation under the base's template, ready for an answer.

    reasoning  one of config.REASONING, where chat.chat_template_kwargs do not say

    What a person typed is data: a control token spelt out in a message stays text.

    Raises ChatTemplateError without a usable template, ToolsError where it takes no tools,
    PromptError for malformed messages, ContextError for those that n_ctx tokens cannot hold.
    """
    messages = checked_messages(chat.messages)
    tools = chat.tools.offered if chat.tools else ()
    begun = _begun(messages, chat)
    more = _template_kwargs(chat.chat_template_kwargs, reasoning)
    said = [begun or ""]
    for message in messages:
        said += [message["content"], message.get("reasoning_content", "")]
    check_size(model, said, n_ctx)
    template = _template_of(model, tools)
    try:
        typed = TypedText(model, templates.literal_text(template), [messages, begun, tools, more])
        # Llama 3's has tools in the question's turn otherwise, where they would be weighed.
        variables: Json = {"tools_in_user_message": False}
        variables |= typed.marked(more)
        variables["messages"] = [
            typed.marked(message, is_assistant=message["role"] == "assistant")
            for message in messages
        ]
        is_prompted = begun is not None or chat.add_generation_prompt is not False
        variables["add_generation_prompt"] = is_prompted
        if tools:
            variables["tools"] = typed.marked(tools)
            variables["xml_tools"] = variables["tools"]  # of SmolLM3
        if tools or any("tool_calls" in message for message in messages):
            variables["messages"] = _with_calls(template, variables)
        text = templates.render(template, **_ends(model), **variables)
        if begun or more.get("enable_thinking") is False:
            # A thought that a template began is closed, where it cannot do so.
            begin, end = thought_tags(template) or ("", "")
            if begin and text.rstrip().endswith(begin):
                text = f"{text}\n{end}\n\n"
        if begun is not None:
            text += typed.marked(begun, is_assistant=True)
    except QafloraError:
        raise
    except Exception as err:  # a template is a program of the file's author: anything may come
        raise ChatTemplateError(
            f"The chat template of {model.path.name} refused the conversation: {_reason(err)}. "
            "Give the prompt as plain text (--raw-prompt), or change the messages."
        ) from err
    tokens = typed.tokens(text, n_ctx)
    bos = model._lib.llama_vocab_bos(model.vocab)
    if model._lib.llama_vocab_get_add_bos(model.vocab) and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    return tokens


def _with_calls(template: str, variables: Json) -> list[Any]:
    from qaflora_edge.prompt.calls import call_format

    style = call_format(template)
    messages = variables["messages"]
    if style and "tool_calls" not in template:  # such as SmolLM3's
        for message in messages:
            message["content"] += style.written(message.get("tool_calls") or [])
    if style and style.is_in_system and "tools" in variables:
        system = {"role": "system", "content": ""}
        if messages[0]["role"] == "system":
            system, *messages = messages
        functions = [tool["function"] for tool in variables["tools"]]
        tools = json.dumps(functions, ensure_ascii=False)
        messages = [system | {"tools": tools}, *messages]
    return list(messages)


def _template_kwargs(variables: Any, reasoning: str) -> Object:
    if not isinstance(variables, Mapping | None):
        expected = 'an object, as in {"enable_thinking": False}'
        raise wrong_option("chat_template_kwargs", variables, expected)
    if reasoning == "auto":
        return variables or {}
    is_wanted = reasoning == "on"
    wish = {"enable_thinking": is_wanted, "thinking": is_wanted}
    return wish | dict(variables or {})


def _template_of(model: Model, tools: Sequence[Any]) -> str:
    template = str(model.chat_template or "")
    name = model.path.name
    if not template:
        raise ChatTemplateError(
            f"The base {name} has no chat template (tokenizer.chat_template is missing); give the "
            "prompt as plain text (--raw-prompt), or use an instruct model."
        )
    if tools:
        from qaflora_edge.prompt.calls import call_format

        if call_format(template) is None:
            raise ToolsError(
                f"The chat template of {name} has no tools in a form that we read, expected that "
                "of Qwen, Llama 3, Gemma 4, Phi-4-mini, Mistral, Granite, SmolLM3 or LFM2; ask "
                "without, or use such a base."
            )
    return template


def _ends(model: Model) -> dict[str, str]:
    ids = {
        "bos_token": model._lib.llama_vocab_bos(model.vocab),
        "eos_token": model._lib.llama_vocab_eos(model.vocab),
    }
    spelt = {}
    for name, token in ids.items():
        piece = model.piece(token, special=True) if token >= 0 else b""
        spelt[name] = piece.decode("utf-8", "replace")
    return spelt


def _begun(messages: list[Json], chat: Chat) -> str | None:
    """Take what an answer begins with off a conversation; None where it begins with nothing."""
    last = messages[-1]
    is_prompted = chat.add_generation_prompt
    is_said = last["role"] == "assistant" and not last.get("tool_calls")
    is_continued = chat.continue_final_message
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
    if len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise PromptError(
            f"Messages {len(messages) - 2} and {len(messages) - 1} are both the assistant's, "
            "expected one to go on from; join them."
        )
    return str(messages.pop()["content"])


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "too many expressions in each other"
    first_line, *_ = str(error).strip().split("\n")
    text = first_line or type(error).__name__
    text = text[:300].rstrip(".")
    line = getattr(error, "lineno", None)  # of jinja's syntax errors
    return f"line {line}: {text}" if line else text


def find_question(model: Model, tokens: Sequence[int]) -> tuple[int, int, bool] | None:
    """Find where the last user turn's text begins and ends, and whether it is a later one.

    None without such a turn. Only tokens count: typed text never becomes a control token.
    """
    head, blanks = _opening(model)
    at = _last_start(head, tokens)
    if at is None:
        return None
    start = at + len(head)
    for token in blanks:
        start += start < len(tokens) and tokens[start] == token
    control = _control(model)
    end = start
    while end < len(tokens) and tokens[end] not in control:
        end += 1
    is_later = _last_start(head, tokens[:at]) is not None
    return (start, end, is_later) if start < end else None


def earlier_questions(model: Model, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Find where the texts of user turns before the last one begin and end, the latest first."""
    head, blanks = _opening(model)
    spans: list[tuple[int, int]] = []
    question = find_question(model, tokens)
    while question is not None and question[2]:
        n_before = question[0] - len(head) - len(blanks)
        question = find_question(model, tokens[:n_before])
        if question is not None:
            spans.append(question[:2])
    return spans


@lru_cache(4)
def _usual_beginning(model: Model, system: str | None, examples: str) -> tuple[int, ...]:
    """Give the tokens before the first user turn, where messages have no system prompt."""
    tokens = _first_turn(model, system, examples, "a")
    return tokens[: _n_before_turns(model, tokens)]


@lru_cache(4)
def _usual_prompts(model: Model, system: str | None, examples: str) -> tuple[Prompt, ...]:
    """Read a few neutral texts as first turns."""
    prompts = []
    for text in few():
        tokens = _first_turn(model, system, examples, text)
        question = find_question(model, tokens)
        assert question is not None
        prompts.append(Prompt(tokens, question[:2]))
    return tuple(prompts)


def _first_turn(model: Model, system: str | None, examples: str, text: str) -> tuple[int, ...]:
    """Give a chat of one turn, behind a bundle's system prompt and examples (JSON)."""
    messages = begin_with(system, [{"role": "user", "content": text}], json.loads(examples))
    return tuple(chat_tokens(model, Chat(messages)))


def _n_before_turns(model: Model, tokens: Sequence[int]) -> int:
    """Count the tokens before the first user turn, such as a system prompt."""
    head, _ = _opening(model)
    starts = range(len(tokens) - len(head) + 1)
    return next((at for at in starts if [*tokens[at : at + len(head)]] == head), 0)


@lru_cache(4)
def _control(model: Model) -> set[int]:
    return {token.id for token in model.special_tokens if token.is_control}


@lru_cache(4)
def _opening(model: Model) -> tuple[list[int], list[int]]:
    """Learn from two short questions how the base's template begins a user turn.

    Returns the turn's first tokens from a control token on, and the white space after them, which
    may have become one token with the question's first one.
    """
    framed = []
    for text in ("a", "Some other words."):  # a template has to frame both alike
        chat = Chat([{"role": "user", "content": text}])
        try:
            framed.append(chat_tokens(model, chat))
        except QafloraError:  # no template, or one that cannot be used
            return [], []
    one, other = framed
    n_before = n_common(one, other)
    n_behind = n_common(one[::-1], other[::-1])
    behind = one[len(one) - n_behind :]
    end = n_before
    while end > 0 and not model.piece(one[end - 1], special=True).strip():
        end -= 1
    control = _control(model)
    for start in range(end - 1, -1, -1):
        head = one[start:end]
        # Long enough to be no assistant's turn, which may begin with the same token.
        if head[0] in control and _last_start(head, behind) is None:
            return head, one[end:n_before]
    return [], []


def _last_start(sought: Sequence[int], tokens: Sequence[int]) -> int | None:
    n_sought = len(sought)
    starts = range(len(tokens) - n_sought, -1, -1) if n_sought else ()
    for at in starts:
        if list(tokens[at : at + n_sought]) == list(sought):
            return at
    return None


def thought_tags(template: str | None) -> Tags | None:
    """Find the tags of thoughts that a chat template may write; None: it knows no thoughts."""
    literal = templates.literal_text(template or "")
    for begin, end in _TAGS:
        if begin in literal or end in literal:
            return begin, end
    return None


def _thinking_after(model: Model, tokens: Sequence[int], end: int) -> Thinking | None:
    """Find how a base thinks after a question that ends here; None: it does not.

    Only what follows the last control token counts, where an answer begins.
    """
    tags = thought_tags(model.chat_template)
    if tags is None or end == len(tokens):  # what a person typed may begin with a tag
        return None
    begin_tag, end_tag = tags
    tag_tokens = {}
    for special in model.special_tokens:
        if special.text in tags:
            tag_tokens[special.id] = special.text.encode()
    control = _control(model) - tag_tokens.keys()
    n_before = len(tokens)
    while tokens[n_before - 1] not in control:
        n_before -= 1
    begun = model.detokenize(tokens[n_before:], special=True).decode("utf-8", "replace")
    head, tag, thought = begun.partition(begin_tag)
    n_weighed = len(tokens)
    if tag and not thought.replace(end_tag, "").strip():  # the template's, with nothing in it
        n_weighed = n_before
        n_byte = 0
        for token in tokens[n_before:]:
            n_byte += len(model.piece(token, special=True))
            n_weighed += n_byte <= len(head.encode())
    is_open = begun.rfind(begin_tag) > begun.rfind(end_tag)
    closing = model.tokenize(f"\n{end_tag}", parse_special=True)
    return Thinking(begin_tag, end_tag, is_open, n_weighed, closing, tag_tokens)


def check_size(model: Model, texts: Iterable[str], n_ctx: int) -> None:
    """Raise ContextError for texts that cannot fit; cutting megabytes into tokens takes seconds."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > n_ctx * PIECE_BYTES and size > n_ctx * model.longest_piece:
        raise ContextError(
            f"The prompt has {size} bytes, more than the context of {n_ctx} tokens can hold; "
            "shorten it, or raise the context (--ctx, n_ctx)."
        )


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
