"""qaflora models, pull, list and remove, off the network"""

import json
from pathlib import Path

import pytest
from bundles import bundle_json, make_bundle, qaflora, said_by, snapshot
from refusals import refused

from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.errors import BundleError
from qaflora_edge.formats import names as registry
from qaflora_edge.hub import fetch_hub

BASE = "smollm2-135m-instruct"
FILES = ("bundle.json", "adapters/math.gguf", "adapters/es.gguf")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, hub_cache) -> Path:
    """A working folder without anything, and caches of its own."""
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def put_base() -> Path:
    """A file of the size of a registry model, where a pull puts it (holes take no space)."""
    model = registry.find_model(BASE)
    path = registry.models_dir() / model.file
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(model.size_bytes)
    return path


def here() -> dict[str, dict[str, object]]:
    return {entry["name"]: entry for entry in json.loads(qaflora("list", "--json").stdout)}


def test_bundles_and_bases_are_listed(place, tmp_path, hub, monkeypatch) -> None:
    base = put_base()
    made = make_bundle(place)
    (tmp_path / "named").mkdir()
    named = make_bundle(tmp_path / "named")
    monkeypatch.setenv("QAFLORA_BUNDLES", str(named.folder.rename(tmp_path / "named" / "mine")))
    hub.put("owner/theirs", {name: (made.folder / name).read_bytes() for name in FILES})
    fetch_hub("owner/theirs")

    found = here()
    kinds = {name: entry["kind"] for name, entry in found.items()}
    assert kinds == {"bundle": "bundle", "mine": "bundle", "owner/theirs": "bundle", BASE: "base"}
    for name in ("bundle", "mine", "owner/theirs"):
        folder = Path(str(found[name]["path"]))
        assert found[name]["size_bytes"] == sum((folder / file).stat().st_size for file in FILES)
    assert [entry["is_pulled"] for entry in found.values()] == [False, False, True, True]
    for name, entry in found.items():
        assert Path(str(entry["path"])).exists()
        assert name not in ("bundle", "mine") or qaflora("bundle", "show", name).exit_code == 0
    assert f"base     {BASE}      98 MB  pulled  {base}\n" in qaflora("ls").stdout


def test_what_was_pulled_is_removed(place, hub) -> None:
    base, made = put_base(), make_bundle(place)
    hub.put("owner/theirs", {name: (made.folder / name).read_bytes() for name in FILES})
    fetch_hub("owner/theirs")
    before = snapshot(made.folder)
    asked = qaflora("remove", BASE)
    assert asked.exit_code == 2
    assert f"This removes the base {BASE} (98 MB, {base}); add --yes" in asked.stderr
    assert base.exists()
    for verb, name in (("remove", BASE), ("rm", "owner/theirs")):
        assert said_by(qaflora(verb, name, "--yes")).startswith("Removed the b")
    assert list(here()) == ["bundle"]
    assert snapshot(made.folder) == before


def test_every_commit_and_file_is_listed_and_removed(place, hub, hub_cache) -> None:
    made = make_bundle(place)
    files = {name: (made.folder / name).read_bytes() for name in FILES}
    old = hub.put("owner/theirs", {**files, "README.md": b"old"})
    hub.repos["owner/theirs"].branches["v1"] = old
    hub.put("owner/theirs", files)
    hub.put("owner/models", {"q4/a.gguf": b"GGUF a", "b.gguf": b"GGUF b", "c.gguf": b"GGUF"})
    names = ["owner/theirs@v1", "owner/theirs"]
    names += ["owner/models/q4/a.gguf", "owner/models/b.gguf"]
    paths = {name: fetch_hub(name) for name in names}

    def listed() -> dict[str, str]:
        return {name: str(entry["path"]) for name, entry in here().items() if name != "bundle"}

    assert listed() == {name: str(path) for name, path in paths.items()}
    assert {here()[name]["kind"] for name in names[:2]} == {"bundle"}
    for name in names[:2]:
        assert qaflora("remove", name, "--yes").exit_code == 0
        paths.pop(name)
        assert set(listed()) == set(paths)
        for path in paths.values():  # what it shared with others is still whole
            assert not path.is_dir() or all((path / file).read_bytes() for file in FILES)
    removed = qaflora("remove", "owner/models/b.gguf", "--yes")  # all files of a commit go
    assert ", and with it owner/models/q4/a.gguf" in removed.stderr
    assert list(hub_cache.glob("models--*")) == []


@pytest.mark.parametrize("name", ["nothing", "bundle"])
def test_what_was_not_pulled_is_refused(place, name) -> None:
    make_bundle(place)
    assert said_by(qaflora("remove", name, "--yes"), 1) == (
        f"Error: Cannot remove {name}: nothing was pulled under this name; expected one that "
        "`qaflora list` shows as pulled. Delete files and folders of your own yourself.\n"
    )


def test_models_tells_what_is_here() -> None:
    path = put_base()
    result = qaflora("models")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"here: {path}" in result.stdout
    assert "get it: qaflora pull gemma-3-270m" in result.stdout


def test_pull_from_the_hub(hub, hub_cache) -> None:
    commit = hub.put("owner/name", {"base.gguf": b"GGUF base"})
    path = hub_cache / "models--owner--name" / "snapshots" / commit / "base.gguf"
    for _ in range(2):
        result = qaflora("pull", "owner/name/base.gguf")
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}\n", "")
    commit = hub.put("owner/name", {"base.gguf": b"GGUF newer"})
    assert qaflora("pull", "owner/name/base.gguf").stdout == f"{path}\n"
    result = qaflora("pull", "owner/name/base.gguf", "--update")
    assert Path(result.stdout.strip()).read_bytes() == b"GGUF newer"


def test_pull_with_the_base(hub, hub_cache, tmp_path) -> None:
    made = make_bundle(tmp_path / "made")
    hub.put("owner/base", {"base.gguf": made.base.path.read_bytes()})
    raw = bundle_json(made.folder)
    del raw["base"]["file"]
    raw["base"]["hub"] = "owner/base/base.gguf"
    adapters = {path: (made.folder / path).read_bytes() for path in FILES[1:]}
    hub.put("owner/bundle", {"bundle.json": json.dumps(raw).encode(), **adapters})
    made.base.path.unlink()
    folder = Path(qaflora("pull", "owner/bundle").stdout.strip())
    told = refused(BundleError, load_bundle, folder)
    assert "is not here; fetch it with `qaflora pull owner/base/base.gguf`" in told
    result = qaflora("pull", "owner/bundle", "--with-base")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{folder}\n", "")
    loaded = load_bundle(folder)
    assert loaded.base_path.is_relative_to(hub_cache)
    hub.requests.clear()
    assert qaflora("pull", "owner/bundle", "--with-base").exit_code == 0
    assert hub.requests == []
    for ref in ("owner/bundle", "https://huggingface.co/owner/bundle"):
        assert qaflora("pull", ref).stdout == f"{folder}\n"
        verified = qaflora("bundle", "verify", ref)
        assert verified.stdout == f"{folder}: the base and 2 adapters are the recorded ones.\n"
