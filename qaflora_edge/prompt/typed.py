"""What people typed stays text: kept apart from what a template writes, through rendering.

A mark, a character that occurs nowhere else, follows every typed character that a control token
could begin with. It travels with its character through whatever a template does: strip, split,
slice, join, upper, tojson. Once the text is rendered, a control token's text in which a typed
character stands is text; only what the template wrote itself is a control token.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from qaflora_edge.backend.model import Model, SpecialToken
from qaflora_edge.errors import PromptError

MAX_DEPTH = 32  # lists and objects in a message


class TypedText:
    """The marks of one conversation.

    template_text  what the template may write; the user-defined tokens in it, such as
                   <tool_call>, are kept from people as control tokens are
    typed          messages, tools and whatever else comes from outside
    """

    def __init__(self, model: Model, template_text: str, typed: Any) -> None:
        self._model = model
        self._guarded = [
            token
            for token in model.special_tokens
            if token.text and (token.is_control or token.text in template_text)
        ]
        firsts = {re.escape(token.text[0]) for token in self._guarded}
        any_first = f"[{''.join(firsts)}]" if firsts else "(?!)"
        self._any = re.compile(any_first)
        # What an assistant said is its own: the template finds <think> and <tool_call> in it,
        # and where they are tokens, they are tokens again.
        control = [token.text for token in self._guarded if token.is_control]
        said = set()
        for piece in (*template_text.split("\0"), *(token.text for token in self._guarded)):
            is_control = any(text.startswith(piece) or text in piece for text in control)
            if self._any.match(piece) and not is_control:
                said.add(re.escape(piece))
        self._control = self._any
        if said:
            said_alone = "|".join(sorted(said))
            self._control = re.compile(rf"(?!{said_alone}){self._any.pattern}")
        self._mark = _unused([template_text, *_strings(typed, 0)])

    def marked(self, value: Any, *, is_assistant: bool = False) -> Any:
        """The same value with marks in all its texts, keys included."""
        if isinstance(value, str):
            pattern = self._control if is_assistant else self._any
            return pattern.sub(lambda match: match[0] + self._mark, value)
        mark = partial(self.marked, is_assistant=is_assistant)
        if isinstance(value, Mapping):
            keys = map(mark, value)
            return dict(zip(keys, map(mark, value.values()), strict=True))
        if isinstance(value, list | tuple):
            return list(map(mark, value))
        return value

    def tokens(self, text: str, n_most: int) -> list[int]:
        """Token ids of a rendered text with marks; see Model.tokenize."""
        pieces = text.replace(_escaped(self._mark), self._mark).split(self._mark)
        plain = "".join(pieces)
        typed = []
        at = 0
        for piece in pieces[:-1]:
            at += len(piece)
            typed.append(at - 1)

        def is_typed(start: int, token: SpecialToken) -> bool:
            end = start + len(token.text)
            i = bisect_left(typed, start)
            return i < len(typed) and typed[i] < end

        for token in self._guarded:
            starts = _places(plain, token.text, 0, len(plain))
            if any(is_typed(at, token) for at in starts):
                return self._apart(plain, is_typed)
        return self._model.tokenize(plain, parse_special=True, n_most=n_most)

    def _apart(self, plain: str, is_typed: Any) -> list[int]:
        """As llama.cpp parses special tokens (0c1e5709, llama-vocab.cpp tokenizer_st_partition).

        The longest come first; but those in which a typed character stands are left as text.
        """
        fragments: list[int | tuple[int, int]] = [(0, len(plain))]
        for token in self._model.special_tokens:
            if not token.text:
                continue
            pieces: list[int | tuple[int, int]] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    pieces.append(fragment)
                else:
                    pieces += _cut(plain, fragment, token, is_typed)
            fragments = pieces
        tokens = []
        for fragment in fragments:
            if isinstance(fragment, int):
                tokens.append(fragment)
            else:
                for text in self._runs(plain, *fragment, is_typed):
                    tokens += self._model.tokenize(text)
        return tokens

    def _runs(self, plain: str, start: int, end: int, is_typed: Any) -> Iterator[str]:
        """Text in pieces in which no guarded token is whole that llama.cpp would parse anyway."""
        cuts = set()
        for token in self._guarded:
            if token.is_parsed_on_demand:
                continue
            for at in _places(plain, token.text, start, end):
                if is_typed(at, token):
                    cuts.add(at + 1)
        for cut in [*sorted(cuts), end]:
            if start < cut:
                yield plain[start:cut]
            start = cut


def _cut(
    plain: str, fragment: tuple[int, int], token: SpecialToken, is_typed: Any
) -> Iterator[int | tuple[int, int]]:
    """A fragment without the places of one token, and the token at these places."""
    start, end = fragment
    for at in _places(plain, token.text, start, end):
        if at < start or is_typed(at, token):
            continue
        left = len(plain[start:at].rstrip()) + start if token.strips_left else at
        if start < left:
            yield (start, left)
        yield token.id
        start = at + len(token.text)
        if token.strips_right:
            rest = plain[start:end]
            start += len(rest) - len(rest.lstrip())
    if start < end:
        yield (start, end)


def _places(plain: str, text: str, start: int, end: int) -> Iterator[int]:
    while (at := plain.find(text, start, end)) >= 0:
        yield at
        start = at + 1


def _strings(value: Any, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise PromptError(
            f"A message has more than {MAX_DEPTH} lists and objects in each other; make it flatter."
        )
    if isinstance(value, str):
        yield value
        return
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = (*value, *value.values())
    elif isinstance(value, list | tuple):
        inner = value
    for item in inner:
        yield from _strings(item, depth + 1)


def _unused(texts: list[str]) -> str:
    """A private-use character that is not in these texts, nor its escape."""
    used: set[str] = set().union(*texts)
    for codes in (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)):
        for code in codes:
            mark = chr(code)
            if mark not in used and not any(_escaped(mark) in text for text in texts):
                return mark
    raise PromptError(
        "The conversation has every private-use character of Unicode, expected at least one that "
        "is free for our own use; remove one."
    )


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]
