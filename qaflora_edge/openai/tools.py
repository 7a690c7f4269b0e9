"""Tools in OpenAI's shape, for bases that write <tool_call>{...}</tool_call> (Qwen, Hermes)."""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qaflora_edge.chat.messages import BEGIN, END
from qaflora_edge.errors import OptionError, wrong_option
from qaflora_edge.inference.constraint import (
    Grammar,
    chosen_grammar,
    either_grammar,
    schema_grammar,
)

_MARKS = (BEGIN, "```json", "```\n{")
_CALL = re.compile(rf"{BEGIN}(.*?)(?:{END}|\Z)|```(?:json)?\s*(\{{.*?\}})\s*(?:```|\Z)", re.DOTALL)


def chosen_tools(tools: Any, tool_choice: Any) -> tuple[list[dict[str, Any]], Grammar | None]:
    """Check the tools that the base is told of; make the grammar of a call that it has to make.

    tool_choice  None or "auto", "none", "required", or {"type": "function", "function":
                 {"name": ...}}

    Raises OptionError for what is no tool, or a choice that is not among them.
    """
    checked = [_checked(tool) for tool in tools or ()]
    if tool_choice == "none":
        return [], None
    if tool_choice in (None, "auto"):
        return checked, None
    if tool_choice == "required" and checked:
        return checked, _call_grammar(checked)
    function = _function(tool_choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in checked if tool["function"]["name"] == name]
    if not named:
        names = ", ".join(tool["function"]["name"] for tool in checked) or "none is given"
        form = "{'type': 'function', 'function': {'name': ...}}"
        expected = f"auto, none, required, or {form} with a name out of: {names}"
        raise wrong_option("tool_choice", tool_choice, expected)
    return checked, _call_grammar(named[:1])


def answer_form(
    grammar: str | None, schema: Any, tools: Sequence[dict[str, Any]], call: Grammar | None
) -> Grammar | None:
    """Choose what an answer follows: its own form, a call, or with a schema and free tools either.

    tools, call  from chosen_tools; OptionError for a form together with a call
    """
    if grammar is None and schema is None:
        return call
    if call is not None:
        raise OptionError(
            "Options tool_choice and grammar or response_format are given, expected one of them; "
            "leave the others out.",
            "tool_choice",
        )
    if tools and grammar is None:
        return either_grammar(schema_grammar(schema), _call_grammar(tools))
    return chosen_grammar(grammar, schema)


def _checked(tool: Any) -> dict[str, Any]:
    function = _function(tool)
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
    return {"type": "function", "function": dict(function)}


def _function(given: Any) -> Any:
    """Return the function of a tool or choice; those of responses have no inner object."""
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        return None
    flat = {name: each for name, each in given.items() if name not in ("type", "strict")}
    return given.get("function", {name: each for name, each in flat.items() if each is not None})


def _call_grammar(tools: Sequence[Mapping[str, Any]]) -> Grammar:
    """Make the grammar of one call of one of these tools, with arguments by its schema."""
    calls = []
    for i, tool in enumerate(tools):
        parameters = tool["function"].get("parameters") or {"type": "object"}
        try:
            parameters = _moved(parameters, f"#/anyOf/{i}/properties/arguments")
        except RecursionError as error:
            raise OptionError(
                "Option tools has parameters of too many levels, expected fewer; use $defs.",
                "tools",
            ) from error
        name = {"const": tool["function"]["name"]}
        calls.append(
            {
                "type": "object",
                "properties": {"name": name, "arguments": parameters},
                "required": ["name", "arguments"],
            }
        )
    return schema_grammar(
        {"anyOf": calls}, source="The parameters of tools", before=f"{BEGIN}\n", after=f"\n{END}"
    )


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


def shown_text(pieces: Iterable[str], calls: list[dict[str, Any]]) -> Iterator[str]:
    """Yield an answer's text until a tool call begins; at the end add the calls to a list."""
    held = ""
    for piece in pieces:
        held += piece
        begins = (at for at in range(len(held)) if _may_begin(held[at : at + len(BEGIN)]))
        at = next(begins, len(held))
        if at:
            yield held[:at]
        held = held[at:]
    rest, found = parse_calls(held)
    calls += found
    if rest:
        yield rest


def _may_begin(text: str) -> bool:
    """Tell whether a text begins with what a tool call begins with, or could with more of it."""
    return any(text.startswith(mark) or mark.startswith(text) for mark in _MARKS)


def parse_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Give an answer without its tool calls, and the calls; a call that is no JSON stays text.

    Small bases write a call as fenced JSON; it is one if it has a name and arguments.
    """
    calls = []

    def take(match: re.Match[str]) -> str:
        call = _parsed(match[1] or match[2], needs_arguments=match[1] is None)
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else rest), calls


def _parsed(text: str, *, needs_arguments: bool) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    if needs_arguments and not isinstance(call.get("arguments"), dict):
        return None
    arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }
