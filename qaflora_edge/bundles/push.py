"""Push a bundle or an adapter to the Hugging Face Hub: checked before, as one commit.

Only the files that belong to it go there, and no path of this machine.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from qaflora_edge.bundles.open import verify_bundle
from qaflora_edge.errors import BundleError, InputFileError, UploadError
from qaflora_edge.files import AnyPath, safe_join, unsafe_reason
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    BundleText,
    link_roots,
    packed_files,
    parse_bundle,
)
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.formats.names import HubRef, from_address, is_repo, parse_hub_ref, parse_repo
from qaflora_edge.hub.fetch import DOCUMENTS, hub_errors, model_info
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.peft.folder import INDEX_FILE, PeftAdapter, read_peft
from qaflora_edge.progress import Tell

Content = Path | bytes

CARD_FILE = "README.md"
LIBRARY = "qaflora-edge"
# Licences as bundles name them -> the Hub's names. Others are stated in the text only.
LICENSES = {
    name.lower(): name.lower()
    for name in ("MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "BSD-3-Clause")
}


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit's address, the reference that pins it, and the files in it."""

    url: str
    pinned: str
    files: tuple[str, ...]


def push(
    path: AnyPath,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_hub: str | None = None,
    progress: Tell | None = None,
) -> Pushed:
    """Push a bundle's folder, a PEFT folder or an adapter GGUF to a repository as one commit.

    repo      owner/name; it is made when it does not exist
    private   make it private; refused when it exists and is public
    revision  a branch, which is made when it does not exist; by default main
    base_hub  where others find a bundle's base, as owner/name/file.gguf, when it does not say

    Raises a QafloraError before anything is sent when the files are not what they should be,
    UploadError when the Hub does not take them.
    """
    repo = parse_repo(from_address(repo))
    path = Path(path)
    files, make_card = _collect(path, repo, base_hub, progress)
    try:
        return _send(files, make_card, repo, private, revision, message)
    except UploadError as error:
        raise UploadError(f"Could not push {path} to {repo}: {error}") from error


def _collect(
    path: Path, repo: str, base_hub: str | None, progress: Tell | None
) -> tuple[dict[str, Content], Callable[[], str]]:
    """Check what is to be pushed; give its files by name, and a way to make a card."""
    if os.path.exists(path / BUNDLE_FILE):
        text = _check_bundle(path, base_hub, progress)
        return _bundle_files(path, text), lambda: _bundle_card(text, repo)
    if base_hub is not None:
        raise BundleError(
            f"Cannot push {path} with a base: it is no bundle, expected {BUNDLE_FILE} in it. "
            "Leave --base-hub out."
        )
    if os.path.isdir(path):
        adapter = read_peft(path)
        _check_config(adapter.folder / CONFIG_FILE)
        return _peft_files(adapter.folder), lambda: _peft_card(adapter, repo)
    info = read_adapter_gguf(path)
    return {path.name: path}, lambda: _gguf_card(info, repo)


def _check_bundle(path: Path, base_hub: str | None, progress: Tell | None) -> BundleText:
    """Verify a bundle; give its description as it is to be pushed, with no path of this machine."""
    raw: dict[str, Any] = json.loads(json.dumps(verify_bundle(path, progress).text.raw))
    base = raw["base"]
    file = base.get("file") or ""
    if unsafe_reason(file) is not None or not (path / file).is_file():  # found by name instead
        base.pop("file", None)
    if base_hub is not None:
        base["hub"] = _check_base(base_hub, base["sha256"])
    if not any(base.get(key) for key in ("file", "registry", "hub")):
        raise BundleError(
            f"Cannot push the bundle {path}: nobody else could find its base, which "
            f"{BUNDLE_FILE} names as a file of this machine; expected base.registry or base.hub. "
            "Say where it is with --base-hub owner/name/file.gguf."
        )
    return parse_bundle(json.dumps(raw).encode(), str(path / BUNDLE_FILE))


def _check_base(base_hub: str, sha256: str) -> str:
    """Pin a Hub reference to a base. Raises BundleError when the Hub has another file there."""
    ref = parse_hub_ref(from_address(base_hub))
    info = model_info(ref)
    found = [
        file.lfs and file.lfs.sha256 for file in info.siblings or [] if file.rfilename == ref.file
    ]
    if found != [sha256]:
        what = f"the SHA-256 {found[0]}" if found else "no such file"
        raise BundleError(
            f"Cannot name {base_hub} as the base: the Hub has {what} there, expected {sha256}. "
            "Give the file that the bundle was made with, as owner/name/file.gguf."
        )
    return str(HubRef(ref.repo, ref.file, info.sha))


def _bundle_files(folder: Path, text: BundleText) -> dict[str, Content]:
    content = json.dumps(text.raw, indent=2, ensure_ascii=False) + "\n"
    files: dict[str, Content] = {BUNDLE_FILE: content.encode("utf-8")}
    roots = link_roots(folder)
    for name in packed_files(text):
        files[name] = safe_join(folder, name, roots)
    return files | _documents(folder)


def _peft_files(folder: Path) -> dict[str, Content]:
    names = [CONFIG_FILE, *(path.name for path in sorted(folder.glob("adapter*.safetensors")))]
    if (folder / INDEX_FILE).exists():
        names.append(INDEX_FILE)
    return {name: folder / name for name in names} | _documents(folder)


def _documents(folder: Path) -> dict[str, Content]:
    roots = link_roots(folder)
    return {name: safe_join(folder, name, roots) for name in DOCUMENTS if (folder / name).is_file()}


def _check_config(path: Path) -> None:
    """Refuse a training configuration that names a place on this machine."""
    for key, value in read_json_object(path.read_bytes()).items():
        if not isinstance(value, str):
            continue
        if os.path.isabs(value) or PureWindowsPath(value).drive or value.startswith("~"):
            raise InputFileError(
                f"Cannot push {path.parent}: field {key} of {path.name} is {value!r}, a place on "
                "this machine; expected nothing that is yours alone. Correct the field."
            )


def _send(
    files: dict[str, Content],
    make_card: Callable[[], str],
    repo: str,
    private: bool,
    revision: str | None,
    message: str | None,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, branch = HfApi(), revision or "main"
    with hub_errors(f"the Hub did not make {repo}", UploadError):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if branch != "main":
            api.create_branch(repo, branch=branch, exist_ok=True)
        info = api.model_info(repo, revision=branch)
    if private and not info.private:
        raise UploadError(
            "it exists and is public, expected a private one. Make it private on its page, leave "
            "--private out, or name another."
        )
    there = {sibling.rfilename for sibling in info.siblings or []}
    if CARD_FILE not in files and CARD_FILE not in there:
        files[CARD_FILE] = make_card().encode("utf-8")
    operations = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in files.items()
    ]
    with hub_errors(f"the Hub did not take the files for {repo}", UploadError):
        commit = api.create_commit(
            repo,
            operations,
            commit_message=message or f"Push with qaflora: {', '.join(sorted(files))}"[:200],
            revision=branch,
            parent_commit=info.sha,
        )
    return Pushed(commit.commit_url, str(HubRef(repo, None, commit.oid)), tuple(sorted(files)))


# --- the card: README.md of a pushed repository -------------------------------------------------


def _bundle_card(text: BundleText, repo: str) -> str:
    """The card of a bundle."""
    base = text.base
    base_model = parse_hub_ref(base.hub).repo if base.hub else None
    rows = [
        (a.name, str(a.rank), ", ".join(a.targets), a.description, a.source, a.license)
        for a in text.adapters
    ]
    lines = [
        *_head(text.license, base_model),
        f"# {_line(text.name) or repo}",
        "",
        *([_line(text.description), ""] if text.description else []),
        f"A bundle for {LIBRARY}: LoRA adapters for one quantised base, mixed for each question.",
        "",
        *_code(f"qaflora pull {repo} --with-base", f'qaflora run {repo} "A question"'),
        *_table(("adapter", "rank", "modules", "trained for", "source", "licence"), rows),
        *_measured(text),
        f"The base: {base.architecture}, {base.n_layer} layers, {base.size_bytes} bytes, SHA-256 "
        f"`{base.sha256}`"
        + (f", from `{place}`." if (place := base.hub or base.registry) else "."),
        "",
        f"Licence: {_line(text.license) or 'not stated'}. The base has its own.",
    ]
    return "\n".join(lines) + "\n"


def _measured(text: BundleText) -> list[str]:
    """What the bundle knows of its adapters besides what they are: lines, or none."""
    samples = ", ".join(text.fusion.get("samples", {}))
    return [f"* `--strategy centroid`: sample texts of {samples}", ""] if samples else []


def _gguf_card(info: AdapterInfo, repo: str) -> str:
    """The card of a single adapter GGUF."""
    facts = (info.path.name, str(info.rank), f"{info.alpha:g}", ", ".join(info.targets))
    names = ("file", "rank", "alpha", "modules")
    return _adapter_card(repo, info.architecture, _head("", None), names, facts)


def _peft_card(adapter: PeftAdapter, repo: str) -> str:
    """The card of a PEFT adapter."""
    config = adapter.config
    kinds = sorted({name.rpartition(".")[2] for name in adapter.modules})
    facts = (str(config.rank), f"{config.alpha:g}", ", ".join(kinds))
    head = _head("", config.base_name, library="peft", tags="[lora, qaflora]")
    return _adapter_card(repo, "PEFT", head, ("rank", "alpha", "modules"), facts)


def _adapter_card(
    repo: str, kind: str, head: Sequence[str], names: Sequence[str], facts: Sequence[str]
) -> str:
    name = repo.partition("/")[2]
    lines = [
        *head,
        f"# {name}",
        "",
        f"A LoRA adapter ({_line(kind)}) that {LIBRARY} mixes with others for each question.",
        "",
        *_code(f"qaflora bundle create my-bundle --base BASE.gguf --adapter {name}={repo}"),
        *_table(names, [facts]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _head(
    license: str,
    base_model: str | None,
    *,
    library: str = LIBRARY,
    tags: str = "[qaflora, lora, gguf]",
) -> list[str]:
    """The YAML that the Hub reads; it refuses a base_model that is no repository's name."""
    if base_model is not None and not is_repo(base_model):
        base_model = None
    fields: Mapping[str, str | None] = {
        "library_name": library,
        "license": LICENSES.get(license.strip().lower()),
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        "tags": tags,
    }
    return ["---", *(f"{key}: {value}" for key, value in fields.items() if value), "---", ""]


def _code(*commands: str) -> list[str]:
    return ["```sh", f"pip install {LIBRARY}", *commands, "```", ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(map(_line, line)) + " |" for line in lines), ""]


def _line(text: str) -> str:
    """A text of a bundle as one line of Markdown that cannot become anything else."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return flat.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")
