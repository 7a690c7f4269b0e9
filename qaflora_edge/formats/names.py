"""Names of models: references to the Hugging Face Hub, and the registry `models/registry.json`.

A model of the registry is one file of the Hub, pinned by its sha256.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.errors import RegistryError
from qaflora_edge.files import cache_dir, package_data

CONFIG_FILE = "adapter_config.json"  # of a PEFT or MLX folder
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # ends of names of adapters that are pickles
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REF = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>[^@\\]+\.gguf))?(?:@(?P<revision>[A-Za-z0-9._/-]+))?"
)
_REPO = re.compile(rf"(?=.{{,200}}$){_NAME}/{_NAME}")  # the Hub allows 96 for a name

_FILE_TYPE = re.compile(r"[-._](I?Q\d\w*|B?F16|F32)(\.gguf)?$|\.gguf$", re.IGNORECASE)
_FORMATS = ("gguf", "hf", "unsloth", "bnb", "4bit", "8bit", "bf16", "f16", "fp16")


@dataclass(frozen=True)
class HubRef:
    """What a user names: `owner/name`, `owner/name/file.gguf`, each with `@revision` or without."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return self.repo + file + (f"@{self.revision}" if self.revision else "")


def parse_hub_ref(text: str) -> HubRef:
    """Read a Hub reference. Raises RegistryError when it has another form."""
    match = _REF.fullmatch(text)
    if match is None or not all(_is_plain(match[part]) for part in ("file", "revision")):
        raise RegistryError(
            f"Cannot use {text!r} as a Hugging Face Hub reference; expected owner/name, "
            "owner/name/file.gguf, or one of them with @revision. "
            "See 'qaflora models' for names that need no owner."
        )
    return HubRef(match["repo"], match["file"], match["revision"])


def from_address(text: str) -> str:
    """Turn the address of a repository's page into a reference; give other text as it is."""
    return re.sub(r"^(https?://)?(huggingface\.co|hf\.co)/([^/]+/[^/]+)/?$", r"\3", text)


def is_repo(text: str) -> bool:
    """Tell whether a text can be the name of a repository."""
    return _REPO.fullmatch(text) is not None


def plain_name(name: str) -> str:
    """Strip a model's name of its owner, its file type, and the signs between words."""
    words = re.split(r"[^a-z0-9]+", _FILE_TYPE.sub("", name.rpartition("/")[2]).lower())
    return "".join(word for word in words if word not in _FORMATS)


def _is_plain(path: str | None) -> bool:
    """Tell whether a part becomes a path that stays where it is put."""
    return path is None or all(part not in ("", ".", "..") for part in path.split("/"))


@dataclass(frozen=True)
class Model:
    """One model of the registry.

    kind  chat when it has a chat template
    """

    name: str
    description: str
    file: str
    sha256: str
    size_bytes: int
    architecture: str
    kind: str
    license: str
    hub: HubRef
    note: str = ""


def load_registry() -> dict[str, Model]:
    content = json.loads(package_data("models/registry.json").read_text(encoding="utf-8"))
    models = {}
    for name, entry in content["models"].items():
        entry["hub"] = HubRef(**entry["hub"])
        models[name] = Model(name=name, **entry)
    return models


def find_model(name: str) -> Model:
    """Look a model up by name. Raises RegistryError when there is none."""
    models = load_registry()
    if name not in models:
        raise RegistryError(
            f"There is no model {name!r} in the registry; it knows {', '.join(models)}. "
            "See 'qaflora models', or give a Hugging Face Hub repository as owner/name."
        )
    return models[name]


def models_dir() -> Path:
    """Name the folder of the cache that holds whole models."""
    return cache_dir() / "models"


def local_path(model: Model) -> Path | None:
    """Give the path of a model that is already here, else None.

    Its size is compared, not its hash: a file gets its name only after its hash was right.
    """
    path = models_dir() / model.file
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size == model.size_bytes:
            return path
    return None


def pulled_model(name: str) -> Path | None:
    """The file of a registry model when it is here, else None; None too for an unknown name."""
    model = load_registry().get(name)
    return None if model is None else local_path(model)
