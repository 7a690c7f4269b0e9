"""Bundles, adapters and files from a Hub: a small server on this machine speaks its protocol."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from hubs import TOKEN, FakeHub
from refusals import refused

from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.errors import BundleError, DownloadError, RegistryError
from qaflora_edge.formats.inputs import checksum
from qaflora_edge.formats.names import HubRef, from_address, parse_hub_ref
from qaflora_edge.hub import ADVICE, fetch_hub, named_bundles, pulled, pulled_path

PICTURE = "training/curve.png"
REPO_DIR = "models--owner--bundle"


pytestmark = pytest.mark.usefixtures("own_cache", "hub_cache")


@pytest.fixture
def files(made, hub) -> dict[str, bytes]:
    """What owner/bundle holds: the bundle, its card, and what is no part of it."""
    found = folder_files(made.folder)
    found |= {"README.md": b"# A bundle\n", PICTURE: b"not wanted", "old.gguf": b"GGUF old"}
    hub.put("owner/bundle", found)
    return found


def folder_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def downloads(hub: FakeHub) -> list[str]:
    """The files whose content was asked for."""
    return [
        request.partition("/resolve/")[2].partition("/")[2]
        for request in hub.requests
        if request.startswith("GET") and "/resolve/" in request
    ]


def test_reference_forms() -> None:
    for text, expected in (
        ("owner/name", HubRef("owner/name", None, None)),
        ("owner/name@v1.0", HubRef("owner/name", None, "v1.0")),
        ("owner/name/sub/a b.gguf@refs/pr/1", HubRef("owner/name", "sub/a b.gguf", "refs/pr/1")),
    ):
        assert parse_hub_ref(text) == expected
        assert str(expected) == text
    for address in ("https://huggingface.co/owner/name", "hf.co/owner/name/"):
        assert from_address(address) == "owner/name"


@pytest.mark.parametrize(
    "text",
    [
        *("name", "owner/name/folder", "../name", "owner/..", "owner/name@", "a/b/c\\d.gguf", ""),
        *("a/b/../c.gguf", "a/b//c.gguf", "a/b@../../x", "a/b@/etc", "a/b@x/"),
        from_address("https://huggingface.co/owner/name/blob/main/../../x.gguf"),
    ],
)
def test_other_forms_are_refused(text) -> None:
    assert refused(RegistryError, parse_hub_ref, text) == (
        f"Cannot use {text!r} as a Hugging Face Hub reference; expected owner/name, "
        "owner/name/file.gguf, or one of them with @revision. "
        "See 'qaflora models' for names that need no owner."
    )


def test_a_pulled_bundle_is_used_in_the_cache_that_other_tools_share(
    hub, hub_cache, files, made
) -> None:
    from huggingface_hub import hf_hub_download

    folder = fetch_hub("owner/bundle")
    commit = hub.repos["owner/bundle"].branches["main"]
    assert folder == hub_cache / REPO_DIR / "snapshots" / commit
    wanted = {name: content for name, content in files.items() if name not in (PICTURE, "old.gguf")}
    assert folder_files(folder) == wanted
    checksum(made.base.path)  # it was made under another cache
    assert set(load_bundle(folder).adapter_paths) == {"math", "es"}

    hub.put("owner/theirs", files)
    for name in ("bundle.json", "adapters/math.gguf"):
        hf_hub_download("owner/theirs", name)
    assert pulled_path("owner/theirs") is None  # one adapter is not here yet
    assert ("owner/bundle", folder) in [each[:2] for each in pulled()]
    hf_hub_download("owner/theirs", "adapters/es.gguf")
    hub.requests.clear()
    assert load_bundle(fetch_hub("owner/theirs")).adapter_paths
    assert hub.requests == []


def test_what_is_here_is_updated_on_request_only(hub, files) -> None:
    first = fetch_hub("owner/bundle")
    hub.repos["owner/bundle"].branches["v1"] = first.name
    second_commit = hub.put("owner/bundle", {**files, "README.md": b"# Newer\n"})
    hub.requests.clear()
    assert fetch_hub("owner/bundle") == first
    assert hub.requests == []
    second = fetch_hub("owner/bundle", update=True)
    assert second.name == second_commit
    assert downloads(hub) == ["README.md"]  # the other blobs are there
    assert fetch_hub("owner/bundle") == second
    for revision in ("v1", first.name):
        assert fetch_hub(f"owner/bundle@{revision}") == first
    assert pulled_path("owner/bundle@v1") == first


def test_one_file_that_is_here_is_not_taken_for_the_whole(files) -> None:
    adapter = fetch_hub("owner/bundle/adapters/es.gguf")
    assert fetch_hub("owner/bundle") == adapter.parents[1]


def test_links_of_a_snapshot_stay_in_the_hubs_cache(hub, hub_cache, files, tmp_path) -> None:
    folder = fetch_hub("owner/bundle")
    (tmp_path / "unpacked").mkdir()
    shutil.copytree(hub_cache / REPO_DIR, tmp_path / "unpacked" / REPO_DIR, symlinks=True)
    moved = tmp_path / "unpacked" / REPO_DIR / "snapshots" / folder.name
    assert (moved / "adapters/es.gguf").is_file()
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(files["adapters/es.gguf"])
    (folder / "adapters/es.gguf").unlink()
    (folder / "adapters/es.gguf").symlink_to(secret)
    for place in (folder, moved):
        with pytest.raises(BundleError, match="a link in it leads out of the bundle"):
            load_bundle(place)


def test_a_peft_adapter_is_a_folder(hub, made) -> None:
    files = folder_files(made.peft) | {"README.md": b"# An adapter\n"}
    hub.put("owner/math", files | {"optimizer.pt": b"x", "checkpoint-1/adapter_config.json": b""})
    folder = fetch_hub("owner/math")
    assert folder_files(folder) == files
    assert pulled_path("owner/math") == folder
    (folder / "adapter_model.safetensors").unlink()
    assert pulled_path("owner/math") is None


def test_a_pickled_adapter_is_refused(hub) -> None:
    hub.put("owner/math", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    assert refused(DownloadError, fetch_hub, "owner/math") == (
        "Could not pull owner/math: expected adapter_model.safetensors next to adapter_config.json "
        "in owner/math; there is none but adapter_model.bin, a pickle. "
        "Ask its owner to save the adapter as safetensors."
    )
    assert downloads(hub) == []


def test_a_file_name_that_leads_out_is_refused(hub, files, tmp_path) -> None:
    raw = json.loads(files["bundle.json"])
    raw["adapters"][1]["file"] = "../../es.gguf"
    content = {"bundle.json": json.dumps(raw).encode(), "../../es.gguf": files["adapters/es.gguf"]}
    hub.put("owner/bundle", {**files, **content})
    with pytest.raises(BundleError, match="expected a relative path to a file inside"):
        fetch_hub("owner/bundle")
    hub.put("owner/base", {"../base.gguf": b"GGUF"})
    with pytest.raises(BundleError, match=r"Refused the path '\.\./base\.gguf'"):
        fetch_hub("owner/base", tmp_path / "to")


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_a_hash_that_leads_out_is_refused(hub, tmp_path, header) -> None:
    """The Hub's library makes a file's name of it."""
    hub.put("owner/a", {"a.gguf": b"GGUF"})
    hub.lies = {header: f'"{tmp_path / "evil"}"'}
    assert f"the Hub answers with the {header} " in refusal("owner/a")
    assert not list(tmp_path.glob("evil*"))


def test_file_names_that_are_no_texts_are_refused(hub, monkeypatch) -> None:
    siblings = [SimpleNamespace(rfilename=7)]
    told = Mock(siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: told)
    assert "its .gguf files are: none" in refusal("owner/a")


def refusal(ref: str) -> str:
    return refused(DownloadError, fetch_hub, ref)


def test_several_gguf_files_need_a_name(hub) -> None:
    hub.put("owner/models", {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    assert refusal("owner/models") == (
        "Could not pull owner/models: expected bundle.json, adapter_config.json or exactly one "
        ".gguf file in owner/models; it has 2 files, and its .gguf files are: a.gguf, b.gguf. "
        "Name one as owner/name/file.gguf. An adapter in a sub-folder is fetched with "
        "`hf download owner/models --local-dir DIR`; a whole model has to become a GGUF first, "
        "with llama.cpp's convert_hf_to_gguf.py."
    )


def test_a_missing_adapter_is_told(hub, files) -> None:
    del files["adapters/es.gguf"]
    hub.put("owner/bundle", files)
    assert refusal("owner/bundle") == (
        "Could not pull owner/bundle: owner/bundle lacks files that its bundle.json names; "
        "expected all of them. Ask its owner to push it again."
    )


def test_what_the_hub_refuses_is_told_with_its_reason(hub, monkeypatch) -> None:
    hub.put("owner/a", {"a.gguf": b"GGUF"})
    start = "the Hub did not give the list of files of"
    message = refusal("owner/none")
    assert message.startswith(f"Could not pull owner/none: {start} owner/none: Repo")
    assert message.endswith(ADVICE)
    assert f"{start} owner/a: RevisionNotFoundError: " in refusal("owner/a@v9")
    hub.repos["owner/a"].access = "gated"
    assert f"{start} owner/a: GatedRepoError: " in refusal("owner/a")
    hub.repos["owner/a"].access = "private"
    assert f"{start} owner/a: RepositoryNotFoundError: " in refusal("owner/a")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch_hub("owner/a").read_bytes() == b"GGUF"


def test_places_are_bundles_or_hold_them(tmp_path, monkeypatch) -> None:
    """Bundles by name, found in the places of the setting `bundles`."""
    folders = one, two, alone, other_one = [
        tmp_path / name for name in ("shelf/one", "shelf/two", "alone", "later/one")
    ]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "bundle.json").write_text("{}", encoding="utf-8")
    (tmp_path / "shelf/empty").mkdir()
    places = [one.parent, alone, other_one.parent, tmp_path / "missing"]
    monkeypatch.setenv("QAFLORA_BUNDLES", os.pathsep.join(map(str, places)))
    assert named_bundles() == {"one": one, "two": two, "alone": alone}
