"""Tools in OpenAI's shape: checked, made into grammars, and their calls read out of answers."""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qaflora_edge.errors import OptionError, wrong_option
from qaflora_edge.inference.constraint import (
    Grammar,
    chosen_grammar,
    either_grammar,
    framed_grammar,
    schema_grammar,
)
from qaflora_edge.prompt.calls import CallFormat

_FENCES = ("```json", "```\n{", "```{")
_BARE = '{"name"'
_AFTER = re.compile(r"\s*(?:</tool_call>|;|```|\Z|(?=\[TOOL_CALLS\]))")
_DECODER = json.JSONDecoder()


def chosen_tools(tools: Any, tool_choice: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check the tools that the base is told of; find those of which it has to call one.

    tool_choice  None, "auto", "none", "required", or {"type": "function", "function": {"name": N}}

    Raises OptionError for what is no tool, or a choice that is not among them.
    """
    checked = [_checked(tool) for tool in tools or ()]
    if tool_choice == "none":
        return [], []
    if tool_choice in (None, "auto"):
        return checked, []
    if tool_choice == "required" and checked:
        return checked, checked
    function = _function(tool_choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in checked if tool["function"]["name"] == name]
    if not named:
        names = ", ".join(tool["function"]["name"] for tool in checked) or "none is given"
        form = "{'type': 'function', 'function': {'name': ...}}"
        expected = f"auto, none, required, or {form} with a name out of: {names}"
        raise wrong_option("tool_choice", tool_choice, expected)
    return checked, named[:1]


def answer_form(
    grammar: str | None, schema: Any, tools: "Tools | None", called: Sequence[dict[str, Any]]
) -> Grammar | None:
    """Choose what an answer follows: its own form, a call, or with a schema and free tools either.

    called  those of which one has to be called; OptionError for a form together with them
    """
    if grammar is None and schema is None:
        return tools.grammar(called) if tools and called else None
    if called:
        raise OptionError(
            "Options tool_choice and grammar or response_format are given, expected one of them; "
            "leave the others out.",
            "tool_choice",
        )
    if tools and grammar is None:
        return either_grammar(schema_grammar(schema), tools.grammar(tools.told))
    return chosen_grammar(grammar, schema)


def _checked(tool: Any) -> dict[str, Any]:
    function = _function(tool)
    if isinstance(function, Mapping):
        function = {name: each for name, each in function.items() if each is not None}
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("parameters", {}), Mapping)
    ):
        raise OptionError(
            f"Option tools has {tool!r:.200}, expected {{'type': 'function', 'function': "
            "{'name': ..., 'description': ..., 'parameters': a JSON schema}}.",
            "tools",
        )
    return {"type": "function", "function": function}


def _function(given: Any) -> Any:
    """Return the function of a tool or choice; those of responses have no inner object."""
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        return None
    flat = {name: each for name, each in given.items() if name not in ("type", "strict")}
    return given.get("function", flat)


def _moved(schema: Any, place: str) -> Any:
    """Point the references of a schema, from `#` on, to its place in a larger schema."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


class Tools(NamedTuple):
    """Know the tools that a base was told of, and how it calls them.

    told       as chosen_tools gives them
    is_single  whether only the first call of an answer counts
    """

    told: Sequence[dict[str, Any]]
    format: CallFormat
    is_single: bool = False

    def grammar(self, tools: Sequence[Mapping[str, Any]]) -> Grammar:
        """Make the grammar of one call of one of these tools, with arguments by its schema."""
        begin, end, field = self.format.begin, self.format.end, self.format.arguments
        forms, calls = [], []
        for i, tool in enumerate(tools):
            name = tool["function"]["name"]
            parameters = tool["function"].get("parameters") or {"type": "object"}
            place = f"#/anyOf/{i}/properties/{field}" if field else "#"
            try:
                parameters = _moved(parameters, place)
            except RecursionError as error:
                raise OptionError(
                    "Option tools has parameters of too many levels, expected fewer; use $defs.",
                    "tools",
                ) from error
            forms.append((begin.replace("{name}", name), parameters, end))
            fields = {"name": {"const": name}, field: parameters}
            calls.append({"type": "object", "properties": fields, "required": [*fields]})
        if field:
            forms = [(begin, {"anyOf": calls}, end)]
        return framed_grammar(forms, source="The parameters of tools")

    def shown(self, pieces: Iterable[str], calls: list[dict[str, Any]]) -> Iterator[str]:
        """Yield an answer's text until a call begins; at the end add the calls to a list."""
        held, is_start = "", True
        for piece in pieces:
            held += piece
            if is_start and _BARE.startswith("".join(held[:64].split())[: len(_BARE)]):
                continue
            is_start = False
            at = next((at for at in range(len(held)) if self._may_begin(held, at)), len(held))
            if at:
                yield held[:at]
            held = held[at:]
        rest, found = self.parse(held)
        calls += found
        if rest:
            yield rest

    def _may_begin(self, text: str, at: int) -> bool:
        """Tell whether a place begins with what a call begins with, or could with more text."""
        marks = (self.format.mark, *_FENCES)
        return any(text.startswith(mark, at) or mark.startswith(text[at:]) for mark in marks)

    def parse(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Give an answer without its tool calls, and the calls; a call that is no JSON stays text.

        Without a mark before it, JSON is a call if it has the name of a tool and arguments.
        """
        calls: list[dict[str, Any]] = []
        rest, at = "", 0
        while match := self.format.before.search(text, at):
            made, end = self._decoded(text, match)
            after = _AFTER.match(text, end)
            if made and after:
                rest += text[at : match.start()]
                calls, at = calls + made, after.end()
            else:
                rest, at = rest + text[at : match.end() + 1], match.end() + 1
        rest += text[at:]
        return (rest.strip(), calls[:1] if self.is_single else calls) if calls else (rest, [])

    def _decoded(self, text: str, match: re.Match[str]) -> tuple[list[dict[str, Any]], int]:
        """Read the JSON behind a match: calls, or none, and where it ends."""
        try:
            found, end = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return [], match.end()
        groups = match.groupdict()
        if groups.get("name"):
            found = {"name": groups["name"].strip(), "arguments": found, "id": groups["id"]}
        is_marked = self.format.mark in match[0]
        each_call = found if isinstance(found, list) else [found]
        made = [self._call(call, is_marked=is_marked) for call in each_call]
        return [call for call in made if call] if all(made) else [], end

    def _call(self, call: Any, *, is_marked: bool) -> dict[str, Any] | None:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters"))
        names = [tool["function"]["name"] for tool in self.told]
        if not is_marked and not (call["name"] in names and isinstance(arguments, dict)):
            return None
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        n_id, own_id = self.format.n_id, call.get("id")
        if not (isinstance(own_id, str) and len(own_id) == n_id):
            own_id = uuid.uuid4().hex[:n_id] if n_id else f"call_{uuid.uuid4().hex}"
        function = {"name": call["name"], "arguments": arguments}
        return {"id": own_id, "type": "function", "function": function}
