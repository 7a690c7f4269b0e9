"""Bundles, adapters and files from a Hub: a small server on this machine speaks its protocol."""

import json
import os
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path
from typing import Any

import hubs
import pytest
from bundles import TinyBundle, make_bundle
from hubs import TOKEN, FakeHub
from patience import PATIENCE_S

from qaflora_edge.bundles.open import load_bundle, verify_bundle
from qaflora_edge.errors import BundleError, DownloadError, OutputFileError, RegistryError
from qaflora_edge.formats.names import HubRef, from_address, parse_hub_ref
from qaflora_edge.hub.fetch import fetch_hub
from qaflora_edge.hub.local import pulled_path

PICTURE = "training/curve.png"
REPO_DIR = "models--owner--bundle"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made(tmp_path: Path) -> TinyBundle:
    (tmp_path / "made").mkdir()
    return make_bundle(tmp_path / "made")


@pytest.fixture
def files(made: TinyBundle) -> dict[str, bytes]:
    """What a repository of the bundle holds: the bundle, its card, and what is no part of it."""
    found = folder_files(made.folder)
    return found | {"README.md": b"# A bundle\n", PICTURE: b"not wanted", "old.gguf": b"GGUF old"}


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


# references


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubRef("owner/name", None, None)),
        ("owner/name@v1.0", HubRef("owner/name", None, "v1.0")),
        ("owner/name/a.gguf", HubRef("owner/name", "a.gguf", None)),
        ("owner/name/sub/a b.gguf@refs/pr/1", HubRef("owner/name", "sub/a b.gguf", "refs/pr/1")),
    ],
)
def test_reference_forms(text: str, expected: HubRef) -> None:
    assert parse_hub_ref(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("address", "ref"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("huggingface.co/owner/name/tree/main", "owner/name"),
        ("https://hf.co/owner/name/tree/v1.0", "owner/name@v1.0"),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F1", "owner/name@refs/pr/1"),
        ("https://huggingface.co/owner/name/blob/main/q/a%20b.gguf", "owner/name/q/a b.gguf"),
        (
            "https://huggingface.co/owner/name/resolve/v1/a.gguf?download=true#x",
            "owner/name/a.gguf@v1",
        ),
        ("https://huggingface.co/owner/name/blob/main/../../x.gguf", None),
        ("https://huggingface.co/owner/name/discussions/1", None),
    ],
)
def test_addresses_of_pages_are_references(address: str, ref: str | None) -> None:
    if ref is not None:
        assert from_address(address) == ref
        assert parse_hub_ref(ref)
        return
    with pytest.raises(RegistryError):
        parse_hub_ref(from_address(address))


@pytest.mark.parametrize(
    "text",
    [
        *("name", "owner/name/folder", "../name", "owner/..", "owner/name@", "a/b/c\\d.gguf", ""),
        *("a/b/../c.gguf", "a/b//c.gguf", "a/b@../../x", "a/b@/etc", "a/b@x/"),
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(RegistryError) as caught:
        parse_hub_ref(text)
    assert str(caught.value) == (
        f"Cannot use {text!r} as a Hugging Face Hub reference; expected owner/name, "
        "owner/name/file.gguf, or one of them with @revision. "
        "See 'qaflora models' for names that need no owner."
    )


# the cache that is shared with other tools


def test_a_bundle_is_used_where_the_hubs_cache_has_it(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes]
) -> None:
    commit = hub.put("owner/bundle", files)
    seen: list[tuple[int, int]] = []
    folder = fetch_hub("owner/bundle", progress=lambda *numbers: seen.append(numbers))
    assert folder == hub_cache / REPO_DIR / "snapshots" / commit
    wanted = {name: content for name, content in files.items() if name not in (PICTURE, "old.gguf")}
    assert folder_files(folder) == wanted
    assert set(load_bundle(folder).adapter_paths) == {"math", "es"}
    total = sum(len(content) for content in wanted.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_other_tools_find_what_was_pulled_and_we_what_they_pulled(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes]
) -> None:
    from huggingface_hub import hf_hub_download

    hub.put("owner/bundle", files)
    folder = fetch_hub("owner/bundle")
    found = hf_hub_download("owner/bundle", "adapters/es.gguf", local_files_only=True)
    assert Path(found) == folder / "adapters/es.gguf"

    hub.put("owner/theirs", files)
    for name in ("bundle.json", "adapters/math.gguf"):
        hf_hub_download("owner/theirs", name)
    assert pulled_path("owner/theirs") is None  # one adapter is not here yet
    hf_hub_download("owner/theirs", "adapters/es.gguf")
    hub.requests.clear()
    assert load_bundle(fetch_hub("owner/theirs")).adapter_paths
    assert hub.requests == []


def test_what_is_here_is_not_asked_for_again_but_updated_on_request(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes]
) -> None:
    first = fetch_hub_at(hub, files, "first")
    second_commit = hub.put("owner/bundle", {**files, "README.md": b"# Newer\n"})
    hub.requests.clear()
    assert fetch_hub("owner/bundle") == first
    assert hub.requests == []
    second = fetch_hub("owner/bundle", update=True)
    assert second.name == second_commit
    assert (second / "README.md").read_bytes() == b"# Newer\n"
    assert downloads(hub) == ["README.md"]  # the other blobs are there
    assert fetch_hub("owner/bundle") == second


def test_one_file_that_is_here_is_not_taken_for_the_whole(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("owner/bundle", files)
    adapter = fetch_hub("owner/bundle/adapters/es.gguf")
    assert fetch_hub("owner/bundle") == adapter.parents[1]
    assert pulled_path("owner/bundle") == adapter.parents[1]
    hub.put("owner/models", {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    fetch_hub("owner/models/a.gguf")
    assert "its .gguf files are: a.gguf, b.gguf. Name one" in refusal("owner/models")
    hub.put("owner/model", {"a.gguf": b"GGUF a"})
    only = fetch_hub("owner/model")
    hub.put("owner/model", {"a.gguf": b"GGUF newer"})
    assert fetch_hub("owner/model") == only
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_hub("owner/model") == only


def fetch_hub_at(hub: FakeHub, files: dict[str, bytes], message: str) -> Path:
    hub.put("owner/bundle", files, message=message)
    return fetch_hub("owner/bundle")


def test_a_revision_is_pinned(hub: FakeHub, hub_cache: Path, files: dict[str, bytes]) -> None:
    old = hub.put("owner/bundle", {**files, "README.md": b"old"})
    hub.repos["owner/bundle"].branches["v1"] = old
    new = hub.put("owner/bundle", files)
    assert fetch_hub("owner/bundle@v1").name == old
    assert fetch_hub(f"owner/bundle@{old}").name == old
    assert fetch_hub("owner/bundle").name == new
    assert pulled_path("owner/bundle@v1") == fetch_hub(f"owner/bundle@{old}")


def test_a_branch_that_moves_meanwhile_is_told(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qaflora_edge.hub import fetch as module

    old = hub.put("owner/bundle", files)
    original = module.list_files

    def move(ref: HubRef) -> Any:
        listing = original(ref)
        hub.put("owner/bundle", {**files, "README.md": b"new"})
        return listing

    monkeypatch.setattr(module, "list_files", move)
    with pytest.raises(DownloadError) as caught:
        fetch_hub("owner/bundle")
    assert str(caught.value) == (
        "Could not pull owner/bundle: main of owner/bundle moved while it was fetched, expected "
        f"it at {old}. Pull again."
    )


def test_links_of_a_snapshot_stay_in_the_hubs_cache(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("owner/bundle", files)
    folder = fetch_hub("owner/bundle")
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(files["adapters/es.gguf"])
    (folder / "adapters/es.gguf").unlink()
    (folder / "adapters/es.gguf").symlink_to(secret)
    with pytest.raises(BundleError, match="a link in it leads out of the bundle"):
        load_bundle(folder)


def test_a_folder_that_only_looks_like_the_hubs_cache_has_no_such_right(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("owner/bundle", files)
    folder = fetch_hub("owner/bundle")
    load_bundle(folder)
    (tmp_path / "unpacked").mkdir()
    (hub_cache / REPO_DIR).rename(tmp_path / "unpacked" / REPO_DIR)
    moved = tmp_path / "unpacked" / REPO_DIR / "snapshots" / folder.name
    assert (moved / "adapters/es.gguf").is_file()
    with pytest.raises(BundleError, match="a link in it leads out of the bundle"):
        load_bundle(moved)


# a folder of the user's


def test_a_bundle_is_fetched_into_a_folder(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("owner/bundle", files)
    to = tmp_path / "here" / "mine"
    assert fetch_hub("owner/bundle", to) == to
    names = {name for name in folder_files(to) if not name.startswith(".cache/")}
    assert names == set(files) - {PICTURE, "old.gguf"}
    assert not any(path.is_symlink() for path in to.rglob("*"))
    verify_bundle(to)
    assert [path.name for path in to.parent.iterdir()] == ["mine"]


def test_a_single_gguf_joins_a_folder(hub: FakeHub, hub_cache: Path, tmp_path: Path) -> None:
    hub.put("owner/models", {"a.gguf": b"GGUF a", "q8/b.gguf": b"GGUF b"})
    to = tmp_path / "here"
    to.mkdir()
    (to / "other").touch()
    assert fetch_hub("owner/models/q8/b.gguf", to) == to / "q8/b.gguf"
    assert fetch_hub("owner/models/a.gguf", to) == to / "a.gguf"
    hub.requests.clear()
    assert fetch_hub("owner/models/a.gguf", to) == to / "a.gguf"
    assert downloads(hub) == []
    (to / "a.gguf").write_bytes(b"mine")
    with pytest.raises(OutputFileError) as caught:
        fetch_hub("owner/models/a.gguf", to)
    assert str(caught.value) == (
        f"Cannot pull owner/models/a.gguf to {to}: there is another a.gguf, which has 4 bytes, "
        "the Hub lists 6. Name another folder with --to, or remove it."
    )
    assert (to / "a.gguf").read_bytes() == b"mine"


def test_a_folder_that_is_in_use_is_refused(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("owner/bundle", files)
    to = tmp_path / "taken"
    to.mkdir()
    (to / "mine").touch()
    with pytest.raises(OutputFileError) as caught:
        fetch_hub("owner/bundle", to)
    assert str(caught.value) == (
        f"Cannot pull owner/bundle to {to}: it exists already and is not an empty folder. "
        "Name another folder with --to, or remove that one."
    )
    assert os.listdir(to) == ["mine"]


def test_what_is_there_already_is_compared(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("owner/bundle", files)
    folder = fetch_hub("owner/bundle", tmp_path / "to")
    hub.requests.clear()
    assert fetch_hub("owner/bundle", folder) == folder
    assert downloads(hub) == []
    (folder / "adapters/es.gguf").write_bytes(b"mine")
    with pytest.raises(OutputFileError, match=r"there is another adapters/es\.gguf, which has 4 "):
        fetch_hub("owner/bundle", folder)
    assert (folder / "adapters/es.gguf").read_bytes() == b"mine"


# adapters


def test_a_peft_adapter_is_a_folder(hub: FakeHub, hub_cache: Path, made: TinyBundle) -> None:
    files = folder_files(made.peft) | {"README.md": b"# An adapter\n"}
    hub.put("owner/math", files | {"optimizer.pt": b"x", "checkpoint-1/adapter_config.json": b""})
    folder = fetch_hub("owner/math")
    assert folder_files(folder) == files
    assert pulled_path("owner/math") == folder
    (folder / "adapter_model.safetensors").unlink()
    assert pulled_path("owner/math") is None


def test_a_pickled_adapter_is_refused(hub: FakeHub, hub_cache: Path) -> None:
    hub.put("owner/math", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(DownloadError) as caught:
        fetch_hub("owner/math")
    assert str(caught.value) == (
        "Could not pull owner/math: expected adapter_model.safetensors beside adapter_config.json "
        "in owner/math; there is none but adapter_model.bin, a pickle. "
        "Ask its owner to save the adapter as safetensors."
    )
    assert downloads(hub) == []


def test_several_gguf_files_need_a_name(hub: FakeHub, hub_cache: Path) -> None:
    hub.put("owner/models", {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    with pytest.raises(DownloadError) as caught:
        fetch_hub("owner/models")
    assert str(caught.value) == (
        "Could not pull owner/models: expected bundle.json, adapter_config.json or exactly one "
        ".gguf file in owner/models; it has 2 files, and its .gguf files are: a.gguf, b.gguf. "
        "Name one as owner/name/file.gguf. An adapter in a sub-folder is fetched with "
        "`hf download owner/models --local-dir DIR`; a whole model has to become a GGUF first, "
        "with llama.cpp's convert_hf_to_gguf.py."
    )


# interrupted and wrong


@pytest.mark.parametrize("to", [None, "mine"])
def test_another_attempt_goes_on_with_the_whole_files(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path, to: str | None
) -> None:
    target = to and tmp_path / to
    hub.put("owner/bundle", files)
    hub.served["adapters/es.gguf"] = files["adapters/es.gguf"][:-1] + b"?"
    with pytest.raises(DownloadError) as caught:
        fetch_hub("owner/bundle", target)
    found, listed = (
        sha256(content["adapters/es.gguf"]).hexdigest() for content in (hub.served, files)
    )
    assert str(caught.value) == (
        f"Could not pull owner/bundle: adapters/es.gguf, as it came, has sha256 {found}, "
        f"the Hub lists {listed}. It was thrown away; try again."
    )
    assert pulled_path("owner/bundle") is None
    assert target is None or not (target / "bundle.json").exists()
    hub.served.clear()
    hub.requests.clear()
    folder = fetch_hub("owner/bundle", target)
    assert "adapters/es.gguf" in downloads(hub)
    assert "adapters/math.gguf" not in downloads(hub)
    verify_bundle(folder)


def test_a_wrong_small_file_is_refused(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes]
) -> None:
    hub.put("owner/bundle", files)
    hub.served["bundle.json"] = files["bundle.json"].replace(b'"alpha": 8', b'"alpha": 9')
    with pytest.raises(DownloadError, match=r"bundle\.json, as it came, has git sha1"):
        fetch_hub("owner/bundle")


def test_a_missing_adapter_is_named(hub: FakeHub, hub_cache: Path, files: dict[str, bytes]) -> None:
    del files["adapters/es.gguf"]
    hub.put("owner/bundle", files)
    with pytest.raises(DownloadError, match=r"names adapters/es\.gguf, which owner/bundle does"):
        fetch_hub("owner/bundle")


def test_a_file_name_that_leads_out_is_refused(
    hub: FakeHub, hub_cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    raw = json.loads(files["bundle.json"])
    raw["adapters"][1]["file"] = "../../es.gguf"
    content = {"bundle.json": json.dumps(raw).encode(), "../../es.gguf": files["adapters/es.gguf"]}
    hub.put("owner/bundle", {**files, **content})
    with pytest.raises(BundleError, match="expected a relative path to a file inside"):
        fetch_hub("owner/bundle")
    hub.put("owner/base", {"../base.gguf": b"GGUF"})
    with pytest.raises(BundleError, match=r"Refused the path '\.\./base\.gguf'"):
        fetch_hub("owner/base", tmp_path / "to")


def test_a_broken_bundle_json_is_named(hub: FakeHub, hub_cache: Path) -> None:
    hub.put("owner/bundle", {"bundle.json": b'{"format": "other"}'})
    with pytest.raises(BundleError, match=r"Cannot use bundle\.json of owner/bundle: field format"):
        fetch_hub("owner/bundle")


# refusals


def refusal(ref: str) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch_hub(ref)
    return str(caught.value)


def test_refusals_say_what_to_do(
    hub: FakeHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "give a token that may read it, with `hf auth login` or in HF_TOKEN."
    absent = (
        "the Hub did not give the list of files of {}: it does not exist, or is private and your "
        f"token does not open it. Check the name; for a private repository {token}"
    )
    hub.put("owner/a", {"a.gguf": b"GGUF"})
    assert refusal("owner/none") == "Could not pull owner/none: " + absent.format("owner/none")
    assert refusal("owner/a@v9") == (
        "Could not pull owner/a@v9: the Hub did not give the list of files of owner/a: it has no "
        "such revision. Give a branch, a tag or a commit after @."
    )
    hub.repos["owner/a"].access = "gated"
    assert refusal("owner/a") == (
        "Could not pull owner/a: the Hub did not give the list of files of owner/a: it is gated, "
        f"and you have no access to it. Ask for access on its page, then {token}"
    )
    hub.repos["owner/a"].access = "private"
    assert refusal("owner/a") == "Could not pull owner/a: " + absent.format("owner/a")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch_hub("owner/a").read_bytes() == b"GGUF"


def test_what_the_hub_answered_is_told_and_not_the_network_blamed(
    hub: FakeHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("owner/a", {"a.gguf": b"GGUF"})

    def answer(path: str, status: int, content: Any) -> None:
        route = ("GET HEAD", path, lambda self, *_: self.answer(status, content))
        monkeypatch.setattr(hubs, "_ROUTES", (route, *hubs._ROUTES))

    answer("/owner/a/resolve/.*", 403, {"error": "Forbidden"})
    assert "files of owner/a: it asks for a token, and there is none" in refusal("owner/a")
    answer("/api/models/owner/a", 200, b"<html>Log in to the network</html>")
    assert refusal("owner/a").endswith("(char 0). Check the network and try again.")


def test_a_cache_that_cannot_be_used_is_no_matter_of_the_network(
    hub: FakeHub, hub_cache: Path
) -> None:
    hub.put("owner/a", {"a.gguf": b"GGUF"})
    hub_cache.parent.write_text("a file where a folder should be")
    assert refusal("owner/a").endswith(
        "Check that you may use this place, or move the Hub's cache with HF_HOME."
    )


def process(script: str, *args: object, hub_url: str, home: Path, **env: str) -> str:
    """Run a script in a process that finds the Hub by the environment; give its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=clean,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (result.returncode, result.stderr) == (0, "")  # no progress bar of the library either
    return result.stdout


PULL = """
    import sys
    from qaflora_edge.errors import QafloraError
    from qaflora_edge.hub.fetch import fetch_hub
    for ref in sys.argv[1:]:
        try:
            print(fetch_hub(ref))
        except QafloraError as error:
            print(error)
"""


@pytest.mark.slow
def test_offline_mode_takes_what_is_here(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes]
) -> None:
    commit = hub.put("owner/bundle", files)
    hub.put("owner/other", files)
    home = tmp_path / "home"
    folder = process(PULL, "owner/bundle", hub_url=hub.url, home=home)
    assert folder == f"{home / 'hub' / REPO_DIR / 'snapshots' / commit}\n"
    hub.requests.clear()
    offline = {"hub_url": hub.url, "home": home, "HF_HUB_OFFLINE": "1"}
    output = process(PULL, "owner/bundle", "owner/other", **offline)
    assert output == folder + (
        "Could not pull owner/other: the Hub did not give the list of files of owner/other: "
        "HF_HUB_OFFLINE is set, and this has to ask the Hub. "
        "Unset it, or use what was pulled before, without --to and --update.\n"
    )
    assert hub.requests == []


@pytest.mark.slow
def test_no_network_is_told_soon(tmp_path: Path) -> None:
    output = process(PULL, "owner/bundle", hub_url="http://127.0.0.1:9", home=tmp_path)
    assert output.startswith("Could not pull owner/bundle: the Hub did not give the list of files")
    assert output.endswith("Check the network and try again.\n")


def test_a_model_of_the_registry_comes_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    content = b"GGUF" + bytes(20_000)
    commit = hub.put("owner/models", {"a.gguf": content})
    entry: dict[str, Any] = {
        "description": "",
        "file": "mine.gguf",
        "sha256": sha256(content).hexdigest(),
    }
    entry |= {"size_bytes": len(content), "architecture": "llama", "kind": "base", "license": "MIT"}
    source = {"type": "hub", "repo": "owner/models", "revision": commit, "file": "a.gguf"}
    path = tmp_path / "registry.json"
    models = {"fake": {**entry, "sources": [source]}}
    path.write_text(json.dumps({"format": "qaflora-registry/1", "models": models}))
    script = """
        import pathlib, sys
        from qaflora_edge.formats import names as registry
        from qaflora_edge.hub.fetch import fetch_model
        registry.package_data = lambda name: pathlib.Path(sys.argv[1])
        seen = []
        print(fetch_model("fake", progress=lambda *numbers: seen.append(numbers)))
        print(seen[-1])
    """
    output = process(script, path, hub_url=hub.url, home=tmp_path / "hf")
    target = tmp_path / "cache" / "models" / "mine.gguf"
    assert output == f"{target}\n({len(content)}, {len(content)})\n"
    assert target.read_bytes() == content
