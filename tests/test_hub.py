"""Bundles and files from a Hub: a small server on this machine speaks the Hub's protocol."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qaflora_edge.errors import RegistryError
from qaflora_edge.hub import HubRef, parse_hub_ref, pulled_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUNDLE = {
    "bundle.json": b'{"format": "qaflora-bundle/1"}',
    "adapters/math.gguf": b"GGUF" + bytes(5000),
    "README.md": b"# A bundle",
    "training/curve.png": b"not wanted",
}


class FakeHub(ThreadingHTTPServer):
    """Repositories by name; `served` may differ from what is listed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.listed: dict[str, dict[str, bytes]] = {"owner/bundle": dict(BUNDLE)}
        self.served: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class FakeHubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            self.send_listing("/".join(path.split("/")[3:5]))
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self.send_file(repo, rest.partition("/")[2])
        else:
            self.answer(404, b"")

    def send_listing(self, repo: str) -> None:
        if repo not in self.server.listed:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        siblings = []
        for name, content in self.server.listed[repo].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content)}
            if name.endswith(".gguf"):
                digest = sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 1}
            siblings.append(sibling)
        answer = {"id": repo, "sha": COMMIT, "siblings": siblings}
        return self.answer(200, json.dumps(answer).encode())

    def send_file(self, repo: str, name: str) -> None:
        content = self.server.served.get(name, self.server.listed.get(repo, {}).get(name))
        if content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        tag = sha256(content).hexdigest()
        return self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pull(hub_url: str, cache: Path, ref: str, to: Path | None = None) -> dict[str, Any]:
    """Pull in a process of its own: the client reads HF_ENDPOINT once, when it is imported."""
    script = textwrap.dedent("""
        import json, sys
        from qaflora_edge.errors import QafloraError
        from qaflora_edge.hub import fetch_hub_bundle
        seen = []
        try:
            path = fetch_hub_bundle(sys.argv[1], sys.argv[2] or None,
                                    progress=lambda *numbers: seen.append(numbers))
            print(json.dumps({"path": str(path), "seen": seen}))
        except QafloraError as error:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    """)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub_url, "QAFLORA_CACHE": str(cache), "HF_HOME": str(cache / "hf")}
    command = [sys.executable, "-c", script, ref, str(to or "")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar of the client
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubRef("owner/name", None, None)),
        ("owner/name@v1.0", HubRef("owner/name", None, "v1.0")),
        ("owner/name/a.gguf", HubRef("owner/name", "a.gguf", None)),
        ("owner/name/sub/a b.gguf@refs/pr/1", HubRef("owner/name", "sub/a b.gguf", "refs/pr/1")),
    ],
)
def test_a_reference_is_read(text: str, expected: HubRef) -> None:
    assert parse_hub_ref(text) == expected


@pytest.mark.parametrize("text", ["name", "../name", "owner/..", "/a/b", "a/b/c", "a/b@", ""])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match=r"expected owner/name, owner/name/file\.gguf"):
        parse_hub_ref(text)


def test_a_bundle_is_pulled_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = pull(hub.url, tmp_path, "owner/bundle")
    folder = Path(answer["path"])
    assert folder == tmp_path / "hub" / "owner--bundle"
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert files == {name: BUNDLE[name] for name in BUNDLE if not name.endswith(".png")}
    total = sum(len(content) for content in files.values())
    assert answer["seen"][-1] == [total, total]
    done = [pair[0] for pair in answer["seen"]]
    assert done == sorted(done)
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path))
    assert pulled_path("owner/bundle") == folder
    assert pulled_path("owner/other") is None
    hub.listed.clear()
    assert pull(hub.url, tmp_path, "owner/bundle")["path"] == str(folder)


def test_a_single_gguf_joins_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    hub.listed["owner/models"] = {"q4/a.gguf": b"GGUF a", "q8/b.gguf": b"GGUF b"}
    to = tmp_path / "here"
    to.mkdir()
    (to / "other").touch()
    answer = pull(hub.url, tmp_path, "owner/models/q4/a.gguf", to)
    assert answer["path"] == str(to / "a.gguf")
    assert (to / "a.gguf").read_bytes() == b"GGUF a"


def test_several_gguf_files_need_a_name(hub: FakeHub, tmp_path: Path) -> None:
    hub.listed["owner/models"] = {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}
    assert pull(hub.url, tmp_path, "owner/models") == {
        "error": "DownloadError",
        "message": "Could not pull owner/models: expected bundle.json or exactly one .gguf file in "
        "owner/models; it has 2 files, and its .gguf files are: a.gguf, b.gguf. A file is named as "
        "owner/name/file.gguf. Check the name, the network, and for a private repository the "
        "environment variable HF_TOKEN; then try again.",
    }


def test_a_folder_that_is_in_use_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    answer = pull(hub.url, tmp_path, "owner/bundle", tmp_path)
    assert answer["error"] == "OutputFileError"
    assert "it exists already and is not an empty folder" in answer["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("served", "problem"),
    [
        (b"GGUF" + bytes(4999), "came with 5003 bytes, the Hub lists 5004."),
        (b"GGUF" + bytes(4999) + b"x", "came with sha256 "),
    ],
)
def test_a_wrong_file_leaves_no_bundle(
    hub: FakeHub, tmp_path: Path, served: bytes, problem: str
) -> None:
    hub.served["adapters/math.gguf"] = served
    answer = pull(hub.url, tmp_path, "owner/bundle")
    assert answer["error"] == "DownloadError"
    assert problem in answer["message"]
    assert list((tmp_path / "hub").iterdir()) == []


def test_a_file_name_that_leads_out_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.listed["owner/bundle"]["../../out.json"] = b"{}"
    answer = pull(hub.url, tmp_path, "owner/bundle")
    assert answer["error"] == "BundleError"
    assert "it contains '..'" in answer["message"]
    assert not list(tmp_path.rglob("out.json"))


def test_a_repository_that_does_not_exist_is_named(hub: FakeHub, tmp_path: Path) -> None:
    answer = pull(hub.url, tmp_path, "owner/none")
    assert answer["error"] == "DownloadError"
    assert "Could not pull owner/none: the Hub did not give the list of files" in answer["message"]


def test_no_network_is_told_soon(tmp_path: Path) -> None:
    answer = pull("http://127.0.0.1:9", tmp_path, "owner/bundle")
    assert answer["error"] == "DownloadError"
    assert "Check the name, the network" in answer["message"]


def test_a_model_of_the_registry_comes_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    content = b"GGUF" + bytes(20_000)
    hub.listed["owner/models"] = {"a.gguf": content}
    entry: dict[str, Any] = {
        "description": "",
        "file": "mine.gguf",
        "sha256": sha256(content).hexdigest(),
    }
    entry |= {"size_bytes": len(content), "architecture": "llama", "kind": "base", "license": "MIT"}
    source = {"type": "hub", "repo": "owner/models", "revision": COMMIT, "file": "a.gguf"}
    path = tmp_path / "registry.json"
    models = {"fake": {**entry, "sources": [source]}}
    path.write_text(json.dumps({"format": "qaflora-registry/1", "models": models}))
    script = textwrap.dedent("""
        import pathlib, sys
        from qaflora_edge import registry
        registry.package_data = lambda name: pathlib.Path(sys.argv[1])
        seen = []
        print(registry.fetch_model("fake", progress=lambda *numbers: seen.append(numbers)))
        print(seen[-1])
    """)
    env = os.environ | {"HF_ENDPOINT": hub.url, "QAFLORA_CACHE": str(tmp_path / "cache")}
    env["HF_HOME"] = str(tmp_path / "hf")
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=env, capture_output=True, text=True
    )
    target = tmp_path / "cache" / "models" / "mine.gguf"
    assert (result.stdout, result.stderr) == (f"{target}\n({len(content)}, {len(content)})\n", "")
    assert target.read_bytes() == content
