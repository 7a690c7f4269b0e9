"""Who may ask the server: keys, hosts, origins, and what it listens at."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from bundles import qaflora
from click.testing import CliRunner
from serving import address_of, client_of, error_of, got, listening
from starlette.testclient import TestClient

from qaflora_edge.cli import main
from qaflora_edge.server import run, security
from qaflora_edge.server.security import is_loopback

KEY = "correct-horse"
ORIGIN = "https://chat.example"
PATHS = ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def locked(made) -> Iterator[TestClient]:
    with client_of(made.folder, api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def opened(made) -> Iterator[TestClient]:
    with client_of(made.folder, cors_origins=(ORIGIN,)) as client:
        yield client


def code(client: TestClient, path: str, **headers: str) -> tuple[int, str | None]:
    response = client.get(path, headers=headers)
    return response.status_code, response.json().get("error", {}).get("code")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "given",
    ["", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"bearer  {KEY}", "Bearer ñ", f"Basic {KEY}"],
)
def test_without_the_key_nothing_is_told(locked, path, given) -> None:
    headers = {"authorization": given.encode("latin-1")} if given else {}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    told = "The API key is missing or wrong, expected Authorization: Bearer KEY, or X-Api-Key: KEY."
    assert response.json()["error"] == error_of("invalid_api_key", told)


def test_the_key_opens(locked) -> None:
    headers = {"Authorization": f"bearer {KEY}"}  # the word is as one likes (RFC 9110, 11.1)
    assert locked.get("/v1/models", headers=headers).status_code == 200
    headers = {"Authorization": f"Bearer {KEY}"}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.get("/nothing", headers=headers).status_code == 404
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert locked.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    assert locked.post("/v1/chat/completions", json=body).status_code == 401
    assert locked.get("/health").status_code == 200
    for key, status in ((KEY, 200), (f"{KEY}x", 401), ("", 401)):  # as Anthropic's clients do
        assert locked.get("/v1/models", headers={"X-Api-Key": key}).status_code == status
    headers = {"X-Api-Key": KEY, "Authorization": "Bearer x"}
    assert locked.get("/v1/models", headers=headers).status_code == 401


def test_keys_are_compared_in_constant_time(locked, monkeypatch) -> None:
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    assert code(locked, "/v1/models", authorization=f"Bearer {KEY}")[0] == 401
    assert compared == [(KEY.encode(), KEY.encode())]


OUR_HOSTS = ("localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "192.168.0.7")
FOREIGN_HOSTS = (
    *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8080", "[::1", ""),
    *("evil.example:localhost", "evil@localhost.example"),
    *("[::1].evil.example", "[::1]evil", "[::1]:80.evil.example", "localhost:80:80", "[localhost]"),
)


@pytest.mark.parametrize("host", [*OUR_HOSTS, *FOREIGN_HOSTS])
def test_a_name_that_was_made_to_point_here_is_refused(opened, host) -> None:
    expected = (200, None) if host in OUR_HOSTS else (403, "host_not_allowed")
    for path in ("/health", "/v1/models"):
        assert code(opened, path, host=host) == expected


OUR_ORIGINS = ("http://localhost", ORIGIN)
FOREIGN_ORIGINS = (
    *("http://localhost:3000", "file://localhost", f"{ORIGIN}.evil.example", "null", ""),
)


@pytest.mark.parametrize("origin", [*OUR_ORIGINS, *FOREIGN_ORIGINS])
def test_a_page_from_elsewhere_is_refused(opened, origin) -> None:
    is_own = origin in OUR_ORIGINS
    expected = (200, None) if is_own else (403, "origin_not_allowed")
    assert code(opened, "/v1/models", origin=origin) == expected
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    response = opened.post("/v1/chat/completions", json=body, headers={"origin": origin})
    assert response.status_code == (200 if is_own else 403)


@pytest.mark.parametrize("name", ["host", "origin"])
def test_of_two_names_none_is_ours(opened, name) -> None:
    ours = {"host": "localhost", "origin": ORIGIN}[name]
    for second in (ours, "evil.example"):
        response = opened.get("/health", headers=[(name, ours), (name, second)])
        assert response.status_code == 403
        assert response.json()["error"]["code"] == f"{name}_not_allowed"


def test_nothing_is_for_others_to_embed(opened, locked) -> None:
    foreign = {"origin": "https://evil.example"}
    found = [opened.get(path) for path in ("/", "/v1/models", "/health", "/nothing")]
    found += [opened.get("/v1/models", headers=foreign), locked.get("/v1/models")]
    for headers in (each.headers for each in found):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_a_page_that_may_ask_is_told_so(opened, made) -> None:
    asks = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    response = opened.options("/v1/chat/completions", headers=asks)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in response.headers["access-control-allow-headers"]
    response = opened.get("/v1/models", headers={"origin": ORIGIN})
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "x-fusion" in response.headers["access-control-expose-headers"].lower()
    with client_of(made.folder, api_key=KEY, cors_origins=(ORIGIN,)) as locked:
        response = locked.get("/v1/models", headers={"origin": ORIGIN})
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == ORIGIN  # it may read why
        assert locked.options("/v1/chat/completions", headers=asks).status_code == 200
    foreign = {**asks, "origin": "https://evil.example"}
    response = opened.options("/v1/chat/completions", headers=foreign)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.7", "example.org", "")))


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("", ""),
    ],
)
def test_a_network_of_ipv6_shares_as_one_client(address, client) -> None:
    assert security.client_of(address) == client


def test_beyond_this_machine_only_with_a_key(made) -> None:
    result = qaflora("serve", made.folder, "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: --host 0.0.0.0 can be reached from other machines, and there is no API key. Set "
        "QAFLORA_API_KEY, or say --insecure if everyone may use it."
    )


@pytest.mark.parametrize(("key", "is_checked"), [(None, True), (KEY, False)])
def test_beyond_this_machine_hosts_are_checked_without_a_key(
    made, monkeypatch, key, is_checked
) -> None:
    served = []
    monkeypatch.setattr(run, "run", lambda *words: served.append(words[-1]))
    words = ["serve", str(made.folder), "--host", "0.0.0.0", "--insecure"]
    env = {"QAFLORA_API_KEY": key} if key else {}
    assert CliRunner().invoke(main, words, env=env).exit_code == 0
    assert (served[0].hosts is not None) == is_checked


@pytest.mark.parametrize("key", ["short", "with a space", "schlüssel", "x" * 7, "tab\tinside"])
def test_keys_that_cannot_be_sent_are_refused(made, key) -> None:
    result = CliRunner().invoke(main, ["serve", str(made.folder)], env={"QAFLORA_API_KEY": key})
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: The API key has {len(key)} characters, expected 8 or more printable ASCII "
        "characters without spaces; choose another one (--api-key, QAFLORA_API_KEY).\n"
    )
    assert key not in result.stderr


@pytest.mark.parametrize(
    "model", ["../bundle", "/etc/passwd", "tiny/../../x", "%2e%2e", "tiny\x00"]
)
def test_model_ids_are_names_and_no_paths(opened, model) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "a"}]}
    response = opened.post("/v1/chat/completions", json=body)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_connection_that_may_not_ask_is_closed_after_ten_refusals(made) -> None:
    asked = b"GET /health HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n"
    with listening(made.folder) as url, socket.create_connection(address_of(url)) as client:
        client.settimeout(30)
        client.sendall(200 * asked)
        told = b""
        with contextlib.suppress(ConnectionResetError):  # as what was sent was not read
            while data := client.recv(65536):
                told += data
        assert told.count(b"HTTP/1.1 403") == security.MAX_REFUSALS
        assert got(f"{url}/health").status_code == 200
