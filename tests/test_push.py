"""Bundles and adapters pushed to a stand-in of the Hub, and pulled back."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundles import TinyBundle, bundle_json, make_bundle, qaflora
from hubs import TOKEN, FakeHub
from refusals import refused

from qaflora_edge.bundles.edit import set_base
from qaflora_edge.bundles.open import load_bundle, verify_bundle
from qaflora_edge.bundles.push import push
from qaflora_edge.errors import (
    BundleError,
    ChecksumError,
    GgufFileError,
    InputFileError,
    RegistryError,
    UploadError,
)
from qaflora_edge.hub.fetch import ADVICE, fetch_hub

# The Hub's library itself uploads with what its network library calls outdated.
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

ADAPTERS = {"adapters/math.gguf", "adapters/es.gguf"}


@pytest.fixture
def signed_in(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub is used with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub_cache


@pytest.fixture
def made(tmp_path: Path, hub: FakeHub) -> TinyBundle:
    """A bundle whose base is on the Hub as owner/base/base.gguf, and here."""
    (tmp_path / "made").mkdir()
    made = make_bundle(tmp_path / "made")
    hub.put("owner/base", {"base.gguf": made.base.path.read_bytes()})
    rewrite(made.folder, hub="owner/base/base.gguf", license="MIT")
    return made


def rewrite(folder: Path, *, license: str = "", **base: Any) -> None:
    raw = bundle_json(folder)
    raw["base"].update(base)
    raw["license"] = license
    (folder / "bundle.json").write_text(json.dumps(raw))


def head_of(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_a_bundle_comes_back_as_it_went(
    hub: FakeHub, signed_in: Path, made: TinyBundle, tmp_path: Path
) -> None:
    (made.folder / ".env").write_text("SECRET=1")
    (made.folder / "train.log").write_text("losses")
    (made.folder / "LICENSE").write_text("MIT")
    pushed = push(made.folder, "me/mine", message="The first")
    files = hub.files("me/mine")
    assert set(files) == {".gitattributes", "README.md", "LICENSE", "bundle.json", *ADAPTERS}
    assert pushed.files == tuple(sorted(set(files) - {".gitattributes"}))
    assert hub.repos["me/mine"].messages == ["initial commit", "The first"]
    assert pushed.pinned == f"me/mine@{hub.repos['me/mine'].branches['main']}"
    assert str(tmp_path).encode() not in files["bundle.json"]  # where the base lies here

    folder = fetch_hub(pushed.pinned)
    fetch_hub("owner/base/base.gguf")
    assert set(verify_bundle(folder).adapter_paths) == {"math", "es"}
    pulled, own = (load_bundle(place).text.raw for place in (folder, made.folder))
    assert {**own, "base": {**own["base"], "file": None}} == {
        **pulled,
        "base": {**pulled["base"], "file": None},
    }


def test_the_card_says_what_it_is(hub: FakeHub, signed_in: Path, made: TinyBundle) -> None:
    raw = bundle_json(made.folder)
    raw["description"] = raw["adapters"][0]["description"] = "<b>not</b> [shown](x)"
    (made.folder / "bundle.json").write_text(json.dumps(raw))
    push(made.folder, "me/mine")
    card = hub.files("me/mine")["README.md"]
    assert head_of(card) == {
        "library_name": "qaflora-edge",
        "license": "mit",
        "base_model": "owner/base",
        "tags": ["qaflora", "lora"],
    }
    text = card.decode()
    assert "qaflora pull me/mine --with-base\n" in text
    assert "LoRA that qaflora-edge mixes for each question.\n" in text
    assert "shown" not in text


def test_an_adapter_of_each_kind(hub: FakeHub, signed_in: Path, made: TinyBundle) -> None:
    (made.peft / "optimizer.pt").write_text("x")
    push(made.peft, "me/maths")
    parts = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files("me/maths")) == {".gitattributes", "README.md", *parts}
    push(made.adapter.path, "me/spanish")
    assert hub.files("me/spanish")["es.gguf"] == made.adapter.path.read_bytes()
    for repo in ("me/maths", "me/spanish"):
        card = hub.files(repo)["README.md"]
        assert head_of(card)["library_name"] == ("peft" if "math" in repo else "qaflora-edge")
        assert f"={repo}\n" in card.decode()
        assert fetch_hub(repo)


def test_a_base_that_nobody_could_find_is_refused(
    hub: FakeHub, signed_in: Path, made: TinyBundle
) -> None:
    rewrite(made.folder, hub=None)
    assert refused(BundleError, push, made.folder, "me/mine") == (
        f"Cannot push the bundle {made.folder}: nobody else could find its base, which "
        "bundle.json names as a file of this machine; expected base.registry or base.hub. "
        f"Say where it is with `qaflora bundle base {made.folder} owner/name/file.gguf`."
    )
    set_base(made.folder, "owner/base/base.gguf")
    push(made.folder, "me/mine")
    commit = hub.repos["owner/base"].branches["main"]
    base = json.loads(hub.files("me/mine")["bundle.json"])["base"]
    assert base["hub"] == f"owner/base/base.gguf@{commit}"
    assert "file" not in base


def test_what_is_not_right_is_not_sent(
    hub: FakeHub, signed_in: Path, made: TinyBundle, tmp_path: Path
) -> None:
    hub.requests.clear()
    path = made.folder / "adapters/es.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for kind, what, repo in (
        (ChecksumError, made.folder, "me/mine"),
        (GgufFileError, made.base.path, "me/mine"),
        (InputFileError, tmp_path / "none", "me/mine"),
        (RegistryError, made.adapter.path, "mine"),
    ):
        with pytest.raises(kind):
            push(what, repo)
    assert hub.requests == []


def refusal(made: TinyBundle, **options: Any) -> str:
    message = refused(UploadError, push, made.adapter.path, "me/mine", **options)
    start = f"Could not push {made.adapter.path} to me/mine: "
    assert message.startswith(start)
    return message.removeprefix(start)


def test_a_refused_upload_says_why(
    hub: FakeHub, hub_cache: Path, made: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(made)  # there is no token
    assert message.startswith("the Hub did not make me/mine: ")
    assert message.endswith(ADVICE)
    assert "me/mine" not in hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refused = made.adapter.path.read_bytes()
    message = refusal(made)
    assert message.startswith("the Hub did not take the files for me/mine: ")
    assert message.endswith(ADVICE)


def test_a_branch_gets_it_and_a_card_is_not_replaced(
    hub: FakeHub, signed_in: Path, made: TinyBundle
) -> None:
    push(made.folder, "me/mine", revision="try/1")
    assert "bundle.json" not in hub.files("me/mine")
    files = hub.files("me/mine", "try/1")
    assert "bundle.json" in files
    hub.put("me/mine", {**files, "README.md": b"Written by hand"})
    push(made.folder, "me/mine")
    assert hub.files("me/mine")["README.md"] == b"Written by hand"


def test_private_means_private(hub: FakeHub, signed_in: Path, made: TinyBundle) -> None:
    push(made.adapter.path, "me/secret", private=True)
    assert hub.repos["me/secret"].access == "private"
    hub.put("me/mine", {"x.txt": b""})
    assert refusal(made, private=True) == (
        "it exists and is public, expected a private one. Make it private on its page, leave "
        "--private out, or name another."
    )
    assert set(hub.files("me/mine")) == {"x.txt"}


def test_the_command(hub: FakeHub, signed_in: Path, made: TinyBundle) -> None:
    result = qaflora("push", made.folder, "me/mine", "--private", "--message", "Mine")
    assert result.exit_code == 0, result.stderr
    commit = hub.repos["me/mine"].branches["main"]
    assert result.stdout == f"me/mine@{commit}\n"
    assert result.stderr == (
        "Pushed README.md, adapters/es.gguf, adapters/math.gguf, bundle.json: "
        f"{hub.url}/me/mine/commit/{commit}\n"
    )
    assert hub.repos["me/mine"].messages[-1] == "Mine"
