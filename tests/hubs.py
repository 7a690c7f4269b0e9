"""A stand-in of the Hub: the part of its HTTP interface that its own library uses.

Written from the library's requests, not from our code. Contents move by HTTP and LFS; the library's
other protocol for large files (Xet) is turned off in the tests.
"""

import base64
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_tests"
LARGE = (".gguf", ".safetensors", ".bin")


@dataclass
class Repo:
    """Commits by name: each a whole set of files. `access` is public, private or gated."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    access: str = "public"

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        """Make a commit that holds just these files; give its name."""
        name = sha1(f"{len(self.commits)}{sorted(files)}{message}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        self.messages.append(message)
        return name


class FakeHub(ThreadingHTTPServer):
    """Repositories by name.

    refused   a content that is not taken
    requests  what was asked for, as "METHOD path"
    """

    daemon_threads = True
    request_queue_size = 64  # clients ask in parallel; beyond it one waits for seconds

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refused = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repo: str, files: dict[str, bytes], **options: Any) -> str:
        """Commit files to a repository, which is made when it is missing."""
        return self.repos.setdefault(repo, Repo()).commit(files, **options)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches.get(revision, revision)]


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
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
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

    do_HEAD = do_POST = do_PUT = do_GET

    def has_token(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {TOKEN}")

    def open_repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        is_open = repo is not None and (repo.access == "public" or self.has_token())
        if repo is not None and repo.access == "gated" and not is_open and not write:
            raise _Refused(401, {"error": "Restricted"}, {"X-Error-Code": "GatedRepo"})
        if repo is None or not is_open or (write and not self.has_token()):
            status = 404 if self.has_token() else 401
            raise _Refused(status, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    def open_commit(self, name: str, revision: str, **options: bool) -> tuple[Repo, str]:
        repo = self.open_repo(name, **options)
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        return repo, commit

    # reading

    def send_info(self, name: str, revision: str = "main") -> None:
        repo, commit = self.open_commit(name, revision)
        siblings = [_sibling(*item) for item in repo.commits[commit].items()]
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        self.answer(200, info | {"private": repo.access == "private"})

    def send_tree(self, name: str, revision: str) -> None:
        repo, commit = self.open_commit(name, revision)
        self.answer(200, [_entry(*item) for item in repo.commits[commit].items()])

    def send_file(self, name: str, revision: str, file: str) -> None:
        repo, commit = self.open_commit(name, revision)
        content = repo.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            raise _Refused(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        if file.endswith(LARGE):
            headers["X-Linked-ETag"] = f'"{_sha256(content)}"'
            headers["X-Linked-Size"] = str(len(content))
        headers["ETag"] = f'"{_git_sha1(content)}"'
        self.answer(200, content, headers)

    # writing

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.has_token():
            raise _Refused(401, {"error": "Invalid username or password."})
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            raise _Refused(409, {"error": "You already created this model repo", **url})
        is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repos[name] = Repo(access="private" if is_private else "public")
        self.server.repos[name].commit({".gitattributes": b"*.gguf filter=lfs\n"}, "initial commit")
        self.answer(200, url)

    def create_branch(self, name: str, branch: str) -> None:
        repo = self.open_repo(name, write=True)
        if branch in repo.branches:
            raise _Refused(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        self.answer(200, {})

    def check_card(self) -> None:
        assert json.loads(self.body)["content"].startswith("---\n")
        self.answer(200, {"errors": [], "warnings": []})

    def send_modes(self, name: str, revision: str) -> None:
        repo, commit = self.open_commit(name, revision, write=True)
        there = repo.commits[commit]
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            name_of = _sha256 if path.endswith(LARGE) else _git_sha1
            oid = name_of(there[path]) if path in there else None
            mode = "lfs" if path.endswith(LARGE) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def send_batch(self, name: str) -> None:
        self.open_repo(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.url}/objects/{wanted['oid']}"}
                verify = {"href": f"{self.server.url}/verify/{wanted['oid']}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store_object(self, oid: str) -> None:
        if self.body == self.server.refused:
            raise _Refused(403, {"error": "Forbidden"})
        if _sha256(self.body) != oid:
            raise _Refused(400, {"error": "not the object of that name"})
        self.server.objects[oid] = self.body
        self.answer(200, b"")

    def verify_object(self, oid: str) -> None:
        size = json.loads(self.body)["size"]
        is_there = len(self.server.objects.get(oid, b"")) == size
        self.answer(200 if is_there else 404, {})

    def make_commit(self, name: str, revision: str) -> None:
        repo, parent = self.open_commit(name, revision, write=True)
        items = [json.loads(line) for line in self.body.splitlines()]
        header = items[0]["value"]
        if header.get("parentCommit") not in (None, parent):
            raise _Refused(412, {"error": "A commit has happened since. Please refresh."})
        files = dict(repo.commits[parent])
        for item in items[1:]:
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        oid = repo.commit(files, header["summary"], revision)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

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
            self.wfile.write(content)


def _git_sha1(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return sha256(content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    size = len(content)
    lfs = {"size": size, "sha256": _sha256(content), "pointerSize": 130}
    sibling = {"rfilename": name, "size": size, "blobId": _git_sha1(content)}
    return sibling | ({"lfs": lfs} if name.endswith(LARGE) else {})


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree of a repository lists it."""
    size = len(content)
    lfs = {"oid": _sha256(content), "size": size, "pointerSize": 130}
    entry = {"type": "file", "path": name, "size": size, "oid": _git_sha1(content)}
    return entry | ({"lfs": lfs} if name.endswith(LARGE) else {})


_REPO = "([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", f"/api/models/{_REPO}", _Handler.send_info),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _Handler.send_info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)/?", _Handler.send_tree),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.send_file),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.check_card),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", _Handler.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _Handler.send_modes),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.send_batch),
    ("PUT", "/objects/([0-9a-f]{64})", _Handler.store_object),
    ("POST", "/verify/([0-9a-f]{64})", _Handler.verify_object),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _Handler.make_commit),
)
