"""adapter_config.json of PEFT or MLX: rank and scale of each module, and what is refused.

What a plain LoRA cannot represent is refused by its own name. Patterns take bounded time: `regex`
is `re` with a time limit.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import regex
from msgspec import Meta, Struct

from qaflora_edge.errors import PeftConfigError, UnsupportedAdapterError
from qaflora_edge.files import package_data
from qaflora_edge.formats.inputs import (
    Object,
    WrongField,
    expected_of,
    read_as,
    shortened,
    shown,
)

MAX_PATTERN_LENGTH = 256
MATCH_S = 1.0  # of the processor, to match all patterns with all modules
LEAST_S = 1e-3  # that a match may take
MERGE = "Merge the adapter into its base, or train a plain LoRA."
CONVERT = "Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
# Named initialisations that leave the base as it is; others subtract their start from the base.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Features that a plain LoRA cannot represent, by field and by kind of adapter (of PEFT 0.21,
# peft/utils/peft_types.py): why, and what to do. Tensors: a pattern of the name -> what it is.
REFUSED: Object = json.loads(package_data("data/refused.json").read_text("utf-8"))
_OTHER_TYPE = ("only LoRA can be represented", MERGE)
# Modules, by names or ends of names, or by one expression.
Rule: TypeAlias = Collection[str] | regex.Pattern[str]

Rank = Annotated[int, Meta(title="a whole number from 1 to 16384", ge=1, le=16384)]
# From 1e-30 up or down; zero is refused apart.
Alpha = Annotated[
    float, Meta(title="a number from 1e-30 to 1e+30, or minus such", ge=-1e30, le=1e30)
]
LEAST_ALPHA = 1e-30
ModuleName = Annotated[str, Meta(title="a name")]
Names = Annotated[str | list[ModuleName] | None, Meta(title="a text or a list of names")]
Layer = Annotated[int, Meta(title="a layer")]
OBJECT_OF_PATTERNS = Meta(title="an object of up to 16384 patterns", max_length=16384)


class PeftFields(Struct, frozen=True, kw_only=True):
    """What is read of PEFT's adapter_config.json; the defaults are PEFT's own."""

    peft_type: Annotated[str, Meta(title='"LORA"')]
    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: bool | None = None
    ensure_weight_tying: bool | None = None
    rank_pattern: Annotated[dict[str, Rank], OBJECT_OF_PATTERNS] | None = None
    alpha_pattern: Annotated[dict[str, Alpha], OBJECT_OF_PATTERNS] | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    layers_pattern: Names = None
    target_parameters: Annotated[list[ModuleName], Meta(title="a list of names")] | None = None
    layers_to_transform: Annotated[
        Layer | list[Layer] | None, Meta(title="a layer or a list of layers")
    ] = None
    bias: Annotated[
        Literal["none", "all", "lora_only", ""] | None, Meta(title="'none', 'all' or 'lora_only'")
    ] = None
    base_model_name_or_path: ModuleName | None = None
    peft_version: ModuleName | None = None


class MlxParameters(Struct, frozen=True, kw_only=True):
    """The object lora_parameters of MLX's adapter_config.json."""

    rank: Rank
    scale: Alpha
    keys: Names = None
    alpha: Any = None


class MlxFields(Struct, frozen=True, kw_only=True):
    """What is read of MLX's adapter_config.json."""

    lora_parameters: Annotated[MlxParameters, Meta(title="an object with rank and scale")]
    fine_tune_type: Annotated[Literal["lora"], Meta(title="'lora'")] | None = None
    model: ModuleName | None = None


class _Clock:
    """Bound the time that patterns of one config take."""

    left_s = MATCH_S

    def matches(self, pattern: regex.Pattern[str], text: str) -> bool:
        """Match a whole text. Raises TimeoutError."""
        start_s = time.thread_time()
        match = pattern.fullmatch(text, timeout=max(LEAST_S, self.left_s))
        self.left_s -= time.thread_time() - start_s
        return match is not None


@dataclass(frozen=True)
class LoraSize:
    """The rank of a module's LoRA, and the factor of B A."""

    rank: int
    scale: float


@dataclass(frozen=True)
class PeftConfig:
    """What decides the size and the scale of each module of a LoRA.

    targets     modules that are adapted, by their names or ends of names; None: told otherwise
    excluded    modules that are not, in the same way
    layers      the only ones that are adapted; none: all are
    parameters  bare parameters that are adapted, by their names or ends of names
    bias        "none", or which of the base's biases were trained, if it has any
    version     of the PEFT that wrote it, if it says so
    mlx_scale   the scale of every module where MLX wrote the folder; None: PEFT did
    clock       of all its patterns
    """

    path: Path
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: Rule | None = None
    excluded: Rule | None = None
    layers: frozenset[int] = frozenset()
    parameters: tuple[str, ...] = ()
    bias: str = "none"
    ties_weights: bool = False
    base_name: str | None = None
    version: str | None = None
    mlx_scale: float | None = None
    clock: _Clock = field(default_factory=_Clock, repr=False, compare=False)

    def size_of(self, module: str) -> LoraSize:
        """Give rank, and alpha/rank, or alpha/sqrt(rank) for rsLoRA."""
        if self.mlx_scale is not None:
            return LoraSize(self.rank, self.mlx_scale)
        key = self._matching_key(self.rank_pattern, module)
        rank = self.rank_pattern.get(key, self.rank)
        key = self._matching_key(self.alpha_pattern, module)
        alpha = self.alpha_pattern.get(key, self.alpha)
        return LoraSize(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def _matches(self, pattern: regex.Pattern[str], module: str) -> bool:
        try:
            return self.clock.matches(pattern, module)
        except TimeoutError as error:
            raise PeftConfigError(
                f"Cannot use {self.path}: matching its patterns with its modules takes more than "
                f"{MATCH_S:g} s, expected less; it ended at {module} with "
                f"{shortened(pattern.pattern)}. Write the patterns with fewer repeats and "
                "alternatives, or save the adapter again."
            ) from error

    def _is_in(self, rule: Rule, module: str) -> bool:
        if isinstance(rule, regex.Pattern):
            return self._matches(rule, module)
        return is_named(rule, module)

    def _matching_key(self, patterns: Mapping[str, object], module: str) -> str:
        """Give the first key that matches the module's name or the end of it at a dot.

        As PEFT 0.21 does, peft/utils/other.py get_pattern_key.
        """
        for key in patterns:
            if self._matches(_compile_key(key), module):
                return key
        return module

    def mismatch(self, found: str) -> PeftConfigError:
        """Make the error of a config that says something else than the tensors."""
        advice = "The two files do not belong together; save the adapter again."
        return PeftConfigError(f"Cannot use {self.path}: {found}. {advice}")

    def check_target(self, module: str) -> None:
        """Refuse a module that has tensors but is not adapted by the config.

        As PEFT 0.21 does, peft/tuners/tuners_utils.py check_target_module_exists.
        """
        targets = self.targets or {module}
        layer = regex.match(r".*?\.[^.]*\.(\d+)\.", module)
        is_in_layers = not self.layers or (layer is not None and int(layer[1]) in self.layers)
        is_free = isinstance(targets, regex.Pattern) or module in targets or is_in_layers
        is_in = is_free and self._is_in(targets, module)
        if not is_in or self._is_in(self.excluded or (), module):
            names = "target_modules, exclude_modules and layers_to_transform do"
            name = names if self.mlx_scale is None else "lora_parameters.keys does"
            raise self.mismatch(
                f"module {module} has tensors, but {name} not name it; expected every module that "
                "has tensors"
            )


def is_mlx(fields: Object) -> bool:
    """Tell by its fields whether MLX wrote an adapter_config.json."""
    return "peft_type" not in fields and ("lora_parameters" in fields or "fine_tune_type" in fields)


def parse_config(path: Path, fields: Object) -> PeftConfig:
    """Check the fields of an adapter_config.json.

    Raises PeftConfigError for a wrong one, UnsupportedAdapterError for more than a plain LoRA.
    """
    struct: type[MlxFields] | type[PeftFields] = PeftFields
    if is_mlx(fields):
        struct = MlxFields
        _refuse_mlx(path, fields)
    else:
        _refuse_peft(path, fields)
    try:
        typed = read_as(struct, fields)
        if isinstance(typed, MlxFields):
            return _mlx_config(path, typed)
        return _peft_config(path, typed)
    except WrongField as error:
        raise _wrong(path, str(error)) from error


def _wrong(path: Path, what: str) -> PeftConfigError:
    return PeftConfigError(
        f"Cannot use {path}: {what}. Correct the file, or save the adapter again."
    )


def _refuse_peft(path: Path, fields: Object) -> None:
    peft_type = str(fields.get("peft_type", "LORA"))
    if peft_type.upper() != "LORA" and isinstance(fields["peft_type"], str):
        reason, advice = REFUSED["types"].get(peft_type.upper(), _OTHER_TYPE)
        raise UnsupportedAdapterError(
            f"Cannot use {path}: peft_type is {peft_type[:80]!r}; expected 'LORA', for {reason}. "
            f"{advice}"
        )
    for name, (reason, advice) in REFUSED["fields"].items():
        if value := fields.get(name):
            raise UnsupportedAdapterError(
                f"Cannot use {path}: {name} is {shown(value)}; {reason}, and a plain LoRA cannot "
                f"represent it. {advice}"
            )
    init = fields.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in PLAIN_INITS):
        # What PEFT 0.21 converts, tuners/lora/model.py; of LoftQ it knows no unchanged base.
        is_converted = str(init).lower().startswith(("pissa", "corda", "olora", "lora_ga"))
        raise UnsupportedAdapterError(
            f"Cannot use {path}: init_lora_weights is {shown(init)}; this initialisation changes "
            "the base's weights too, and the adapter alone does not fit the unchanged base. "
            f"{CONVERT if is_converted else MERGE}"
        )


def _peft_config(path: Path, fields: PeftFields) -> PeftConfig:
    # fan_in_fan_out: the base's weight is stored as [n_in, n_out], as Conv1D of GPT-2 does; PEFT
    # 0.21 corrects it by the layer (lora/layer.py dispatch_default). A and B are as for a linear
    # layer all the same, and a GGUF holds every weight as [n_out, n_in].
    ranks = fields.rank_pattern or {}
    alphas = fields.alpha_pattern or {}
    for key in (*ranks, *alphas):
        _check_key(path, key)
    _check_alpha("lora_alpha", fields.lora_alpha)
    for key, alpha in alphas.items():
        _check_alpha(f"alpha_pattern.{key}", alpha)
    layers = fields.layers_to_transform or []
    if fields.layers_pattern:
        layers = []
    if isinstance(layers, int):
        layers = [layers]
    return PeftConfig(
        path=path,
        rank=fields.r,
        alpha=fields.lora_alpha,
        use_rslora=bool(fields.use_rslora),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        targets=_names_of(fields.target_modules),
        excluded=_names_of(fields.exclude_modules),
        layers=frozenset(layers),
        parameters=tuple(fields.target_parameters or ()),
        bias=fields.bias or "none",
        ties_weights=bool(fields.ensure_weight_tying),
        base_name=fields.base_model_name_or_path,
        version=fields.peft_version,
    )


def _check_alpha(field: str, alpha: float) -> None:
    if abs(alpha) < LEAST_ALPHA:
        raise WrongField(field, f"{alpha:g}", expected_of(Alpha))


def _names_of(value: Any) -> Rule | None:
    """Give names of modules or an expression for them; None for nothing, or what is none."""
    if isinstance(value, str):
        if value.lower() != "all-linear" and len(value) <= MAX_PATTERN_LENGTH:
            with contextlib.suppress(regex.error, RecursionError, OverflowError):
                expression: Rule = regex.compile(value)
                return expression
        return None
    return frozenset(value) if value else None


def is_named(targets: Collection[str], module: str) -> bool:
    """Tell whether a target is the module's name, or the end of it at a dot."""
    words = module.split(".")
    return any(".".join(words[begin:]) in targets for begin in range(len(words)))


def _refuse_mlx(path: Path, fields: Object) -> None:
    tuning = fields.get("fine_tune_type", "lora")
    if tuning == "lora" and fields.get("use_dora"):
        tuning = "dora"  # as versions before September 2024 wrote it
    if isinstance(tuning, str) and tuning in REFUSED["mlx_types"]:
        raise UnsupportedAdapterError(
            f"Cannot use {path}: fine_tune_type is {tuning!r}; {REFUSED['mlx_types'][tuning]}, and "
            "a plain LoRA cannot represent it. Fuse it into its base with mlx_lm.fuse, or train a "
            "plain LoRA."
        )


def _mlx_config(path: Path, fields: MlxFields) -> PeftConfig:
    """MLX's scale is the factor of B A, whatever the rank."""
    parameters = fields.lora_parameters
    rank = parameters.rank
    alpha = parameters.alpha
    _check_alpha("lora_parameters.scale", parameters.scale)
    # Before mlx-lm 57b16724, June 2024, the factor was scale * alpha / rank. Later versions ignore
    # alpha, but wrote their default of 16 until 191d81d1, April 2025. fine_tune_type came in
    # September 2024: a config without it may be of either kind.
    if fields.fine_tune_type is None and alpha not in (None, rank):
        raise PeftConfigError(
            f"Cannot use {path}: lora_parameters.alpha is {shown(alpha)} with a scale; MLX used it "
            f"until June 2024 and ignores it since, and without fine_tune_type the scale cannot be "
            f"known; expected none, or {rank} as the rank. Remove alpha if a later version trained "
            "the adapter; else multiply scale by alpha / rank and remove it."
        )
    return PeftConfig(
        path=path,
        rank=rank,
        alpha=parameters.scale * rank,
        targets=_names_of(parameters.keys),
        base_name=fields.model,
        mlx_scale=parameters.scale,
    )


def _check_key(path: Path, key: str) -> None:
    """Refuse a key of rank_pattern or alpha_pattern that is no expression, or long."""
    if len(key) > MAX_PATTERN_LENGTH:
        expected = f"up to {MAX_PATTERN_LENGTH} characters"
        raise _wrong(path, f"a pattern is {shown(key)}, expected {expected}")
    try:
        regex.compile(key)  # alone first, for the position in the message
        _compile_key(key)
    except (regex.error, RecursionError, OverflowError) as error:
        raise _wrong(
            path, f"a pattern is {shown(key)}, expected a regular expression ({error})"
        ) from error


@functools.lru_cache(maxsize=1 << 14)  # patterns
def _compile_key(key: str) -> regex.Pattern[str]:
    return regex.compile(rf"(.*\.)?({key})")
