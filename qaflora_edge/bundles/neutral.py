"""The neutral prompts that a new bundle's adapters are measured on (strategy `calibrated`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from qaflora_edge.files import package_data

PROMPTS_FILE = "data/neutral_prompts.json"


def neutral_prompts() -> list[str]:
    """The prompts that ship with the package, in order."""
    data = json.loads(package_data(PROMPTS_FILE).read_text(encoding="utf-8"))
    return [str(prompt) for prompt in data["prompts"]]


def prompts_sha256(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in UTF-8, each followed by a line feed."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode("utf-8")).hexdigest()
