"""A folder of PEFT or MLX: where the adapter's files are, and what they hold."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qaflora_edge.errors import InputFileError, PeftConfigError
from qaflora_edge.files import AnyPath, what_is_at
from qaflora_edge.formats.bundle import BUNDLE_FILE
from qaflora_edge.formats.inputs import Json, read_input, read_json_file, reading
from qaflora_edge.formats.names import CONFIG_FILE, PICKLES, WEIGHTS_FILE
from qaflora_edge.peft.config import PeftConfig, parse_config
from qaflora_edge.peft.modules import PeftModule, make_modules, read_safetensors

MLX_FILE = "adapters.safetensors"
_SAVED = "Give the folder that PEFT's save_pretrained wrote."
_FOUND = {  # in a folder that is no adapter -> what to do
    BUNDLE_FILE: "It is a bundle; of a bundle give one file, such as adapters/NAME.gguf.",
    WEIGHTS_FILE: f"Without it nobody knows the scale of {WEIGHTS_FILE}. {_SAVED}",
    "*.gguf": "Of an adapter GGUF give the file.",
    "config.json": "It holds a whole model: a merged adapter is no adapter any more. Give the "
    "folder that was merged, or make the model itself a base with llama.cpp's "
    "convert_hf_to_gguf.py.",
}
MAX_SUBFOLDERS = 1000
MAX_CONFIG_BYTES = 1 << 22
CARD_FILE = "README.md"
MAX_CARD_BYTES = 256 << 10
MAX_SENTENCE = 300  # characters of a description
MAX_WIDGETS = 32
# Sentences that trainers write under every adapter.
_SAYS_NOTHING = re.compile(r"More Information Needed|fine-tuned version of|Provide a quick summary")


@dataclass(frozen=True)
class PeftAdapter:
    """A checked folder; the values are read when asked for."""

    config: PeftConfig
    modules: Mapping[str, PeftModule]

    @property
    def folder(self) -> Path:
        return self.config.path.parent

    @property
    def trained_on(self) -> str:
        """Quote the config's name of its base, for the end of a sentence."""
        name = self.config.base_name
        return f" (adapter_config.json says {name[:200]!r})" if name else ""


def read_peft(folder: AnyPath) -> PeftAdapter:
    """Read and check a PEFT folder, or one of MLX.

    Raises InputFileError and its kinds when a file is missing or damaged,
    UnsupportedAdapterError when the adapter is more than a plain LoRA.
    """
    folder, fields = read_fields(folder)
    config = parse_config(folder / CONFIG_FILE, fields)
    weights = _weights_file(folder, config.mlx_scale is not None)
    tensors = read_safetensors(weights)
    return PeftAdapter(config, make_modules(config, tensors))


def read_fields(folder: AnyPath) -> tuple[Path, Json]:
    """Find the folder that holds the adapter, and read its config as a JSON object, unchecked.

    Raises InputFileError when it cannot be opened, PeftConfigError when it is no object.
    """
    folder = adapter_folder(folder)
    advice = "Give the folder that PEFT's save_pretrained wrote, or fetch it again."
    fields = read_json_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES, PeftConfigError, advice)
    return folder, fields


def adapter_folder(folder: AnyPath) -> Path:
    """Give the folder that holds the adapter: itself, or its one sub-folder that does.

    PEFT saves an adapter called NAME in PEFT_DIR/NAME, and trainers save checkpoints so.

    Raises InputFileError when there is none, or when there are several to choose from.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputFileError(
            f"Cannot read the adapter {folder}: it {what_is_at(folder)}; expected a PEFT folder "
            f"with {CONFIG_FILE} and {WEIGHTS_FILE}. {_advice_for_file(folder)}"
        )
    if os.path.exists(folder / CONFIG_FILE):
        return folder
    with reading(folder):
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    ordered = sorted(names, key=lambda name: (len(name), name))  # checkpoint-9 before checkpoint-10
    inside = [folder / name for name in ordered[:MAX_SUBFOLDERS] if _is_adapter(folder / name)]
    if len(inside) > 1:
        shown = ", ".join(sub.name for sub in inside[:10])
        if len(inside) > 10:
            shown += ", ..."
        raise InputFileError(
            f"Cannot read the adapter {folder}: it holds {len(inside)} adapters in sub-folders, "
            f"{shown}; expected one. Give one of them, such as {inside[-1]}."
        )
    if not inside:
        fitting = (advice for name, advice in _FOUND.items() if any(folder.glob(name)))
        raise InputFileError(
            f"Cannot read the adapter {folder}: {CONFIG_FILE} is missing; expected a PEFT folder. "
            f"{next(fitting, _SAVED)}"
        )
    return inside[0]


def adapter_files(folder: Path) -> list[Path]:
    """List the files of a PEFT or MLX folder that an adapter is read from."""
    return sorted(
        [folder / CONFIG_FILE, *folder.glob("adapter_model*"), *folder.glob("adapters.*")]
    )


@dataclass(frozen=True)
class ModelCard:
    """What a model card says of an adapter: example questions, and its first sentence or ""."""

    questions: tuple[str | list[Json], ...] = ()
    sentence: str = ""


def read_card(folder: Path) -> ModelCard:
    """Read the model card of a PEFT folder; one that is missing or cannot be read says nothing."""
    import yaml  # type: ignore[import-untyped]  # of huggingface_hub
    from huggingface_hub import RepoCard

    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        text = read_input(adapter_folder(folder) / CARD_FILE, MAX_CARD_BYTES).decode("utf-8")
        card = RepoCard(text, ignore_metadata_errors=True)
        widgets = card.data.get("widget")
        listed = widgets if isinstance(widgets, list) else []
        questions = map(_widget_question, listed[:MAX_WIDGETS])
        return ModelCard(tuple(filter(None, questions)), _first_sentence(card.text))
    return ModelCard()


def _widget_question(widget: object) -> str | list[Json] | None:
    if not isinstance(widget, dict):
        return None
    text = widget.get("text")
    if isinstance(text, str):
        return text.strip()
    messages = widget.get("messages")
    if not isinstance(messages, list):
        return None
    for message in messages:
        is_message = isinstance(message, dict) and {"role", "content"} <= message.keys()
        if not is_message or not isinstance(message["content"], str):
            return None
    is_asked = bool(messages) and messages[-1]["role"] == "user"
    return messages if is_asked else None


def _first_sentence(markdown: str) -> str:
    """Find the first sentence of the first paragraph that says something; else give ""."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().parse(markdown)
    for before, token in pairwise(tokens):
        if before.type != "paragraph_open" or before.level:
            continue
        words = [child.content or " " for child in token.children or () if child.type != "image"]
        text = " ".join("".join(words).split())
        sentence = re.split(r"(?<=[.!?])\s|(?<=[。！？])", text, maxsplit=1)[0]
        if sentence and not _SAYS_NOTHING.search(sentence):
            return sentence[:MAX_SENTENCE]
    return ""


def check_no_part(path: Path) -> None:
    """Refuse a file of a PEFT folder that is given in place of the folder."""
    if os.path.isfile(path) and path.suffix != ".gguf" and _is_adapter(path.parent):
        raise InputFileError(
            f"Cannot read the adapter {path}: it is a file of a PEFT folder; expected the folder. "
            f"{_advice_for_file(path)}"
        )


def _advice_for_file(path: Path) -> str:
    if not os.path.isfile(path):
        return "Check the path."
    if path.suffix == ".gguf":
        return (
            "A GGUF is not converted: put an adapter GGUF in a bundle as it is, with `qaflora "
            "bundle create`."
        )
    return f"Give {path.parent}." if _is_adapter(path.parent) else "Give the folder that it is in."


def _is_adapter(folder: Path) -> bool:
    return os.path.isfile(folder / CONFIG_FILE)


def _weights_file(folder: Path, is_mlx: bool) -> Path:
    path = folder / (MLX_FILE if is_mlx else WEIGHTS_FILE)
    if path.is_file():
        return path
    fault = f"{path.name} is missing"
    advice = _SAVED
    pickles = sorted(path.name for path in folder.glob("adapter*") if path.suffix in PICKLES)
    if is_mlx:
        fault = f"{MLX_FILE} is missing, which belongs to an {CONFIG_FILE} of MLX"
        advice = "Give the folder that mlx_lm.lora wrote."
    elif pickles:
        fault = f"it has {pickles[0]}, and pickles can run code; expected {WEIGHTS_FILE}"
        advice = "Load it with PEFT and save it with save_pretrained(..., safe_serialization=True)."
    raise InputFileError(f"Cannot read the adapter {folder}: {fault}. {advice}")
