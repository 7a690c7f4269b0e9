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
    """Lets requests pass that may ask; others get 401 or 403, and nothing of them is read.

    A page on the web cannot be told from its visitor by address: it may send requests to this
    machine (Origin then names the page), or let its own name point here (Host then is that name).
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options
        key = options.api_key
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = self._refusal(Headers(scope=scope), scope)
            if found is not None:
                await refused_response(found)(scope, receive, send)
                return
        await self._app(scope, receive, partial(_with_headers, send))

    def _refusal(self, headers: Headers, scope: Scope) -> Refusal | None:
        host = headers.get("host", "")
        if self._options.hosts is not None and not self._is_known(host):
            message = (
                f"The request is to the host {host!r:.100}, by which this server is not called; "
                "start it with --allow-host to allow it."
            )
            return Refusal(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            message = (
                f"The page at {origin!r:.100} may not ask here; start the server with "
                "--cors-origin to allow it."
            )
            return Refusal(403, message, code="origin_not_allowed")
        if self._key is None or scope["path"] in WITHOUT_KEY or scope["method"] == "OPTIONS":
            return None
        given = headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, self._key):
            return None
        return Refusal(
            401,
            "The API key is missing or wrong, expected the header Authorization: Bearer KEY.",
            code="invalid_api_key",
        )

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


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
