"""The page of the server as it is sent, and Markdown as data."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from scripted_server import Script, app
from serving import client_of
from starlette.testclient import TestClient

from qaflora_edge.server.page import content
from qaflora_edge.server.page.routes import MAX_TEXT_CHARS
from qaflora_edge.server.page.routes import blocks as blocks_of

PARTS = Path(content.__file__).parent / "parts"


@pytest.fixture
def client() -> TestClient:
    return TestClient(app(Script()))


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of what is inline."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style") and data.strip():
            self.inline.append((self.found[-1][0], data))


def directives(policy: str) -> dict[str, list[str]]:
    rows = (part.split() for part in policy.split(";"))
    return {row[0]: row[1:] for row in rows}


def test_page_is_one_small_text_that_asks_for_nothing(client: TestClient) -> None:
    reply = client.get("/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert len(reply.content) < 100_000
    for tag, attributes in Elements(reply.text).found:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert not {"src", "action", "srcset", "style"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        href = attributes.get("href") or "#"
        assert href.startswith(("#", "data:image/svg+xml,"))
    addresses = set(re.findall(r"https?://[^\s\"'`)<]+", reply.text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody looks up


def test_policy_allows_the_one_script_and_the_one_style_of_the_page(client: TestClient) -> None:
    reply = client.get("/")
    policy = directives(reply.headers["content-security-policy"])
    hashes = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for tag, text in Elements(reply.text).inline
        if not text.startswith("{")  # the strategies' helps, which are no script
    }
    assert policy == {
        "default-src": ["'none'"],
        "script-src": [hashes["script"]],
        "style-src": [hashes["style"]],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_every_part_is_in_the_page_and_none_makes_html_of_a_text() -> None:
    """Trusted types would refuse these at run time; here is said that none is there at all."""
    assert {path.stem for path in PARTS.glob("*.js")} == {*content.SCRIPTS}
    for path in PARTS.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 250
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", text
        )


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_script_can_be_read(client: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "page.js"
    [script] = [
        t for tag, t in Elements(client.get("/").text).inline if tag == "script" and t[0] != "{"
    ]
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(["node", "--check", path], capture_output=True, text=True)
    assert done.stderr == ""


def blocks(client: TestClient, text: str, **more: Any) -> dict[str, Any]:
    reply = client.post("/page/blocks", json={"text": text, **more})
    assert reply.status_code == 200
    found: dict[str, Any] = reply.json()
    return found


def test_blocks_that_are_settled_and_the_one_that_grows(client: TestClient) -> None:
    assert blocks(client, "# a\n\nb *c") == {
        "settled": [["h1", {}, ["a"]]],
        "live": [["p", {}, ["b *c"]]],
        "rest": "b *c",
    }
    assert blocks(client, "b *c*", is_whole=True) == {
        "settled": [["p", {}, ["b ", ["em", {}, ["c"]]]]],
        "live": [],
        "rest": "",
    }
    assert blocks(client, "") == {"settled": [], "live": [], "rest": ""}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "The field text is None, expected a text."),
        ({"text": 1}, "The field text is 1, expected a text."),
        (
            {"text": "a", "is_whole": 1},
            "The field is_whole is 1, expected true or false.",
        ),
    ],
)
def test_other_bodies_are_refused(client: TestClient, body: Any, message: str) -> None:
    reply = client.post("/page/blocks", json=body)
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, message)


def test_a_text_that_is_too_long_is_refused(client: TestClient) -> None:
    reply = client.post("/page/blocks", json={"text": "a" * (MAX_TEXT_CHARS + 1)})
    assert (reply.status_code, reply.json()["error"]["message"]) == (
        413,
        "The text has 262145 characters, at most 262144 are laid out.",
    )


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["[", "[a](", "**a", "_a_", ">", "- ", "|", "~~", "a\n", "\\("])
def test_no_text_takes_longer_than_its_length_explains(pattern: str) -> None:
    """CPU time; four times the text may take eight times as long, no more."""

    def seconds(n: int) -> float:
        text = pattern * (n // len(pattern))
        return min(timed(text) for _ in range(2))

    def timed(text: str) -> float:
        start = time.process_time()
        blocks_of(text, False)
        return time.process_time() - start

    assert seconds(12_000) < 0.05 + 8 * seconds(3_000)


def test_the_scripted_server_streams_as_the_page_reads_it() -> None:
    reply = TestClient(app(Script(answers={"a": "b c"}))).post(
        "/v1/chat/completions",
        json={"model": "demo", "messages": [{"content": "a"}], "fusion": {"return": "layers"}},
    )
    events = [
        json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")
    ]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "b c"
    assert len(events[0]["fusion"]["layers"]) == 3


def test_the_real_server_has_the_page_which_needs_no_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="qaflora_edge.server")
    with client_of(make_bundle(tmp_path).folder, api_key="secret") as client:
        assert client.get("/").content == content.page().body
        assert client.post("/page/blocks", json={"text": "a"}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert client.post("/page/blocks", json={"text": "a"}, headers=key).status_code == 200
        lines = [line.split()[1:4] for line in caplog.messages]
        assert ["GET", "/", "200"] in lines
        assert [line for line in lines if line[1] == "/page/blocks"] == [
            ["POST", "/page/blocks", "401"]
        ]
        assert "blocks" not in "".join(
            line for line in client.get("/metrics", headers=key).text.splitlines() if "200" in line
        )
