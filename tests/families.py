"""Families of models that transformers can make tiny, one or more for each architecture.

Rows of the tables in docs/architectures.md, from families.json: `like` names groups of options,
which the others add to. Widths are the least that every family's own rules allow. Families whose
code is published with their files, and is not in transformers, come from published.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import EXACT, Checkpoint


@dataclass(frozen=True)
class Family:
    """One class of transformers, and what the converters need to know of it.

    name      a row's first column
    arch      the GGUF's general.architecture
    model     transformers' class; `config` is that of its configuration
    targets   ends of the names of the modules to adapt; None: every linear layer but experts
    restored  fields of config.json that upstream reads and transformers does not write
    upstream  why upstream's adapter is another, if it is
    refuses_experts  whether LoRA of its experts is refused, which is not tried then
    note      why it is written as it is
    """

    name: str
    arch: str
    model: str
    config: str
    options: Mapping[str, Any]
    tolerance: float = EXACT
    targets: tuple[str, ...] | None = None
    restored: Mapping[str, Any] = field(default_factory=dict)
    upstream: str = ""
    refuses_experts: bool = False
    note: str = ""

    @property
    def is_mixture(self) -> bool:
        """Whether its layers have experts that a router chooses from."""
        return any("expert" in name and value not in (0, 1) for name, value in self.options.items())


def _read(name: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(name).read_text("utf-8"))


_DATA, _PUBLISHED = _read("families.json"), _read("published.json")


def _options(value: Any, known: Mapping[str, Any] = _DATA["groups"]) -> Any:
    """Put the options of the groups in that `like` names."""
    if not isinstance(value, dict):
        return value
    own = {name: _options(each, known) for name, each in value.items() if name != "like"}
    groups = [_options(known[name], known) for name in value.get("like", [])]
    return {name: each for group in (*groups, own) for name, each in group.items()}


def _family(fields: dict[str, Any]) -> Family:
    stem = fields["model"].removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    fields = {"config": f"{stem}Config", **fields, "options": _options(fields["options"])}
    if "targets" in fields:
        fields["targets"] = tuple(fields["targets"])
    return Family(**fields)


def _checkpoint(fields: dict[str, Any]) -> Checkpoint:
    fields = {"embedding": "model.embed_tokens", "head": "lm_head", "tolerance": EXACT, **fields}
    model = fields.pop("model")
    for part in ("config", "linear", "others"):
        fields[part] = _options(fields[part], _PUBLISHED["groups"])
    fields["config"]["architectures"] = [model]
    return Checkpoint(**fields)


PUBLISHED = [_checkpoint(fields) for fields in _PUBLISHED["families"]]
_ALL = [_family(fields) for fields in _DATA["families"]]
GEMMA_3N = _ALL.pop()
AnyFamily = Family | Checkpoint
FAMILIES: Mapping[str, AnyFamily] = {family.name: family for family in (*_ALL, *PUBLISHED)}
# Those whose experts are adapted too.
MIXTURES = [family for family in _ALL if family.is_mixture and not family.refuses_experts]
