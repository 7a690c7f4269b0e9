"""Calls whose arguments have names, as LFM2 writes them in Python, and Gemma 4 in its own form.

name(x=1, y="a text")
name{x:1,y:<|"|>a text<|"|>}
"""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from qaflora_edge.prompt import xml
from qaflora_edge.prompt.xml import json_rule, resolved, texts_of, types_of

_MARK = '<|"|>'
_QUOTES = (_MARK, '"', "'")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"\\'": "'", '"': '\\"'}  # of Python in a text -> of JSON
_AFTER = r"\s*[,)}:\]]"  # what stands behind a text
_NO_MARK = r'<(?!\|"\|>|\|?"?\|?\Z)'


def _inside(quote: str) -> str:
    """Write what matches the inside of a text; small bases do not escape each quote in it."""
    if quote == _MARK:
        return f"(?:[^<]++|{_NO_MARK})*+"
    return rf"(?:[^{quote}\\]++|\\.|{quote}(?!{_AFTER}|\s*\Z))*+"


def _end(quote: str, after: str = _AFTER) -> str:
    return re.escape(quote) if quote == _MARK else f"{quote}(?={after})"


_INSIDES = {quote: re.compile(_inside(quote), re.DOTALL) for quote in _QUOTES}
_ENDS = {quote: re.compile(_end(quote)) for quote in _QUOTES}
_WHOLE = "|".join(re.escape(q) + _inside(q) + _end(q, rf"{_AFTER}|\s*\Z") for q in _QUOTES)
_NAME = re.compile(r"[\s,]*([^\s=:,(){}\[\]<|\"']+)\s*[=:]\s*")
_CLOSE = re.compile(r"[\s,]*[)}]")
# Parts of a value: where a text begins, a bracket, a comma, anything else.
_PART = re.compile(
    rf"(?P<quote>{'|'.join(map(re.escape, _QUOTES))})"
    rf"|(?P<open>[\[({{])|(?P<close>[\])}}])|(?P<comma>,)|[^\"'<\[\](){{}},]+|{_NO_MARK}"
)
_TOKEN = re.compile(
    rf"(?P<text>{_WHOLE})|(?<![\w.])(?P<word>[^\W\d][\w.-]*)(?P<key>\s*:)?", re.DOTALL
)


class Arguments(xml.Arguments):
    """Follow the arguments of a call behind its bracket; values show their types themselves."""

    begin = _NAME
    end = _CLOSE
    _depth = 0  # of brackets in a value
    _quote = ""  # of a text in it

    def _new_value(self, name: str) -> xml.Value:
        self._depth = 0
        return _Value(set())

    def _span(self) -> tuple[int, int | None]:
        at = 0
        while True:
            if self._quote:
                inside = _INSIDES[self._quote].match(self._held, at)
                at = inside.end() if inside else at
                end = _ENDS[self._quote].match(self._held, at)
                if end is None:
                    return at, None
                at = end.end()
            part = _PART.match(self._held, at)
            self._quote = part["quote"] or "" if part else ""
            if part is None:
                return at, None
            if self._depth == 0 and (part["comma"] or part["close"]):
                return at, at
            self._depth += bool(part["open"]) - bool(part["close"])
            at = part.end()


class _Value(xml.Value):
    def end(self) -> str:
        return as_json(self._text.strip())


def as_json(text: str) -> str:
    """Write a value as JSON; what is neither JSON nor one of these forms is a text."""
    written = _TOKEN.sub(_as_token, text)
    try:
        json.loads(written, parse_constant=xml.refuse)
    except (ValueError, RecursionError):
        written = json.dumps(text, ensure_ascii=False)
    return written.encode(errors="backslashreplace").decode()  # half a surrogate pair


def _as_token(match: re.Match[str]) -> str:
    word = match["word"]
    text = match["text"]
    if match["key"]:
        return json.dumps(word, ensure_ascii=False) + ":"
    if word:
        return _WORDS.get(word, word)
    if text.startswith(_MARK):
        return json.dumps(text[len(_MARK) : -len(_MARK)], ensure_ascii=False)
    body = text[1:-1]
    escaped = re.sub(r"\\.|\"", lambda part: _ESCAPES.get(part[0], part[0]), body, flags=re.DOTALL)
    with contextlib.suppress(ValueError):  # an escape of Python alone stays
        body = json.loads(f'"{escaped}"', strict=False)
    return json.dumps(body, ensure_ascii=False)


def python_rules(rule: str, schema: Mapping[str, Any]) -> list[str]:
    """Write the rules of arguments in Python."""
    ways = {}
    for name, value in (schema.get("properties") or {}).items():
        texts = texts_of(resolved(value, schema))
        options = [json.dumps(json.dumps(text, ensure_ascii=False)) for text in texts]
        if types_of(value, schema) == {"boolean"}:
            options = ['"True"', '"False"']
        ways[name] = " | ".join(options) or json_rule(value, schema)
    return _rules(rule, schema, ways, "=", ", ")


def gemma_rules(rule: str, schema: Mapping[str, Any]) -> list[str]:
    """Write the rules of arguments in Gemma 4's form; what is in lists and objects is free."""
    mark = json.dumps(_MARK)
    by_type = {"string": f"{mark} {rule}text", "array": f"{rule}list", "object": f"{rule}object"}
    pair = rf'/[^\W\d][\w.-]*/ ":" {rule}any'
    scalar = json_rule({"type": ["boolean", "null", "number"]}, {})
    ways = {}
    properties = schema.get("properties") or {}
    for name in sorted(properties, key=str.lower):  # as the template lists them
        value = resolved(properties[name], schema)
        types = types_of(value, schema)
        options = [json.dumps(_MARK + text + _MARK) for text in texts_of(value)]
        if not options:
            options = [way for kind, way in by_type.items() if kind in types]
            if plain := sorted(types - {*by_type}):
                is_one = value.get("type") == plain[0]
                options.append(json_rule(value if is_one else {"type": plain}, schema))
        ways[name] = " | ".join(options) or f"{rule}any"
    return [
        *_rules(rule, schema, ways, ":", ","),
        rf"{rule}text[lazy]: /(.|\n)*{re.escape(_MARK)}/",
        f"{rule}any: {scalar} | {' | '.join(by_type.values())}",
        f'{rule}list: "[" ({rule}any ("," {rule}any)*)? "]"',
        f'{rule}object: "{{" ({pair} ("," {pair})*)? "}}"',
    ]


def _rules(
    rule: str, schema: Mapping[str, Any], ways: Mapping[str, str], assign: str, comma: str
) -> list[str]:
    """Write the rules of named values, of which those that are not required may be left out.

    ways  name -> how its value is written

    RULEfromN are those from the N-th on, RULEmoreN the same behind a comma.
    """
    n = len(ways)
    rules = [f"{rule}: {rule}from0", f'{rule}from{n}: ""', f'{rule}more{n}: ""']
    for i, (name, way) in enumerate(ways.items()):
        argument = f"{json.dumps(name + assign)} ({way}) {rule}more{i + 1}"
        is_required = name in (schema.get("required") or [])
        later = "" if is_required else f" | {rule}from{i + 1}"
        rules.append(f"{rule}from{i}: {argument}{later}")
        later = "" if is_required else f" | {rule}more{i + 1}"
        rules.append(f"{rule}more{i}: {json.dumps(comma)} {argument}{later}")
    return rules
