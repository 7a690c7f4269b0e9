"""Receive a body: how large it may be, and how long it may take."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from qaflora_edge.server.bodies import Body, parsed
from qaflora_edge.server.refusals import Refusal

MAX_BODY_BYTES = 4 << 20
MAX_SMALL_BYTES = 64 << 10  # of a body that does not wait to be received
MAX_LARGE_BODIES = 8  # received and parsed at the same time
BODY_S = 60.0  # the longest that a body may take to come
SLOW_S = 10.0  # and where others wait for it, the longest before it keeps this pace:
BYTES_PER_S = 64 << 10

B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """Read and check a body. Raises Refusal for one that is too large, or wrong, by its field."""
    n_byte = request.headers.get("content-length", "")
    if n_byte.isdecimal() and int(n_byte) <= MAX_SMALL_BYTES:
        return parsed(kind, await _bytes(request, is_waited_for=False))
    check_announced(request, MAX_BODY_BYTES)
    async with request.app.state.large_bodies.place(address_of(request)):
        return await asyncio.to_thread(parsed, kind, await _bytes(request))


def check_announced(request: Request, most: int) -> None:
    """Raise Refusal for a body that says of itself that it is larger."""
    n_byte = request.headers.get("content-length", "")
    if n_byte.isdecimal() and int(n_byte) > most:
        raise _too_large(most)


def address_of(request: Request) -> str:
    """Give the address that a request comes from."""
    return request.client.host if request.client else ""


async def _bytes(request: Request, *, is_waited_for: bool = True) -> bytes:
    data = bytearray()
    await receive(request, data.extend, MAX_BODY_BYTES, BODY_S, is_waited_for=is_waited_for)
    return bytes(data)


async def receive(
    request: Request,
    take: Callable[[bytes], object],
    most: int,
    timeout_s: float,
    *,
    is_waited_for: bool = True,
) -> None:
    """Hand on a body of at most so many bytes as it comes.

    is_waited_for  it has one of few places, so it has to keep a pace
    """
    n_byte = 0
    start_s = asyncio.get_running_loop().time()
    first_s = min(SLOW_S, timeout_s) if is_waited_for else timeout_s
    try:
        async with asyncio.timeout(first_s) as limit:
            async for part in request.stream():
                n_byte += len(part)
                if n_byte > most:
                    raise _too_large(most)
                take(part)
                if is_waited_for:
                    paced_s = SLOW_S + n_byte / BYTES_PER_S
                    limit.reschedule(start_s + min(paced_s, timeout_s))
    except TimeoutError as error:
        message = f"The body has not come within {timeout_s:g} s"
        if is_waited_for:
            message += f", at {BYTES_PER_S} bytes a second after the first {SLOW_S:g} s"
        message += "."
        raise Refusal(408, message, code="request_timeout") from error
    except ClientDisconnect as error:
        raise Refusal(400, "The body was not sent to its end.") from error


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"The body has more than {most} bytes.", code="request_too_large")
