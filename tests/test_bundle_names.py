"""Bundles by name, found in the places of the setting `bundles`."""

import os
from pathlib import Path

import pytest
from bundles import make_bundle
from hubs import FakeHub

from qaflora_edge.hub.fetch import fetch_hub
from qaflora_edge.hub.local import adapter_names, named_bundles, pulled_bundles


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text("{}", encoding="utf-8")
    return folder


def test_places_are_bundles_or_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make(tmp_path / "shelf/one"), make(tmp_path / "shelf/two")
    (tmp_path / "shelf/empty").mkdir()
    alone, other_one = make(tmp_path / "alone"), make(tmp_path / "later/one")
    places = [tmp_path / "shelf", alone, other_one.parent, tmp_path / "missing"]
    monkeypatch.setenv("QAFLORA_BUNDLES", os.pathsep.join(map(str, places)))
    assert named_bundles() == {"one": one, "two": two, "alone": alone}


def test_adapters_are_those_of_bundle_json(tmp_path: Path) -> None:
    assert adapter_names(make_bundle(tmp_path).folder) == ["math", "es"]
    assert adapter_names(make(tmp_path / "broken")) == []


def test_pulled_bundles_have_their_repositorys_name(
    tmp_path: Path, hub: FakeHub, hub_cache: Path
) -> None:
    made = make_bundle(tmp_path)
    files = ("bundle.json", "adapters/math.gguf", "adapters/es.gguf")
    hub.put("owner/mine", {name: (made.folder / name).read_bytes() for name in files})
    folder = fetch_hub("owner/mine")
    hub.put("owner/other", {"a.gguf": b"GGUF"})
    fetch_hub("owner/other")
    assert pulled_bundles() == {"owner/mine": folder}
