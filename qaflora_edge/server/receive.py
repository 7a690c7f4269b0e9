"""Receive a call: its body, how large it may be and how long it may take, and whom it asks."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from starlette.requests import ClientDisconnect, Request

from qaflora_edge.ask import Ask
from qaflora_edge.dialects.options import Body, Weighed, read_body, weighing_of
from qaflora_edge.formats.inputs import UnknownField, read_json_object
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.security import client_of, share_of
from qaflora_edge.server.served_models import ServedModel, models_of

MAX_BODY_BYTES = 4 << 20
MAX_SMALL_BYTES = 64 << 10  # of a body that does not wait to be received
MAX_HELD_BYTES = 64 << 20  # of bodies that are large, received and not parsed
MAX_LARGE_BODIES = 8  # parsed at the same time
MAX_WAITING = 8  # for places of a kind
WAIT_S = 60.0  # the longest that they wait
BODY_S = 60.0  # the longest that a body may take to come
SLOW_S = 10.0  # and where it takes room from others, the longest before it keeps this pace:
BYTES_PER_S = 64 << 10

B = TypeVar("B", bound=Body)


class Places:
    """Let so many hold a place at a time, and few wait for one.

    Those of one address wait for its share of the places before they wait with others.
    """

    def __init__(self, n_place: int) -> None:
        self._n_place = n_place
        self._waiting = Counter[str]()
        self._all = asyncio.Semaphore(n_place)
        self._shares = WeakValueDictionary[str, asyncio.Semaphore]()  # of those who are here

    @asynccontextmanager
    async def place(self, address: str) -> AsyncIterator[None]:
        """Hold a place. Raises Refusal where too many wait for one, or it takes too long."""
        n_mine = self._waiting[address]
        if self._waiting.total() >= MAX_WAITING or n_mine >= share_of(MAX_WAITING, address):
            raise _busy()
        share = self._shares.get(address) or asyncio.Semaphore(share_of(self._n_place, address))
        self._shares[address] = share
        async with AsyncExitStack() as held:
            self._waiting[address] += 1
            try:
                async with asyncio.timeout(WAIT_S):
                    await held.enter_async_context(share)
                    await held.enter_async_context(self._all)
            except TimeoutError as error:
                raise _busy() from error
            finally:
                self._waiting -= Counter([address])
            yield


class BodyRoom:
    """Bound the bytes of large bodies that have come and are not parsed; nobody waits for room."""

    def __init__(self, n_most: int) -> None:
        self._n_most = n_most
        self._held = Counter[str]()

    def take(self, address: str, n_byte: int) -> None:
        """Hold what has come. Raises Refusal where all hold too much, or this address does."""
        n_mine = self._held[address] + n_byte
        n_all = self._held.total() + n_byte
        if n_all > self._n_most or n_mine > share_of(self._n_most, address):
            raise _busy()
        self._held[address] = n_mine

    def free(self, address: str, n_byte: int) -> None:
        self._held -= Counter({address: n_byte})


@dataclass(frozen=True)
class Call(Generic[B]):
    """Hold a request that was read: its body, and the bundle that it asks."""

    request: Request
    body: B
    served: ServedModel
    strategy: str | None = None  # that the model id names

    @property
    def model(self) -> str:
        return self.body.model or self.served.name

    @cached_property
    def defaults(self) -> Ask:
        """Say what holds where the body says nothing, and who is weighed."""
        assert isinstance(self.body, Weighed)
        weighing = weighing_of(self.body, self.strategy, self.served.weigher.adapters)
        return Ask((), weighing, self.served.sampling)


async def read_call(request: Request, kind: type[B]) -> Call[B]:
    """Read and check a body, and find whom it asks. Raises Refusal."""
    body = await read(request, kind)
    served, strategy = models_of(request).find(body.model)
    return Call(request, body, served, strategy)


async def read(request: Request, kind: type[B]) -> B:
    """Read and check a body. Raises Refusal for one that is too large, or wrong, by its field."""
    n_byte = request.headers.get("content-length", "")
    if not n_byte.isdecimal() or int(n_byte) > MAX_SMALL_BYTES:
        return await _read_large(request, kind)
    data = bytearray()
    await receive(request, data.extend, MAX_BODY_BYTES, BODY_S, is_waited_for=False)
    return _parsed(kind, bytes(data))


async def _read_large(request: Request, kind: type[B]) -> B:
    check_announced(request, MAX_BODY_BYTES)
    state = request.app.state
    room: BodyRoom = state.body_room
    address = address_of(request)
    data = bytearray()

    def hold(part: bytes) -> None:
        room.take(address, len(part))
        data.extend(part)

    try:
        await receive(request, hold, MAX_BODY_BYTES, BODY_S)
        async with state.large_bodies:
            return await asyncio.to_thread(_parsed, kind, bytes(data))
    finally:
        room.free(address, len(data))


def _parsed(kind: type[B], data: bytes) -> B:
    try:
        fields = read_json_object(data)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise Refusal(400, f"The body is no JSON object in UTF-8: {error}.") from error
    try:
        return read_body(kind, fields)
    except UnknownField as error:
        message = f"The field {error.place} does not exist, expected {error.expected}."
        raise Refusal(400, message, param=error.place, code="unknown_field") from error


def check_announced(request: Request, most: int) -> None:
    """Raise Refusal for a body that says of itself that it is larger."""
    n_byte = request.headers.get("content-length", "")
    if n_byte.isdecimal() and int(n_byte) > most:
        raise _too_large(most)


def address_of(request: Request) -> str:
    """Name who asks, as places are shared."""
    return client_of(request.client.host) if request.client else ""


async def receive(
    request: Request,
    take: Callable[[bytes], object],
    most: int,
    timeout_s: float,
    *,
    is_waited_for: bool = True,
) -> None:
    """Hand on a body of at most so many bytes as it comes.

    is_waited_for  it has one of few places, or room for few, so it has to keep a pace
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


def _busy() -> Refusal:
    message = "The server receives as much as it can; try again later."
    return Refusal(503, message, code="too_many_bodies")


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"The body has more than {most} bytes.", code="request_too_large")
