"""Who may ask: the key, the name that the server is called by, and the page that asks."""

import hmac
import ipaddress
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qaflora_edge.server.options import ServerOptions
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.work import refused_response

WITHOUT_KEY = frozenset(
    {"/", "/health"}
)  # the page asks for the key, and gives it with what it asks
_NO_KEY = "The API key is missing or wrong, expected the header Authorization: Bearer KEY."
LOCAL_NAMES = frozenset({"localhost"})


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


async def _with_headers(send: Send, message: Message) -> None:
    """No page of elsewhere is to run or to embed what is answered here."""
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
    await send(message)


class Gate:
    """Lets requests pass that are to us, and of no foreign page; others get 403.

    A page on the web cannot be told from its visitor by address: it may send requests to this
    machine (Origin then names the page), or let its own name point here (Host then is that name).
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = partial(_with_headers, send)
        if scope["type"] == "http":
            found = self._refusal(Headers(scope=scope))
            if found is not None:
                await refused_response(found)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        host = ", ".join(headers.getlist("host"))  # of several none is known
        if self._options.hosts is not None and not self._is_known(host):
            message = (
                f"The request is to the host {host!r:.100}, by which this server is not called; "
                "start it with --allow-host to allow it."
            )
            return Refusal(403, message, code="host_not_allowed")
        origins = headers.getlist("origin")
        origin = ", ".join(origins)
        if origins and not self._is_own(origin, host):
            message = (
                f"The page at {origin!r:.100} may not ask here; start the server with "
                "--cors-origin to allow it."
            )
            return Refusal(403, message, code="origin_not_allowed")
        return None

    def _is_known(self, host: str) -> bool:
        """Whether a Host is an address, which no other name can stand for, or one of our names."""
        assert self._options.hosts is not None
        name = _hostname(host)
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._options.hosts
        return True

    def _is_own(self, origin: str, host: str) -> bool:
        allowed = self._options.cors_origins
        if "*" in allowed or origin in allowed:
            return True
        scheme, _, rest = origin.partition("://")
        return scheme in ("http", "https") and bool(rest) and rest.lower() == host.lower()


class Lock:
    """Lets requests pass that have the key; others get 401, and nothing of them is read.

    It stands behind what answers pages of allowed origins: they are to read why.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in WITHOUT_KEY:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            scheme, _, key = given.partition(b" ")
            if not hmac.compare_digest(key, self._key) or scheme.lower() != b"bearer":
                refused = refused_response(Refusal(401, _NO_KEY, code="invalid_api_key"))
                refused.headers["WWW-Authenticate"] = "Bearer"
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
