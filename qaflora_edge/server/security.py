"""Who may ask: the API key, the Host and the Origin of a request."""

import hmac
import ipaddress
import re
from dataclasses import dataclass
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qaflora_edge.server.refusals import Refusal

WITHOUT_KEY = frozenset({"/", "/health", "/v1/health"})  # the page asks for the key itself
LOCAL_NAMES = frozenset({"localhost"})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(?::[0-9]*)?")
MAX_REFUSALS = 10  # of a connection
REFUSALS = "refusals"  # in the state of a connection's requests
OWN_ADDRESSES = frozenset({"127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Tell whether an address or name is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


def client_of(address: str) -> str:
    """Name who shares an address: of IPv6 a network of 64 bits, which one line has whole."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    if ip.version == 4 or ip.is_loopback:
        return address
    return str(ipaddress.ip_network((ip.packed, 64), strict=False))


def share_of(n_place: int, client: str, part: int = 4) -> int:
    """Give how many of some places a client may have: a quarter, programs of this machine all.

    Behind a proxy all come from this machine, by the addresses that programs use unless told.
    """
    return n_place if client in OWN_ADDRESSES else (n_place + part - 1) // part


@dataclass
class Refusals:
    """Count the requests of a connection whose sender may not ask."""

    n: int = 0


def refusing(refused: Refusal, scope: Scope) -> Response:
    """Answer a request that may not be asked; a connection of many such requests is closed.

    Else one that sends thousands at once makes everybody wait.
    """
    response = refused.response(scope["path"])
    refusals = scope.get("state", {}).get(REFUSALS, Refusals())
    refusals.n += 1
    if refusals.n >= MAX_REFUSALS:
        response.headers["Connection"] = "close"
    return response


class Gate:
    """Reject requests with a wrong Host or Origin (403).

    A web page may send requests to this machine (Origin then names the page), or let its own name
    point here (Host then is that name). Headers keep other pages from embedding an answer.

    hosts, origins  see ServerOptions, where origins are cors_origins
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str] | None, origins: tuple[str, ...]
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self._app
        if scope["type"] == "http":
            refused = self._refusal(Headers(scope=scope))
            if refused is not None:
                answering = refusing(refused, scope)
        await answering(scope, receive, partial(_send_guarded, send))

    def _refusal(self, headers: Headers) -> Refusal | None:
        # Two headers of one name are joined, and then known as nothing.
        host = ", ".join(headers.getlist("host"))
        origin = ", ".join(headers.getlist("origin"))
        if self._hosts is not None and not is_known(host, self._hosts):
            message = f"The host {host!r:.100} is not this server; --allow-host NAME allows it."
            return Refusal(403, message, code="host_not_allowed")
        is_allowed = "*" in self._origins or origin in self._origins
        if "origin" in headers and not is_allowed and not is_same(origin, host):
            message = f"The page {origin!r:.100} may not ask; --cors-origin ORIGIN allows it."
            return Refusal(403, message, code="origin_not_allowed")
        return None


async def _send_guarded(send: Send, message: Message) -> None:
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
    await send(message)


def is_known(host: str, names: frozenset[str]) -> bool:
    """Tell whether a Host is one of our names, or an address, which no other name can be."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match[1].strip("[]").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


def is_same(origin: str, host: str) -> bool:
    """Tell whether a page comes from the host that it asks."""
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and bool(rest) and rest.lower() == host.lower()


class Lock:
    """Reject requests without the key (401) before their bodies are read.

    It comes after the CORS headers, so that pages of allowed origins can read why.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in WITHOUT_KEY:
            headers = Headers(scope=scope)
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if "authorization" not in headers:  # as Anthropic's clients and llama-server have it
                scheme = "bearer"
                key = headers.get("x-api-key", "")
            is_key = hmac.compare_digest(key.encode("latin-1"), self._key)
            if not is_key or scheme.lower() != "bearer":
                message = (
                    "The API key is missing or wrong, expected Authorization: Bearer KEY, or "
                    "X-Api-Key: KEY."
                )
                refused = Refusal(401, message, code="invalid_api_key")
                response = refusing(refused, scope)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
