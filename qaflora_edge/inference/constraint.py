"""What an answer has to follow: a grammar, or a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaflora_edge.errors import OptionError
from qaflora_edge.grammar.json_schema import json_schema_to_gbnf


def grammar_text(grammar: str | None, json_schema: Mapping[str, Any] | bool | None) -> str | None:
    """The grammar an answer follows: as given, or of a JSON schema; None without either."""
    if grammar is not None and json_schema is not None:
        raise OptionError(
            "Options grammar and a JSON schema are both given; give one or the other."
        )
    return grammar if json_schema is None else json_schema_to_gbnf(json_schema)
