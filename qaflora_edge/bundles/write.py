"""What making and editing a bundle have in common: adapter files, their records, measurements."""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qaflora_edge.bundles.open import read_adapter
from qaflora_edge.bundles.source import AdapterSource
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import (
    AdapterMismatchError,
    BundleError,
    GgufFileError,
    InputFileError,
    StrategyError,
    UnsupportedAdapterError,
    os_errors,
)
from qaflora_edge.files import (
    atomic_path,
    open_input,
    package_data,
    readable,
    sha256_file,
    write_text_atomic,
)
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    MAX_ADAPTERS,
    NAME_PATTERN,
    NAME_RULE,
    parse_bundle,
)
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.strategy import Chosen, parse_strategy
from qaflora_edge.weighing.weigher import Known, Weigher

PROMPTS_FILE = "data/neutral_prompts.json"


def neutral_prompts() -> list[str]:
    """The prompts that ship with the package, in order."""
    data = json.loads(package_data(PROMPTS_FILE).read_text(encoding="utf-8"))
    return [str(prompt) for prompt in data["prompts"]]


def prompts_sha256(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in UTF-8, each followed by a line feed."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode("utf-8")).hexdigest()


_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
CALIBRATION_CTX = 512  # tokens; the neutral prompts are short


def check_names(names: Sequence[str], new: Collection[str] | None = None) -> None:
    """Check that names can be adapters of one bundle. Raises BundleError.

    new  those that it has not; None: all of them
    """
    seen: set[str] = set()
    for name in names:
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(f"The adapter name {name!r} cannot be used; expected {NAME_RULE}.")
        if _DEVICE.fullmatch(name) and (new is None or name in new):
            raise BundleError(
                f"The adapter name {name!r} cannot be used: files of that name are devices on "
                "Windows; expected another."
            )
        if name.lower() in seen:
            raise BundleError(
                f"The adapter name {name!r} is taken already (capital letters make no difference: "
                "names become file names); give each adapter a name of its own."
            )
        seen.add(name.lower())
    if len(names) > MAX_ADAPTERS:
        raise BundleError(
            f"{len(names)} adapters are too many for one bundle; expected at most {MAX_ADAPTERS}."
        )


def put_adapter(
    source: AdapterSource, target: Path, header: GgufHeader, outtype: str
) -> AdapterInfo:
    """Convert or copy one adapter to its place in a bundle, and check it against the base."""
    if source.path.is_dir():
        convert_adapter(source.path, header.path, target, outtype=outtype, name=source.name)
    else:
        _copy(source.path, target)
    try:
        return read_adapter(target, header, are_values_known=source.path.is_dir())
    except (AdapterMismatchError, GgufFileError, UnsupportedAdapterError):
        if source.path.is_file():  # the same failure, naming the file the user knows
            read_adapter(source.path, header)
        raise


def _copy(source: Path, target: Path) -> None:
    failure = f"Cannot copy the adapter {source} into the bundle"
    with (
        os_errors(InputFileError, failure, "Check that you may read it."),
        open_input(source) as file,
        atomic_path(target) as temporary,
        temporary.open("wb") as copy,
    ):
        shutil.copyfileobj(file, copy, 1 << 20)


def adapter_record(
    name: str, file: str, info: AdapterInfo, source: AdapterSource, note: Mapping[str, str]
) -> dict[str, Any]:
    """What bundle.json says of an adapter.

    note  may have source, license and description
    """
    record = {
        "name": name,
        "file": file,
        "sha256": sha256_file(info.path),
        "size_bytes": Path(info.path).stat().st_size,
        "rank": info.rank,
        "alpha": info.alpha,
        "targets": list(info.targets),
        "source": note.get("source", source.hub or source.name),
        "license": note.get("license", source.license),
        "description": note.get("description", ""),
    }
    if info.trained_on is not None:
        record["trained_on"] = info.trained_on
    if source.hub is not None:
        record["hub"] = source.hub
    return record


def recordable(path: Path) -> str:
    """A path as text of bundle.json. Raises BundleError when it is no text."""
    if readable(str(path)) != str(path):
        raise BundleError(
            f"Cannot record the base {path} in {BUNDLE_FILE}: its path is not UTF-8, and JSON "
            "holds nothing else; expected a path that is. Rename the file or its folder, or give "
            "the base by a name of `qaflora models`."
        )
    return path.as_posix()


def prompts_record() -> dict[str, Any]:
    """The neutral prompts that typical divergences are measured on now."""
    prompts = neutral_prompts()
    return {"sha256": prompts_sha256(prompts), "n_prompt": len(prompts)}


def measure_typical(
    base_path: Path, adapters: Mapping[str, Path], tell: Tell
) -> dict[str, dict[str, Any]]:
    """Typical divergences of each adapter over the neutral prompts (method.md section 7).

    returns  adapter -> one of weighing.calibration.KEYS -> what it says
    """
    from qaflora_edge.engine import Engine

    with Engine(base=base_path, adapters=adapters, n_ctx=CALIBRATION_CTX) as engine:
        typical = engine.typical_divergence(
            neutral_prompts(), lambda done, total: tell("calibration", done, total)
        )
    return {
        name: {key: _rounded(value) for key, value in by.items()} for name, by in typical.items()
    }


def _rounded(value: Any) -> Any:
    """Numbers with nine digits: all that float32 has."""
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.9g}")


def check_measured(what: str, strategy: str, names: Sequence[str], *, calibrate: bool) -> None:
    """Check that a strategy is one, and that what it needs will be measured.

    what       is not done otherwise, as in "Cannot add the adapter a to b"
    calibrate  whether the adapters will be measured

    Raises StrategyError or BundleError.
    """
    if not calibrate and _needs_typical(parse_strategy(strategy, names), names):
        raise BundleError(
            f"{what}: its strategy is {strategy!r}, which needs typical divergences, and they are "
            "not to be measured. Leave --no-calibrate out, or choose another with --strategy."
        )


def _needs_typical(chosen: Chosen, names: Sequence[str]) -> bool:
    is_choice = chosen.options.get("first", len(names)) < len(names)
    return chosen.strategy.needs_typical or is_choice


def check_targets(what: str, strategy: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Check that adapters adapt what a strategy goes by, before they are measured.

    what     as for check_measured
    records  adapters of bundle.json

    Raises BundleError.
    """
    targets = {record["name"]: record["targets"] for record in records}
    found = parse_strategy(strategy, tuple(targets)).strategy
    others = [name for name, kinds in targets.items() if not {*kinds} & {*found.reads_of_each}]
    if others and found.reads_of_each:
        raise BundleError(
            f"{what}: its strategy is {strategy!r}, which goes by what adapters add to "
            f"{', '.join(found.reads_of_each)}, and {', '.join(others)} adds nothing to any of "
            "them. Choose another with --strategy, or leave it out."
        )
    if not found.can_compare(targets.values()):
        raise BundleError(
            f"{what}: its strategy is {strategy!r}, which compares adapters by "
            f"{', '.join(found.compares)}, and no one of these is adapted by all of "
            f"{', '.join(targets)}. Choose another with --strategy."
        )


def check_strategy(
    what: str, fusion: Mapping[str, Any], records: Sequence[Mapping[str, Any]], n_layer: int
) -> None:
    """Check that a bundle which is to be written can be weighed by its strategy.

    what     as for check_measured
    fusion   of bundle.json; sample texts and fits that the strategy needs may come later
    records  adapters of bundle.json

    Raises BundleError.
    """
    names = tuple(record["name"] for record in records)
    known = Known().under(**{key: fusion.get(key) for key in ("strategy", "lens", "pool")})
    known = replace(known, typical=fusion.get("typical", {}))
    try:
        check_targets(what, known.strategy, records)
        if _needs_typical(parse_strategy(known.strategy, names), names):
            Weigher(names, n_layer, known)
    except StrategyError as error:
        raise BundleError(f"{what}: {error}") from error


def check_system(base_path: Path, system: str) -> None:
    """Raise ChatTemplateError or PromptError where a text cannot begin a conversation."""
    from qaflora_edge.backend.model import Model
    from qaflora_edge.chat.messages import begin_with
    from qaflora_edge.chat.tokens import chat_tokens

    with Model(base_path) as model:
        chat_tokens(model, begin_with(system, [{"role": "user", "content": "?"}]))


def write_bundle_json(folder: Path, text: Mapping[str, Any], where: str) -> None:
    """Replace a bundle's description, whole or not at all.

    where  names it in messages

    Raises BundleError for what could not be read again; nothing is written then.
    """
    content = json.dumps(text, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        parse_bundle(content.encode("utf-8"), where)
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
        found = content[max(0, error.start - 20) : error.end + 20]
        raise BundleError(
            f"Cannot write {where}: a text for it is not UTF-8 (near {found!r}); expected UTF-8. "
            "Type it in a terminal that uses UTF-8."
        ) from error
    write_text_atomic(folder / BUNDLE_FILE, content)
