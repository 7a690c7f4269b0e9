"""Read adapter_config.json: rank, alpha and scale of each module, and what cannot be had.

A feature of PEFT that a plain LoRA cannot represent is refused by its own name.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import InputFileError, PeftConfigError, UnsupportedAdapterError
from qaflora_edge.files import open_input
from qaflora_edge.json_text import read_json_object

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 22
MAX_RANK = 1 << 14
MAX_PATTERNS = 1 << 14
MAX_PATTERN_LENGTH = 256
MAX_REPEATS = 3  # of unbounded repeats in a pattern, so that matching cannot take for ever

MIN_ALPHA, MAX_ALPHA = 1e-30, 1e30  # magnitudes that a float32 holds with room for a scale

# Named initialisations that leave the base as it is; others subtract their start from the base.
PLAIN_INITS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """What decides the size and the scale of each module of a LoRA."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    ties_weights: bool
    base_name: str | None

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)

    def scale_of(self, module: str) -> float:
        """Give alpha/rank, or alpha/sqrt(rank) for rsLoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(patterns: Mapping[str, object], module: str) -> str:
    """Give the first key that matches the module's name or the end of it at a dot.

    As PEFT 0.21 does, peft/utils/other.py get_pattern_key.
    """
    for key in patterns:
        if _compile(key).match(module):
            return key
    return module


@functools.lru_cache(maxsize=MAX_PATTERNS)
def _compile(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _is_set(value: object) -> bool:
    return value not in (None, False, "", [], {})


# field -> (is it in use?, why it cannot be represented, what to do)
_Refusal = tuple[Callable[[Any], bool], str, str]
_MERGE = "Merge the adapter into its base, or train a plain LoRA."
REFUSALS: Mapping[str, _Refusal] = {
    "use_dora": (_is_set, "DoRA also rescales the base's weights", _MERGE),
    "bias": (
        lambda value: _is_set(value) and value != "none",
        "trained biases are not low-rank",
        'Train with bias="none".',
    ),
    "lora_bias": (_is_set, "a bias on B is not low-rank", "Train with lora_bias=False."),
    "modules_to_save": (
        _is_set,
        "these modules were trained whole and are not low-rank",
        "Train them with LoRA (target_modules) or leave them out.",
    ),
    "layer_replication": (
        _is_set,
        "the adapter is for a base with repeated layers",
        "Use an adapter that was trained on the base as it is.",
    ),
    "trainable_token_indices": (
        _is_set,
        "single trained token embeddings are not low-rank",
        "Train without it, or merge the adapter into its base.",
    ),
    "target_parameters": (
        _is_set,
        "LoRA on bare parameters (as of experts) cannot be applied per layer",
        "Train with target_modules.",
    ),
    "alora_invocation_tokens": (
        _is_set,
        "an activated LoRA acts only after certain tokens",
        "Train a plain LoRA.",
    ),
    "megatron_config": (
        _is_set,
        "Megatron's parallel layers are split over devices",
        "Save the adapter from unsplit layers.",
    ),
    "use_qalora": (_is_set, "QA-LoRA pools its input in groups", "Train a plain LoRA."),
    "use_bdlora": (_is_set, "block-diagonal LoRA is stored in blocks", "Train a plain LoRA."),
    "arrow_config": (_is_set, "Arrow routes between other adapters", "Give those adapters."),
    "kasa_config": (_is_set, "KaSA also truncates the base's weights", _MERGE),
    "monteclora_config": (_is_set, "MonteCLoRA samples its weights", "Train a plain LoRA."),
}


def read_peft_config(folder: Path) -> PeftConfig:
    """Read and check `adapter_config.json` of a PEFT folder.

    Raises PeftConfigError when it is wrong, UnsupportedAdapterError when it asks for more than a
    plain LoRA.
    """
    path = folder / CONFIG_FILE
    fields = _read_fields(path)
    _check_supported(path, fields)
    # It says that the base's weight is stored as [n_in, n_out], as Conv1D of GPT-2 does; PEFT 0.21
    # corrects it by the layer (lora/layer.py dispatch_default). A and B are as for a linear layer
    # all the same, and a GGUF holds every weight as [n_out, n_in].
    _flag(path, fields, "fan_in_fan_out")
    return PeftConfig(
        path=path,
        rank=_rank(path, "r", fields.get("r", 8)),  # the defaults are PEFT's own
        alpha=_alpha(path, "lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=_flag(path, fields, "use_rslora"),
        rank_pattern=_pattern(path, fields, "rank_pattern", _rank),
        alpha_pattern=_pattern(path, fields, "alpha_pattern", _alpha),
        ties_weights=_flag(path, fields, "ensure_weight_tying"),
        base_name=_base_name(path, fields),
    )


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        with open_input(path) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputFileError(
            f"Cannot read {path}: opening it failed ({error.strerror}); expected the description "
            "of a PEFT adapter. Give the folder that PEFT's save_pretrained wrote."
        ) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise PeftConfigError(
            f"Cannot read {path}: it is longer than {MAX_CONFIG_BYTES} bytes; expected a few "
            "kilobytes. Fetch or save the adapter again."
        )
    try:
        return read_json_object(data)
    except ValueError as error:
        raise PeftConfigError(
            f"Cannot read {path}: it is not a JSON object ({error}). "
            "Fetch or save the adapter again."
        ) from error


def _check_supported(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise _wrong(path, "peft_type", kind, '"LORA"')
    if kind.upper() != "LORA":
        raise UnsupportedAdapterError(
            f"Cannot use {path}: peft_type is {kind[:80]!r}; only 'LORA' can be represented. "
            f"{_MERGE}"
        )
    for field, (is_used, reason, advice) in REFUSALS.items():
        value = fields.get(field)
        if is_used(value):
            raise UnsupportedAdapterError(
                f"Cannot use {path}: {field} is {_brief(value)}; {reason}, and a plain LoRA cannot "
                f"represent it. {advice}"
            )
    init = fields.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in PLAIN_INITS):
        raise UnsupportedAdapterError(
            f"Cannot use {path}: init_lora_weights is {_brief(init)}; this initialisation changes "
            "the base's weights too, and the adapter alone does not fit the unchanged base. Save "
            "it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong(path: Path, field: str, found: object, expected: str) -> PeftConfigError:
    what = "missing" if found is None else _brief(found)
    return PeftConfigError(
        f"Cannot use {path}: {field} is {what}; expected {expected}. "
        "Correct the file, or save the adapter again."
    )


def _flag(path: Path, fields: Mapping[str, Any], field: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise _wrong(path, field, value, "true or false")
    return bool(value)


def _rank(path: Path, field: str, value: object) -> int:
    if type(value) is int and 1 <= value <= MAX_RANK:
        return value
    raise _wrong(path, field, value, f"a whole number from 1 to {MAX_RANK}")


def _alpha(path: Path, field: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A GGUF keeps alpha as a float32, and 0 would mean "no scale" there.
    if is_number and MIN_ALPHA <= abs(value) <= MAX_ALPHA:
        return float(value)
    raise _wrong(path, field, value, f"a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}, or minus such")


def _pattern(
    path: Path, fields: Mapping[str, Any], field: str, check: Callable[[Path, str, object], Any]
) -> dict[str, Any]:
    """Check a mapping from regular expressions to ranks or alphas."""
    value = fields.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise _wrong(path, field, value, f"an object of up to {MAX_PATTERNS} patterns")
    for key in value:
        _check_regex(path, field, key)
    return {key: check(path, f"{field}[{_brief(key)}]", item) for key, item in value.items()}


def _check_regex(path: Path, field: str, key: str) -> None:
    n_repeat = len(re.findall(r"(?<!\\)[*+{]", key))
    # A repeated group, or many repeats, can make matching take exponential time.
    if len(key) > MAX_PATTERN_LENGTH or n_repeat > MAX_REPEATS or re.search(r"\)[*+{]", key):
        expected = (
            f"patterns of up to {MAX_PATTERN_LENGTH} characters and {MAX_REPEATS} repeats, and no "
            "repeated group"
        )
        raise _wrong(path, f"a pattern in {field}", key, expected)
    try:
        re.compile(key)  # alone first, for the position in the message
        _compile(key)
    except (re.error, RecursionError, OverflowError) as error:
        raise _wrong(
            path, f"a pattern in {field}", key, f"a regular expression ({error})"
        ) from error


def _base_name(path: Path, fields: Mapping[str, Any]) -> str | None:
    value = fields.get("base_model_name_or_path")
    if value is not None and not isinstance(value, str):
        raise _wrong(path, "base_model_name_or_path", value, "a name")
    return value
