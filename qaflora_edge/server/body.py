"""The body of a request: one JSON object, of bounded size."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from qaflora_edge.formats.json_text import read_unicode_object
from qaflora_edge.server.options import BODY_S, MAX_BODY_BYTES
from qaflora_edge.server.refusals import Refusal

_AT_ONCE = 64 << 10  # bytes that are parsed before others would notice


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object of a body. Raises Refusal for what is none, or is too large."""
    data = await _bytes(request)
    if len(data) < _AT_ONCE:
        return _parsed(data)
    return await asyncio.to_thread(_parsed, data)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        return read_unicode_object(data)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise Refusal(400, f"The body is no JSON object in UTF-8: {error}.") from error


async def _bytes(request: Request) -> bytes:
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > MAX_BODY_BYTES:
        raise _too_large()
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError as error:
        raise Refusal(
            408, f"The body has not come within {BODY_S:g} s.", code="request_timeout"
        ) from error
    except ClientDisconnect as error:
        raise Refusal(400, "The body was not sent to its end.") from error
    return bytes(data)


def _too_large() -> Refusal:
    return Refusal(413, f"The body has more than {MAX_BODY_BYTES} bytes.", code="request_too_large")
