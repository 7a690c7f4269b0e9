"""Markdown as a tree of elements and texts, from which a page builds its own elements.

A node is a text, or [tag, attributes, nodes]. There are these tags only, and none of them loads,
links or runs anything, whatever the source says:

    p h1 h2 h3 h4 h5 h6 ul ol li blockquote hr br strong em s code
    pre    {"lang": the language, or ""}, of texts and spans
    span   {"kind": one of KINDS}, a part of code
    link   {"address": where it leads}
    table thead tbody tr, th and td with {"align": "left" | "center" | "right"}
    ol     {"start": its first number}
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from markdown_it.token import Token
from pygments import lex
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String
from pygments.util import ClassNotFound

from qaflora_edge.markdown.syntax import parse

Node = str | list[Any]

MAX_LEXED_CHARS = 50_000  # longer code has no colours
_KINDS = {
    Comment: "comment",
    Keyword: "keyword",
    Operator.Word: "keyword",
    Name.Function: "function",
    Name.Class: "type",
    Name.Builtin: "function",
    Name.Tag: "type",
    Name.Attribute: "function",
    Name.Decorator: "number",
    String: "string",
    Number: "number",
    Generic.Inserted: "string",
    Generic.Deleted: "number",
}
KINDS = sorted(set(_KINDS.values()))


def tree(source: str) -> list[Node]:
    """The blocks of a text as nodes."""
    return _nodes(parse(source))


def _nodes(tokens: Sequence[Token]) -> list[Node]:
    """Tokens, which open and close, as nodes, which hold each other."""
    top: list[Node] = []
    stack = [top]
    for token in tokens:
        if token.nesting == 1:
            nodes: list[Node] = []
            if token.hidden:  # the paragraphs of a tight list
                nodes = stack[-1]
            else:
                stack[-1].append([*_element(token), nodes])
            stack.append(nodes)
        elif token.nesting == -1:
            stack.pop()
        elif token.type == "inline":
            stack[-1] += _nodes(token.children or [])
        else:
            stack[-1] += _leaf(token)
    return top


def _element(token: Token) -> tuple[str, dict[str, Any]]:
    if token.type == "link_open":
        return "link", {"address": token.attrs["href"]}
    if token.type == "ordered_list_open":
        return "ol", {"start": token.attrs.get("start", 1)}
    if token.type in ("th_open", "td_open"):
        return token.tag, {"align": str(token.attrs.get("style", "")).rpartition(":")[2] or "left"}
    return token.tag, {}


def _leaf(token: Token) -> list[Node]:
    if token.type in ("fence", "code_block"):
        language = (token.info.split() or [""])[0]
        return [["pre", {"lang": language}, list(_code(token.content, language))]]
    if token.type == "code_inline":
        return [["code", {}, [token.content]]]
    if token.type in ("hr", "hardbreak"):
        return [[token.tag, {}, []]]
    return [token.content] if token.content else []


def _code(text: str, language: str) -> Iterator[Node]:
    """Code as texts and coloured parts."""
    text = text.removesuffix("\n")
    try:
        if len(text) > MAX_LEXED_CHARS:
            raise ClassNotFound
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        yield text
        return
    for kind, parts in itertools.groupby(lex(text, lexer), lambda part: _kind(part[0])):
        joined = "".join(part for _, part in parts)
        if joined:
            yield joined if kind is None else ["span", {"kind": kind}, [joined]]


def _kind(token: Any) -> str | None:
    """What a token of Pygments is shown as: by itself, or by what it is a kind of."""
    return next((_KINDS[each] for each in reversed(token.split()) if each in _KINDS), None)
