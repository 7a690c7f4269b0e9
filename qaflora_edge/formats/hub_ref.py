"""References to the Hugging Face Hub: read and written, nothing looked up."""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from qaflora_edge.errors import RegistryError

MAX_REPO_CHARS = 200  # the Hub allows 96 for a name

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REF = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>[^@\\]+\.gguf))?(?:@(?P<revision>[A-Za-z0-9._/-]+))?"
)
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_ADDRESS = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{_NAME}/{_NAME})"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?P<path>/[^?#]*)?)?/?(?:[?#].*)?"
)


@dataclass(frozen=True)
class HubRef:
    """What a user names: `owner/name`, `owner/name/file.gguf`, each with `@revision` or without."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        return (
            self.repo
            + (f"/{self.file}" if self.file else "")
            + (f"@{self.revision}" if self.revision else "")
        )


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
    """Turn the address of a Hub page, as a browser has it, into a reference.

    Other text is given as it is, and what an address names beyond a repository, a revision and a
    file stays in it for parse_hub_ref to refuse.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return text
    path = (match["path"] or "").removeprefix("/")
    revision = unquote(match["revision"] or "")
    is_pinned = revision not in ("", "main")
    return match["repo"] + (f"/{unquote(path)}" if path else "") + (f"@{revision}" * is_pinned)


def is_repo(text: str) -> bool:
    """Tell whether a text can be the name of a repository."""
    return len(text) <= MAX_REPO_CHARS and _REPO.fullmatch(text) is not None


def parse_repo(text: str) -> str:
    """Read the name of a repository. Raises RegistryError when it is no `owner/name`."""
    if not is_repo(text):
        raise RegistryError(
            f"Cannot use {text!r} as the name of a Hub repository; expected owner/name."
        )
    return text


def _is_plain(path: str | None) -> bool:
    """Tell whether a part becomes a path that stays where it is put."""
    return path is None or all(part not in ("", ".", "..") for part in path.split("/"))
