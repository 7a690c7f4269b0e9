"""Push a bundle or an adapter to the Hugging Face Hub: checked before, as one commit.

Only the files that belong to it go there, and bundle.json names no path of this machine.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.bundles.open import verify_bundle
from qaflora_edge.errors import BundleError, RegistryError, UploadError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.adapter import read_adapter_gguf
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    is_inside,
    packed_files,
    parse_bundle,
    read_bundle_text,
    safe_join,
)
from qaflora_edge.formats.names import HubRef, from_address, is_repo, parse_hub_ref
from qaflora_edge.hub.fetch import DOCUMENTS, hub_errors
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.peft.folder import INDEX_FILE, read_peft
from qaflora_edge.progress import Tell, silent

Content = Path | bytes

CARD_FILE = "README.md"
LIBRARY = "qaflora-edge"
# Licences as bundles name them, in the Hub's names. The card states no others.
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "bsd-3-clause"}


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
    progress: Tell | None = None,
) -> Pushed:
    """Push a bundle's folder, a PEFT folder or an adapter GGUF to a repository as one commit.

    repo      owner/name; it is made when it does not exist
    private   make it private; refused when it exists and is public
    revision  a branch, which is made when it does not exist; by default main

    Raises a QafloraError before anything is sent when the files are not what they should be,
    UploadError when the Hub does not take them.
    """
    repo, path = from_address(repo), Path(path)
    if not is_repo(repo):
        raise RegistryError(f"Cannot push to {repo!r}; expected a Hub repository as owner/name.")
    if os.path.exists(path / BUNDLE_FILE):
        files, card = _bundle(path, repo, progress)
    elif os.path.isdir(path):
        files, card = _peft(path, repo)
    else:
        read_adapter_gguf(path)
        files, card = {path.name: path}, _card(repo, {})
    try:
        return _send(files, card, repo, private, revision, message)
    except UploadError as error:
        raise UploadError(f"Could not push {path} to {repo}: {error}") from error


def _bundle(path: Path, repo: str, progress: Tell | None) -> tuple[dict[str, Content], str]:
    """Verify a bundle; give the files to push by their names there, and a card."""
    verify_bundle(path, progress or silent)
    raw = dict(read_bundle_text(path).raw)
    base = raw["base"] = dict(raw["base"])
    file = base.get("file") or ""
    if not is_inside(file) or not (path / file).is_file():  # found by name instead
        base.pop("file", None)
    if not any(base.get(key) for key in ("file", "registry", "hub")):
        raise BundleError(
            f"Cannot push the bundle {path}: nobody else could find its base, which "
            f"{BUNDLE_FILE} names as a file of this machine; expected base.registry or base.hub. "
            f"Say where it is with `qaflora bundle base {path} owner/name/file.gguf`."
        )
    content = (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    text = parse_bundle(content, str(path / BUNDLE_FILE))
    files: dict[str, Content] = {name: safe_join(path, name) for name in packed_files(text)}
    fields = {"license": text.license}
    if text.base.hub:
        fields["base_model"] = parse_hub_ref(text.base.hub).repo
    use = (f"qaflora pull {repo} --with-base", f'qaflora run {repo} "A question"')
    return {BUNDLE_FILE: content} | files | _documents(path), _card(repo, fields, *use)


def _peft(path: Path, repo: str) -> tuple[dict[str, Content], str]:
    adapter = read_peft(path)
    folder, base = adapter.folder, adapter.config.base_name
    names = [CONFIG_FILE, *(each.name for each in sorted(folder.glob("adapter*.safetensors")))]
    if (folder / INDEX_FILE).exists():
        names.append(INDEX_FILE)
    fields = {"library_name": "peft"} | ({"base_model": base} if base and is_repo(base) else {})
    files: dict[str, Content] = {name: folder / name for name in names}
    return files | _documents(folder), _card(repo, fields)


def _documents(folder: Path) -> dict[str, Content]:
    return {name: safe_join(folder, name) for name in DOCUMENTS if (folder / name).is_file()}


def _send(
    files: dict[str, Content],
    card: str,
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
    if CARD_FILE not in {*files, *(each.rfilename for each in info.siblings or [])}:
        files = files | {CARD_FILE: card.encode("utf-8")}
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


def _card(repo: str, fields: Mapping[str, str], *use: str) -> str:
    """Write README.md of a repository. Only checked names stand in it, no text of a bundle.

    fields  of the head that the Hub reads
    use     commands; by default those for one adapter
    """
    name = repo.partition("/")[2]
    known = {"library_name": LIBRARY, "tags": "[qaflora, lora]", **fields}
    license = known.pop("license", "").strip().lower()
    if license in LICENSES:
        known["license"] = license
    head = [f"{key}: {value}" for key, value in known.items()]
    create = f"qaflora bundle create my-bundle --base BASE.gguf --adapter {name}={repo}"
    about = f"LoRA that {LIBRARY} mixes for each question."
    code = ["```sh", f"pip install {LIBRARY}", *(use or [create]), "```"]
    return "\n".join(["---", *head, "---", "", f"# {name}", "", about, "", *code]) + "\n"
