"""Talk with the Hub through its own library: its listings, its progress, its failures.

The library brings the token (HF_TOKEN, or what `hf auth login` stored), the endpoint, retries and
the cache; it is imported when it is needed.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qaflora_edge.errors import (
    DownloadError,
    OutputFileError,
    QafloraError,
    RegistryError,
    is_disk_full,
)
from qaflora_edge.formats.hub_ref import HubRef
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.progress import TellBytes

LIST_TIMEOUT_SECONDS = 30
_TOKEN_ADVICE = "give a token that may read it, with `hf auth login` or in HF_TOKEN"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; sha256 for large files, git_sha1 for the others."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class HubListing:
    """The files of a repository at one commit."""

    commit: str
    files: tuple[HubFile, ...]

    def file(self, name: str) -> HubFile | None:
        return next((file for file in self.files if file.name == name), None)


def list_files(ref: HubRef) -> HubListing:
    """Ask the Hub what a repository holds at a revision. Raises DownloadError."""
    from huggingface_hub import HfApi

    with hub_errors(f"the Hub did not give the list of files of {ref.repo}"):
        info = HfApi().model_info(
            ref.repo, revision=ref.revision, files_metadata=True, timeout=LIST_TIMEOUT_SECONDS
        )
    if not info.sha:
        raise DownloadError(
            f"the Hub did not say which commit of {ref.repo} it lists; expected one. Try again."
        )
    return HubListing(info.sha, tuple(_hub_file(sibling) for sibling in info.siblings or []))


def _hub_file(sibling: Any) -> HubFile:
    if sibling.lfs:
        return HubFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256, None)
    return HubFile(sibling.rfilename, sibling.size or 0, None, sibling.blob_id)


def advice(ref: HubRef, listing: HubListing) -> str:
    """What to do with a repository that is none of ours, by what it holds."""
    if any(file.name.endswith(".gguf") for file in listing.files):
        return "Name one file as owner/name/file.gguf."
    revision = f"--revision {ref.revision} " if ref.revision else ""
    inside = [file.name for file in listing.files if file.name.endswith(f"/{CONFIG_FILE}")]
    if inside:
        place = inside[-1].removesuffix(f"/{CONFIG_FILE}")
        return (
            f"There is an adapter in {place}: fetch it with `hf download {ref.repo} {revision}"
            f"--include '{place}/*' --local-dir DIR` and give DIR/{place}."
        )
    if listing.file("config.json"):
        return (
            "It is a whole model for transformers; a base has to be a GGUF: search the Hub for one "
            "of the same name, or convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    return "Check the name."


@contextlib.contextmanager
def hub_errors(failure: str, kind: type[RegistryError] = DownloadError) -> Iterator[None]:
    """Turn whatever the Hub's library raises into an error of ours that says what to do.

    failure  what the Hub did not do, such as "the Hub did not give a.gguf"
    """
    try:
        yield
    except QafloraError:
        raise
    # The library passes on errors of its network library, whose classes changed with its versions.
    except Exception as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise OutputFileError(
                f"Cannot store a file of the Hub: the disk is full ({failure}). "
                "Free some space and try again."
            ) from error
        reason, advice = _reason(error)
        raise kind(f"{failure}: {reason}. {advice}.") from error


def _reason(error: Exception) -> tuple[str, str]:
    """Say what an error of the Hub's library means, and what to do."""
    import huggingface_hub
    from huggingface_hub import errors

    # What an upload in a thread failed of; why a file is not here, which need not be the network.
    is_outer = isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError))
    if is_outer and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return (
            "it is gated, and you have no access to it",
            f"Ask for access on its page, then {_TOKEN_ADVICE}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "it does not exist, or is private and your token does not open it",
            f"Check the name; for a private repository {_TOKEN_ADVICE}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision", "Give a branch, a tag or a commit after @"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and this has to ask the Hub",
            "Unset it, or use what was pulled before, without --to and --update",
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        if huggingface_hub.get_token() is None:
            return (
                "it asks for a token, and there is none",
                "Give one with `hf auth login` or in HF_TOKEN; writing needs one that may write",
            )
        return (
            f"it refused the token (HTTP {error.response.status_code})",
            "Check the token with `hf auth whoami`; writing needs a token that may write",
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 412:
        return "it was changed meanwhile", "Look at what is there now, and try again"
    lines = str(error).strip().splitlines() or [""]
    is_sent = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    if is_sent:  # what was sent is wrong: the Hub says where
        return " ".join(line.strip() for line in lines if line.strip()), "Correct it and try again"
    advice = "Check the network and try again"
    if isinstance(error, OSError) and error.filename is not None:
        advice = "Check that you may use this place, or move the Hub's cache with HF_HOME"
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}", advice


def hub_progress(report: TellBytes) -> type[Any]:
    """Make silent progress bars for the Hub's library that report the bytes so far.

    Of several files it makes a bar for what came and one for what was stored: the larger counts.
    """
    from tqdm import tqdm

    done_bytes: dict[int, int] = {}

    class SilentBar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self.is_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})
            self.count(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.count(n or 0)
            return None

        def count(self, n_bytes: float) -> None:
            if self.is_bytes:
                done_bytes[id(self)] = done_bytes.get(id(self), 0) + int(n_bytes)
                report(max(done_bytes.values()))

    return SilentBar
