"""A stand-in of the Hub: the part of its HTTP interface that its own library uses.

Written from the library's requests, not from our code. All contents move by plain HTTP: the
library's protocols for large files (LFS, Xet) are its own matter.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_tests"


@dataclass
class Repo:
    """Commits by name: each a whole set of files. `access` is public, private or gated."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    access: str = "public"

    def commit(self, files: dict[str, bytes]) -> str:
        """Make a commit that holds just these files; give its name."""
        name = sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches["main"] = name
        return name


class FakeHub(ThreadingHTTPServer):
    """Repositories by name.

    requests  what was asked for, as "METHOD path"
    halfway   called with the path of each answer of which half was sent
    lies      headers that it sends in place of its own
    """

    daemon_threads = True
    request_queue_size = 64  # clients ask in parallel; beyond it one waits for seconds

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.halfway: Callable[[str], object] = lambda path: None
        self.lies: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """Commit files to a repository, which is made when it is missing."""
        return self.repos.setdefault(repo, Repo()).commit(files)

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo].commits[self.repos[repo].branches["main"]]


class _Refused(Exception):
    """Arguments of an answer that refuses a request."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body behind its head waited 40 ms for the head's receipt

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
            return super().handle_one_request()
        self.close_connection = True

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                try:
                    return answer(self, *(unquote(part) for part in match.groups()))
                except _Refused as refusal:
                    return self.answer(*refusal.args)
        return self.answer(404, {"error": "no such address"})

    do_HEAD = do_GET

    def has_token(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {TOKEN}")

    def open_repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        is_open = repo is not None and (repo.access == "public" or self.has_token())
        if repo is not None and repo.access == "gated" and not is_open:
            raise _Refused(401, {"error": "Restricted"}, {"X-Error-Code": "GatedRepo"})
        if repo is None or not is_open:
            status = 404 if self.has_token() else 401
            raise _Refused(status, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    def open_commit(self, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.open_repo(name)
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        return repo, commit

    # reading

    def send_info(self, name: str, revision: str = "main") -> None:
        repo, commit = self.open_commit(name, revision)
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": _git_sha1(content)}
            for path, content in repo.commits[commit].items()
        ]
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        self.answer(200, info)

    def send_tree(self, name: str, revision: str) -> None:
        repo, commit = self.open_commit(name, revision)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
            for path, content in repo.commits[commit].items()
        ]
        self.answer(200, entries)

    def send_file(self, name: str, revision: str, file: str) -> None:
        repo, commit = self.open_commit(name, revision)
        content = repo.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            raise _Refused(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{_git_sha1(content)}"'
        self.answer(200, content, headers | self.server.lies)

    # answering

    def answer(
        self,
        status: int,
        content: bytes | dict[str, Any] | list[dict[str, Any]],
        headers: dict[str, str] | None = None,
    ) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.server.halfway(urlsplit(self.path).path)
            self.wfile.write(content[half:])


def _git_sha1(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = "([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", f"/api/models/{_REPO}", _Handler.send_info),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _Handler.send_info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)/?", _Handler.send_tree),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.send_file),
)
