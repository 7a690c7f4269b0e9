"""Calls whose arguments are tags, as Qwen3-Coder and Qwen3.5 write them.

<function=name>
<parameter=x>
a text as it is, or JSON
</parameter>
</function>
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
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

    begin = _PARAMETER  # the name of an argument
    end = _FUNCTION_END

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._held = ""
        self._value: Value | None = None
        self._n_value = 0

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Give more of the arguments, and what follows them; None: they go on."""
        self._held += piece
        written = ""
        while True:
            if self._value is not None:
                n_here, n_ended = self._span()
                written += self._value.add(self._held[:n_here])
                self._held = self._held[n_ended or n_here :]
                if n_ended is None:
                    return written, None
                written += self._value.end()
                self._value = None
            elif begin := self.begin.match(self._held):
                self._held = self._held[begin.end() :]
                name = begin[1].strip()
                self._value = self._new_value(name)
                written += "{" if self._n_value == 0 else ", "
                written += json.dumps(name, ensure_ascii=False) + ": " + self._value.begin
                self._n_value += 1
            elif end := self.end.match(self._held):
                rest = self._held[end.end() :]
                return written + ("}" if self._n_value else "{}"), rest
            else:
                return written, None

    def _new_value(self, name: str) -> "Value":
        return Value(types_of(_property(self._schema, name), self._schema))

    def _span(self) -> tuple[int, int | None]:
        """Count the characters that are the value's, and those with its end; None: it goes on."""
        end = _VALUE_END.search(self._held)
        may_end = end or _MAY_END.search(self._held)
        n_here = may_end.start() if may_end else len(self._held)
        return n_here, end.end() if end else None


class Value:
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
            value = json.loads(text, parse_constant=refuse)
        except (ValueError, RecursionError):
            value = text
        is_other = "string" in self._types and self._type(value) not in self._types
        if isinstance(value, str) or is_other:
            return json.dumps(self._text, ensure_ascii=False)
        return text

    def _type(self, value: Any) -> str:
        name = _TYPES.get(type(value), "null")
        return "number" if name == "integer" and name not in self._types else name


def refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _property(schema: Any, name: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(name) if isinstance(properties, Mapping) else None


def resolved(schema: Any, root: Any) -> Any:
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
    outer = resolved(schema, root)
    options = [outer]
    for field in ("anyOf", "oneOf"):
        inner = outer.get(field) if isinstance(outer, Mapping) else None
        options += inner if isinstance(inner, list) else []
    for option in options:
        fields = resolved(option, root)
        if not isinstance(fields, Mapping):
            continue
        names = fields.get("type")
        texts = texts_of(fields)
        if isinstance(names, str):
            types.add(names)
        elif isinstance(names, list):
            types |= {name for name in names if isinstance(name, str)}
        elif texts:
            types.add("string")
    return types


def texts_of(schema: Any) -> list[str]:
    """List the texts that a schema names; none where it names none, or other values too."""
    fields = schema if isinstance(schema, Mapping) else {}
    values = [fields["const"]] if "const" in fields else fields.get("enum")
    is_texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_texts and values else []


def tool_grammar(
    begin: str,
    end: str,
    tools: Sequence[Mapping[str, Any]],
    arguments: Callable[[str, Mapping[str, Any]], list[str]],
) -> Grammar:
    """Make the grammar of one call of one of these tools.

    begin, end  texts around the arguments; {name} is the tool's
    arguments   writes the rules of a name, from a schema
    """
    rules = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        schema = checked_schema(function.get("parameters") or {}, source=_SOURCE, is_lenient=True)
        head = json.dumps(begin.replace("{name}", function["name"]))
        rules.append(f"tool{i}: {head} tool{i}arguments {json.dumps(end)}")
        rules += arguments(f"tool{i}arguments", schema)
    start = " | ".join(f"tool{i}" for i in range(len(tools)))
    return lark_grammar("\n".join([f"start: {start}", *rules, ""]), _SOURCE)


def rules(rule: str, schema: Mapping[str, Any]) -> list[str]:
    """Write the rules of arguments in tags."""
    required = schema.get("required") or []
    parts = []
    written = []
    for i, (name, value) in enumerate((schema.get("properties") or {}).items()):
        argument = f"{rule}value{i}"
        parts.append(argument if name in required else f"{argument}?")
        head = json.dumps(f"<parameter={name}>\n")
        written.append(f"{argument}: {head} {argument}inner")
        written.append(_value_rule(f"{argument}inner", value, schema))
    whole = " ".join(parts) or '""'
    return [f"{rule}: {whole}", *written]


def _value_rule(rule: str, schema: Any, root: Any) -> str:
    end = json.dumps("\n</parameter>\n")
    types = types_of(schema, root)
    fields = resolved(schema, root)
    texts = texts_of(fields)
    if texts:
        return f"{rule}: ({' | '.join(json.dumps(text) for text in texts)}) {end}"
    if not types or "string" in types:
        text = f"{rule}text[lazy]: /(.|\\n)*<\\/parameter>/"
        return f'{rule}: {rule}text "\\n"\n{text}'
    return f"{rule}: {json_rule(schema, root)} {end}"


def json_rule(schema: Any, root: Any) -> str:
    """Write a rule for JSON under a schema, with references into its root."""
    place = "#/$defs/whole"
    whole = moved_schema(schema, place) | {"$defs": {"whole": moved_schema(root, place)}}
    return f"%json {json.dumps(whole)}"
