"""A request that computes: it waits for its turn, computes in a thread, and is sent as it comes."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.server.options import PIECE_BYTES, PING_S, SEND_S, ServerOptions
from qaflora_edge.server.refusals import NO_PARAMS, Params, Refusal, refusal
from qaflora_edge.server.shelf import Shelf, Shelved
from qaflora_edge.server.stream import PING, event
from qaflora_edge.server.turns import Client

log = logging.getLogger(__name__)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx passes events on as they come
}
Headers = dict[str, str]
Part = Headers | bytes | BaseException | None  # None is the end


class Outlet:
    """What a thread that computes has of its request.

    cancel  set when the answer is no longer wanted
    facts   for the log and the metrics
    """

    def __init__(self, put: Callable[[Headers | bytes], object], facts: dict[str, Any]) -> None:
        self.cancel, self.facts, self._put = threading.Event(), facts, put

    def send(self, part: Headers | bytes) -> None:
        """Hand on a part of the answer: headers, then bytes."""
        self._put(part)


Compute = Callable[[Engine, Outlet], None]


class Work(Response):
    """An answer that is computed: events of a stream with is_stream, else one JSON text.

    is_light  it takes no step of the Engine, and so waits for no turn
    params    see refusal
    """

    def __init__(
        self,
        request: Request,
        body: Mapping[str, Any],
        bundle: Shelved,
        compute: Compute,
        *,
        is_stream: bool = False,
        is_light: bool = False,
        params: Params = NO_PARAMS,
    ) -> None:
        self._state = request.app.state
        self._shelf: Shelf = self._state.shelf
        self._options: ServerOptions = self._state.options
        self._bundle, self._compute, self._is_stream = bundle, compute, is_stream
        self._is_light, self._params = is_light, params
        self._client = client_of(request, body)
        self._facts: dict[str, Any] = request.scope["qaflora"]  # for the log and the metrics
        self._facts["model"] = bundle.name
        if self._options.logs_prompts:
            self._facts["prompt"] = next(
                (body[name] for name in ("messages", "prompt", "input") if name in body), None
            )
        self._outlet: Outlet | None = None
        self._producer: asyncio.Task[None] | None = None
        self._is_expired = self._is_gone = self._is_started = False
        self._parts: deque[Part] = deque()
        self._arrival: asyncio.Future[None] | None = None  # of a part, while it is waited for
        self._since_s, self._is_sending = 0.0, False
        self._more: Headers = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        self._producer = asyncio.create_task(self._produce())
        watcher = asyncio.create_task(self._watch(receive))
        expiry = self._loop.call_later(self._options.timeout_s, self.expire)
        self._state.running.add(self)
        self._since_s = self._loop.time()
        try:
            async with asyncio.timeout(None) as patience:
                self._look_again(patience)
                await self._send_all(scope, receive, self._noted(send))
        except TimeoutError:  # the connection is closed, for the response is not whole
            log.info("gave up on a client that does not read")
        except asyncio.CancelledError:  # by a second signal, or where the time to end is over
            log.info("ended in the middle of an answer")
        finally:
            self._state.running.discard(self)
            expiry.cancel()
            self._look.cancel()
            self.stop()
            watcher.cancel()
            await asyncio.gather(self._producer, watcher, return_exceptions=True)

    # computing

    async def _produce(self) -> None:
        start = time.perf_counter()
        end: BaseException | None = None
        try:
            turns = self._bundle.turns
            async with (
                nullcontext() if self._is_light else turns.turn(self._client),
                self._shelf.engine(self._bundle) as engine,
            ):
                self._facts["wait_ms"] = 1e3 * (time.perf_counter() - start)
                put = partial(self._state.post.put, self._put)
                self._outlet = Outlet(put, self._facts)
                in_thread = asyncio.to_thread if self._is_light else self._state.in_thread
                await in_thread(self._compute, engine, self._outlet)
        except asyncio.CancelledError:
            end = CancelledError("The request was ended before it began.")
        except Exception as error:
            end = error
        self._put(end)

    def _put(self, part: Part) -> None:
        self._parts.append(part)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def stop(self) -> None:
        """End it within one step of the Engine, or at once where it still waits."""
        if self._outlet is not None:
            self._outlet.cancel.set()
        elif self._producer is not None:
            self._producer.cancel()

    def expire(self) -> None:
        """End it as one whose time is over."""
        self._is_expired = True
        self.stop()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self.stop()

    # sending

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (part := await self._next_part()) is not None:
            if isinstance(part, dict):
                self._more = part
            elif isinstance(part, BaseException):
                await self._send_failure(part, scope, receive, send)
                return
            elif self._is_stream:
                await self._send_part(part, send)
            else:
                whole = Response(part, headers=self._more, media_type="application/json")
                await whole(scope, receive, send)
        if self._is_stream:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next_part(self) -> Part:
        """What comes next; of a stream bytes that are there are joined."""
        if not self._parts:
            self._arrival = self._loop.create_future()
            await self._arrival
        part = self._parts.popleft()
        if isinstance(part, bytes) and self._is_stream:
            while self._parts and isinstance(following := self._parts[0], bytes):
                part += following
                self._parts.popleft()
        return part

    def _noted(self, send: Send) -> Send:
        """The same, noting when it is that a client begins to take something, and has taken it.

        A large part goes in pieces, so that who reads slowly is given as long for each.
        """

        async def send_noted(message: Message) -> None:
            self._since_s, self._is_sending = self._loop.time(), True
            await send(message)
            self._is_sending = False

        async def send_pieces(message: Message) -> None:
            body, more = message.get("body", b""), message.get("more_body", False)
            while len(body) > PIECE_BYTES:
                await send_noted({**message, "body": body[:PIECE_BYTES], "more_body": True})
                body = body[PIECE_BYTES:]
                await asyncio.sleep(0)  # others are served, and it is heard who is gone
            await send_noted({**message, "body": body, "more_body": more} if body else message)

        return send_pieces

    def _look_again(self, patience: asyncio.Timeout) -> None:
        """Ping where a stream has nothing to say for long; give up who takes nothing for longer.

        One timer for all parts: one for each would cost as much as the part.
        """
        now_s = self._loop.time()
        if self._is_sending:
            if now_s >= self._since_s + SEND_S:
                patience.reschedule(now_s)
        elif self._is_stream and now_s >= self._since_s + PING_S:
            self._put(PING)
        next_s = self._since_s + PING_S
        at_s = next_s if next_s > now_s else now_s + min(PING_S, SEND_S)
        self._look = self._loop.call_at(at_s, self._look_again, patience)

    async def _send_part(self, part: bytes, send: Send) -> None:
        if not self._is_started:
            self._is_started = True
            pairs = {**STREAM_HEADERS, **self._more}.items()
            raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _send_failure(
        self, error: BaseException, scope: Scope, receive: Receive, send: Send
    ) -> None:
        refused = refusal(error, is_expired=self._is_expired, params=self._params)
        if refused.status == 500:
            log.error("a request failed", exc_info=error)
        if self._is_started:
            await self._send_part(event(refused.body), send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not self._is_gone:
            await refused_response(refused)(scope, receive, send)


def refused_response(refused: Refusal) -> Response:
    """A refusal as a whole response."""
    return JSONResponse(refused.body, refused.status, refused.headers)


def client_of(request: Request, body: Mapping[str, Any]) -> Client:
    """Whose request it is, for fairness among those who wait: OpenAI's `user` at an address."""
    host = request.client.host if request.client else ""
    user = body.get("user") or body.get("safety_identifier")
    return Client(host, user[:64] if isinstance(user, str) else "")
