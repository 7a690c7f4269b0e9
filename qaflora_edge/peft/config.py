"""Read adapter_config.json: rank, alpha and scale of each module, and what cannot be had.

A feature of PEFT that a plain LoRA cannot represent is refused by its own name.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaflora_edge.errors import InputFileError, PeftConfigError, UnsupportedAdapterError
from qaflora_edge.files import read_input
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.peft.patterns import (
    MAX_CHOICES,
    MAX_PATTERN_LENGTH,
    MAX_PATTERNS,
    MAX_REPEATS,
    MAX_WORK,
    TargetRule,
    compile_key,
    is_bounded,
    match_work,
    matching_key,
)
from qaflora_edge.peft.refusals import FIELDS, MERGE, is_set, type_refusal

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 22
MAX_RANK = 1 << 14
MAX_NAMES = 1 << 16  # of modules or layers, in a list

MIN_ALPHA, MAX_ALPHA = 1e-30, 1e30  # magnitudes that a float32 holds with room for a scale

# Named initialisations that leave the base as it is; others subtract their start from the base.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
CONVERT = "Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."


@dataclass(frozen=True)
class PeftConfig:
    """What decides the size and the scale of each module of a LoRA.

    parameters  bare parameters that are adapted, by their names or ends of names
    bias  "none", or which of the base's biases were trained, if it has any
    version  of the PEFT that wrote it, if it says so
    """

    path: Path
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: TargetRule = field(default_factory=TargetRule)
    parameters: tuple[str, ...] = ()
    bias: str = "none"
    ties_weights: bool = False
    base_name: str | None = None
    version: str | None = None

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(matching_key(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(matching_key(self.alpha_pattern, module), self.alpha)

    def scale_of(self, module: str) -> float:
        """Give alpha/rank, or alpha/sqrt(rank) for rsLoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_work(self, modules: Collection[str]) -> None:
        """Refuse patterns that would take very long to match with these modules."""
        n_char = max(map(len, modules), default=0)
        keys = [*self.rank_pattern, *self.alpha_pattern]
        work = self.targets.work(n_char) + sum(match_work(key, n_char, n_repeat=1) for key in keys)
        if work * len(modules) > MAX_WORK:
            raise PeftConfigError(
                f"Cannot use {self.path}: matching its patterns with {len(modules)} modules takes "
                f"up to {work * len(modules)} steps; expected at most {MAX_WORK}. Write the "
                "patterns with fewer repeats and alternatives, or save the adapter again."
            )

    def check_target(self, module: str) -> None:
        """Refuse a module that has tensors but is not adapted by the config, as in PEFT."""
        if not self.targets.allows(module):
            raise PeftConfigError(
                f"Cannot use {self.path}: module {module} has tensors, but {self.targets.fields} "
                "do not name it; expected every module that has tensors. The two files do not "
                "belong together; save the adapter again, or correct this one if the tensors are "
                "right."
            )


def read_fields(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` as the JSON object that it is.

    Raises InputFileError when it cannot be opened, PeftConfigError when it is no object.
    """
    path = folder / CONFIG_FILE
    try:
        return read_json_object(read_input(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise InputFileError(
            f"Cannot read {path}: opening it failed ({error.strerror}); expected the description "
            "of a PEFT adapter. Give the folder that PEFT's save_pretrained wrote."
        ) from error
    except ValueError as error:
        raise PeftConfigError(
            f"Cannot read {path}: {error}; expected a JSON object of a few kilobytes. Fetch or "
            "save the adapter again."
        ) from error


def parse_config(path: Path, fields: Mapping[str, Any]) -> PeftConfig:
    """Check what an adapter_config.json of PEFT holds.

    Raises PeftConfigError when it is wrong, UnsupportedAdapterError when it asks for more than a
    plain LoRA.
    """
    _check_supported(path, fields)
    # It says that the base's weight is stored as [n_in, n_out], as Conv1D of GPT-2 does; PEFT 0.21
    # corrects it by the layer (lora/layer.py dispatch_default). A and B are as for a linear layer
    # all the same, and a GGUF holds every weight as [n_out, n_in].
    _flag(path, fields, "fan_in_fan_out")
    return PeftConfig(
        path=path,
        rank=check_rank(path, "r", fields.get("r", 8)),  # the defaults are PEFT's own
        alpha=check_alpha(path, "lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=_flag(path, fields, "use_rslora"),
        rank_pattern=_pattern(path, fields, "rank_pattern", check_rank),
        alpha_pattern=_pattern(path, fields, "alpha_pattern", check_alpha),
        targets=_target_rule(path, fields),
        parameters=_parameters(path, fields),
        bias=_bias(path, fields),
        ties_weights=_flag(path, fields, "ensure_weight_tying"),
        base_name=check_name(
            path, "base_model_name_or_path", fields.get("base_model_name_or_path")
        ),
        version=check_name(path, "peft_version", fields.get("peft_version")),
    )


def _check_supported(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise wrong_field(path, "peft_type", kind, '"LORA"')
    if kind.upper() != "LORA":
        reason, advice = type_refusal(kind)
        raise UnsupportedAdapterError(
            f"Cannot use {path}: peft_type is {kind[:80]!r}; expected 'LORA', for {reason}. "
            f"{advice}"
        )
    for name, (reason, advice) in FIELDS.items():
        value = fields.get(name)
        if is_set(value):
            raise UnsupportedAdapterError(
                f"Cannot use {path}: {name} is {_brief(value)}; {reason}, and a plain LoRA cannot "
                f"represent it. {advice}"
            )
    init = fields.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in PLAIN_INITS):
        # What PEFT 0.21 converts, tuners/lora/model.py; of LoftQ it knows no unchanged base.
        is_converted = str(init).lower().startswith(("pissa", "corda", "olora", "lora_ga"))
        advice = CONVERT if is_converted else MERGE
        raise UnsupportedAdapterError(
            f"Cannot use {path}: init_lora_weights is {_brief(init)}; this initialisation changes "
            "the base's weights too, and the adapter alone does not fit the unchanged base. "
            f"{advice}"
        )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def wrong_field(path: Path, field: str, found: object, expected: str) -> PeftConfigError:
    """The error for a field with a value that it cannot have."""
    what = "missing" if found is None else _brief(found)
    return PeftConfigError(
        f"Cannot use {path}: {field} is {what}; expected {expected}. "
        "Correct the file, or save the adapter again."
    )


def _flag(path: Path, fields: Mapping[str, Any], field: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise wrong_field(path, field, value, "true or false")
    return bool(value)


def check_rank(path: Path, field: str, value: object) -> int:
    """Give a rank. Raises PeftConfigError for what is none, as the other checks here do."""
    if type(value) is int and 1 <= value <= MAX_RANK:
        return value
    raise wrong_field(path, field, value, f"a whole number from 1 to {MAX_RANK}")


def check_alpha(path: Path, field: str, value: Any) -> float:
    """Give an alpha, or a scale, that a float32 holds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A GGUF keeps alpha as a float32, and 0 would mean "no scale" there.
    if is_number and MIN_ALPHA <= abs(value) <= MAX_ALPHA:
        return float(value)
    raise wrong_field(
        path, field, value, f"a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}, or minus such"
    )


def _pattern(
    path: Path, fields: Mapping[str, Any], field: str, check: Callable[[Path, str, object], Any]
) -> dict[str, Any]:
    """Check a mapping from regular expressions to ranks or alphas."""
    value = fields.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise wrong_field(path, field, value, f"an object of up to {MAX_PATTERNS} patterns")
    for key in value:
        _check_regex(path, field, key)
    return {key: check(path, f"{field}[{_brief(key)}]", item) for key, item in value.items()}


def _check_regex(path: Path, field: str, key: str) -> None:
    if not is_bounded(key):
        expected = (
            f"patterns of up to {MAX_PATTERN_LENGTH} characters, {MAX_REPEATS} repeats and "
            f"{MAX_CHOICES} choices, and no repeated group"
        )
        raise wrong_field(path, f"a pattern in {field}", key, expected)
    try:
        re.compile(key)  # alone first, for the position in the message
        compile_key(key)
    except (re.error, RecursionError, OverflowError) as error:
        raise wrong_field(
            path, f"a pattern in {field}", key, f"a regular expression ({error})"
        ) from error


def _target_rule(path: Path, fields: Mapping[str, Any]) -> TargetRule:
    layers = fields.get("layers_to_transform")
    if type(layers) is int:
        layers = [layers]
    if layers is not None and not (
        isinstance(layers, list)
        and len(layers) <= MAX_NAMES
        and all(type(layer) is int for layer in layers)
    ):
        raise wrong_field(path, "layers_to_transform", layers, "a layer or a list of layers")
    patterns = check_names(path, "layers_pattern", fields.get("layers_pattern"))
    targets = check_names(path, "target_modules", fields.get("target_modules"))
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = None
    return TargetRule(
        targets=targets,
        excluded=check_names(path, "exclude_modules", fields.get("exclude_modules")),
        layers=tuple(layers) if layers else None,
        layers_patterns=(patterns,) if isinstance(patterns, str) else patterns or (),
    )


def _parameters(path: Path, fields: Mapping[str, Any]) -> tuple[str, ...]:
    names = check_names(path, "target_parameters", fields.get("target_parameters"))
    if isinstance(names, str):
        raise wrong_field(path, "target_parameters", names, "a list of names")
    return names or ()


def check_names(path: Path, field: str, value: object) -> tuple[str, ...] | str | None:
    """Give names of modules or one expression; None for nothing, as PEFT takes an empty list."""
    if not is_set(value):
        return None
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and len(value) <= MAX_NAMES
        and all(isinstance(name, str) for name in value)
    ):
        return tuple(value)
    raise wrong_field(path, field, value, "a text or a list of names")


def _bias(path: Path, fields: Mapping[str, Any]) -> str:
    """Which biases were trained. Where the base has none, `all` is the same as `none`."""
    value = fields.get("bias")
    if not is_set(value):
        return "none"
    if value not in ("none", "all", "lora_only"):
        raise wrong_field(path, "bias", value, "'none', 'all' or 'lora_only'")
    return str(value)


def check_name(path: Path, field: str, value: object) -> str | None:
    """Give a name; None where there is none."""
    if value is not None and not isinstance(value, str):
        raise wrong_field(path, field, value, "a name")
    return value
