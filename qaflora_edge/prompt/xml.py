"""Calls whose arguments are tags, as Qwen3-Coder and Qwen3.5 write them.

<function=name>
<parameter=x>
a text as it is, or JSON
</parameter>
</function>
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qaflora_edge.grammar import checked_schema, moved_schema
from qaflora_edge.inference.constraint import Grammar, lark_grammar

_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(?:\n|(?=[^\n]))")
_FUNCTION_END = re.compile(r"\s*</function>")
_VALUE_END = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=|</function>))")
# What may become the end of a value with more text; at times a little more.
_MAY_END = re.compile(r"\n?(?:</parameter>\s*\S{0,12}|</?[a-z]{0,10})?\Z")
_WORDS = {"True": "true", "False": "false", "None": "null"}  # as jinja writes them
_SOURCE = "The parameters of tools"  # as messages call a grammar of them
_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


class Arguments:
    """Follow the arguments of a call, and write them as an object of JSON.

    schema  of the arguments: it tells texts from JSON
    """

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._held = ""
        self._value: _Value | None = None
        self._n_value = 0

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Give more of the arguments, and what follows them; None: they go on."""
        self._held += piece
        written = ""
        while True:
            if self._value is not None:
                end = _VALUE_END.search(self._held)
                may_end = end or _MAY_END.search(self._held)
                at = may_end.start() if may_end else len(self._held)
                written += self._value.add(self._held[:at])
                if end is None:
                    self._held = self._held[at:]
                    return written, None
                self._held = self._held[end.end() :]
                written += self._value.end()
                self._value = None
            elif begin := _PARAMETER.match(self._held):
                self._held = self._held[begin.end() :]
                name = begin[1].strip()
                self._value = _Value(types_of(_property(self._schema, name), self._schema))
                written += "{" if self._n_value == 0 else ", "
                written += json.dumps(name, ensure_ascii=False) + ": " + self._value.begin
                self._n_value += 1
            elif end := _FUNCTION_END.match(self._held):
                rest = self._held[end.end() :]
                return written + ("}" if self._n_value else "{}"), rest
            else:
                return written, None


class _Value:
    """Write one value as JSON: a text as it comes, anything else when it is whole.

    types  of JSON that it may have; none: unknown
    """

    def __init__(self, types: set[str]) -> None:
        self._types = types
        self._is_text = types == {"string"}
        self._text = ""
        self.begin = '"' if self._is_text else ""

    def add(self, text: str) -> str:
        if self._is_text:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._text += text
        return ""

    def end(self) -> str:
        if self._is_text:
            return '"'
        text = _WORDS.get(self._text.strip(), self._text)
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = text
        is_other = "string" in self._types and self._type(value) not in self._types
        if isinstance(value, str) or is_other:
            return json.dumps(self._text, ensure_ascii=False)
        return text

    def _type(self, value: Any) -> str:
        name = _TYPES.get(type(value), "null")
        return "number" if name == "integer" and name not in self._types else name


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def decoded(text: str, at: int, schema: Any) -> tuple[Any, int]:
    """Read the arguments from a place on, and where they end. Raises ValueError for a cut one."""
    arguments, rest = Arguments(schema).feed(text[at:])
    if rest is None:
        raise ValueError("a call that is cut")
    return json.loads(arguments), len(text) - len(rest)


def _property(schema: Any, name: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(name) if isinstance(properties, Mapping) else None


def _resolved(schema: Any, root: Any) -> Any:
    """Follow a reference inside of the root, once."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    for name in reference[2:].split("/"):
        root = root.get(name) if isinstance(root, Mapping) else None
    return root


def types_of(schema: Any, root: Any) -> set[str]:
    """Name the types of JSON that a schema lets a value have; none where it does not say."""
    types: set[str] = set()
    outer = _resolved(schema, root)
    options = [outer]
    for field in ("anyOf", "oneOf"):
        inner = outer.get(field) if isinstance(outer, Mapping) else None
        options += inner if isinstance(inner, list) else []
    for option in options:
        fields = _resolved(option, root)
        if not isinstance(fields, Mapping):
            continue
        names = fields.get("type")
        texts = _texts(fields)
        if isinstance(names, str):
            types.add(names)
        elif isinstance(names, list):
            types |= {name for name in names if isinstance(name, str)}
        elif texts:
            types.add("string")
    return types


def _texts(schema: Any) -> list[str]:
    """List the texts that a schema names; none where it names none, or other values too."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    is_texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_texts and values else []


def grammar(begin: str, end: str, tools: Sequence[Mapping[str, Any]]) -> Grammar:
    """Make the grammar of one call of one of these tools; texts end where a tag does.

    begin, end  texts around the arguments; {name} is the tool's
    """
    rules = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        schema = checked_schema(function.get("parameters") or {}, source=_SOURCE, is_lenient=True)
        required = schema.get("required") or []
        parts = [json.dumps(begin.replace("{name}", function["name"]))]
        for j, (name, value) in enumerate((schema.get("properties") or {}).items()):
            rule = f"tool{i}value{j}"
            parts.append(rule if name in required else f"{rule}?")
            head = json.dumps(f"<parameter={name}>\n")
            rules.append(f"{rule}: {head} {rule}inner")
            rules.append(_value_rule(f"{rule}inner", value, schema))
        parts.append(json.dumps(end))
        rules.append(f"tool{i}: {' '.join(parts)}")
    start = " | ".join(f"tool{i}" for i in range(len(tools)))
    return lark_grammar("\n".join([f"start: {start}", *rules, ""]), _SOURCE)


def _value_rule(rule: str, schema: Any, root: Any) -> str:
    """Write the rules of a value and of the tag behind it."""
    end = json.dumps("\n</parameter>\n")
    types = types_of(schema, root)
    fields = _resolved(schema, root)
    texts = _texts(fields) if isinstance(fields, Mapping) else []
    if texts:
        return f"{rule}: ({' | '.join(json.dumps(text) for text in texts)}) {end}"
    if not types or "string" in types:
        text = f"{rule}text[lazy]: /(.|\\n)*<\\/parameter>/"
        return f'{rule}: {rule}text "\\n"\n{text}'
    place = "#/$defs/whole"
    whole = {**moved_schema(schema, place), "$defs": {"whole": moved_schema(root, place)}}
    return f"{rule}: %json {json.dumps(whole)} {end}"
