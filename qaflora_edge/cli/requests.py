"""A file of requests: one JSON object a line, a prompt or messages with options of its own."""

import codecs
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from qaflora_edge.chat.messages import begin_with
from qaflora_edge.cli.prompts import Line, read_lines
from qaflora_edge.config import OWN, SHARED, Option, in_group
from qaflora_edge.errors import OptionError
from qaflora_edge.formats.json_text import shown

_KEYS = ("prompt", "messages", "id", "json_schema")


def _by_spelling() -> dict[str, Option]:
    """The options of a line, by their names in Python, as flags, and in OpenAI's calls."""
    options = (
        *in_group("sampling").values(),
        SHARED["strategy"],
        SHARED["raw_prompt"],
        OWN["run"]["system"],
    )
    spellings = ((option, (option.name, option.key, *option.aliases)) for option in options)
    return {name: option for option, names in spellings for name in names if name}


_OPTIONS = _by_spelling()


def read_requests(stream: BinaryIO, name: str) -> Iterator[Line]:
    """Read lines one at a time; blank ones are counted, and left out.

    name  of the stream, for messages
    """
    for index, data in enumerate(read_lines(stream, name)):
        if index == 0 and data is not None:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data is None or data.strip():
            yield Line(index, data, f"{name}, line {index + 1}")


def unknown_keys(found: Mapping[str, Any]) -> list[str]:
    """What a request has that is no option of it."""
    return [key for key in found if key not in _KEYS and key not in _OPTIONS]


def to_request(found: Mapping[str, Any], *, system: str | None, raw_prompt: bool) -> dict[str, Any]:
    """A request of Engine.generate_many; keys that are no options are left out.

    system, raw_prompt  of requests that do not say

    Raises OptionError for a wrong value, or what does not go together.
    """
    own = _own_options(found)
    own_system, is_raw = own.pop("system", None), own.pop("raw_prompt", raw_prompt)
    system = system if own_system is None else own_system
    if (strategy := own.pop("strategy", None)) is not None:
        own["weights"] = strategy
    if (schema := found.get("json_schema")) is not None:
        if not isinstance(schema, dict | bool):
            raise _wrong("json_schema", schema, "an object or true")
        own = {"stop": (), "grammar": None, **own, "json_schema": schema}
    prompt, messages = found.get("prompt"), found.get("messages")
    if (prompt is None) == (messages is None):
        raise OptionError(
            f"The request has {'neither' if prompt is None else 'both'} prompt and messages, "
            "expected one of them; correct the line."
        )
    if messages is None and not (isinstance(prompt, str) and prompt.strip()):
        raise _wrong("prompt", prompt, "a text that is not empty")
    if prompt is None and not (isinstance(messages, list) and messages):
        raise _wrong("messages", messages, "a list of messages")
    if not is_raw:
        asked = messages or [{"role": "user", "content": prompt}]
        return {**own, "messages": begin_with(system, asked)}
    if prompt is None or own_system is not None:
        raise OptionError(
            "The request has messages or system, which need the chat template, and raw_prompt, "
            "which leaves it out; expected one or the other."
        )
    return {**own, "prompt": prompt}


def _own_options(found: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a request has, by their names; null stands for the default."""
    own: dict[str, Any] = {}
    for key, value in found.items():
        option = _OPTIONS.get(key)
        if option is None or value is None:
            continue
        if option.name == "stop" and isinstance(value, str):
            value = [value]
        if not option.fits(value):
            raise _wrong(key, value, option.expected)
        if option.name in own:
            raise OptionError(f"Option {option.name} is given twice, as {key} too; expected once.")
        own[option.name] = value
    return own


def _wrong(name: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"Option {name} is {shown(value)}, expected {expected}; correct the line.")
