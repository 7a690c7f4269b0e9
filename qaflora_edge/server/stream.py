"""A request that computes: it waits for a slot, computes in a thread, and is sent as it comes."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError, WorkerError
from qaflora_edge.server.requests import Body, refusal
from qaflora_edge.server.served_models import ServedModel

log = logging.getLogger(__name__)
PING_S = 5.0  # a stream without news sends a comment after as long
SEND_S = 60.0  # the longest that a client may take to read what was sent
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx passes events on as they come
}
Headers = dict[str, str]
Part = Headers | bytes | BaseException | None  # None is the end


def encoded(value: Any) -> bytes:
    """Encode JSON in UTF-8; half of a surrogate pair, which a model may write, is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii")


def event(value: Any, name: str = "") -> bytes:
    """Encode one event of a stream."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encoded(value) + b"\n\n"


class Outlet:
    """The way from a thread that computes to its request.

    send    hands on a part of the answer: headers, then bytes
    cancel  set when the answer is no longer wanted
    facts   for the log and the metrics
    """

    def __init__(self, send: Callable[[Headers | bytes], object], facts: dict[str, Any]) -> None:
        self.send, self.facts, self.cancel = send, facts, threading.Event()


Compute = Callable[[Engine, Outlet], None]


class Computed(Response):
    """An answer that is computed: events where the body has `stream`, else one JSON text.

    is_light  it takes no step of the Engine, and does not wait for a slot of answers
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        body: Body,
        compute: Compute,
        *,
        is_light: bool = False,
    ) -> None:
        self._state = request.app.state
        self._address = request.client.host if request.client else ""
        self._model, self._body, self._compute = model, body, compute
        self._is_stream = bool(getattr(body, "stream", False))
        self._slots = self._state.models.light_slots if is_light else model.slots
        self._facts: dict[str, Any] = request.scope["qaflora"]  # for the log and the metrics
        self._facts["model"] = model.name
        self._outlet: Outlet | None = None
        self._is_expired = self._is_gone = self._is_started = False
        self._more: Headers = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Part] = asyncio.Queue()
        self._producer = asyncio.create_task(self._produce())
        watcher = asyncio.create_task(self._watch(receive))
        expiry = self._loop.call_later(self._state.options.timeout_s, self.expire)
        self._state.running.add(self)
        try:
            await self._send_all(scope, receive, send)
        except TimeoutError:  # the connection is closed, for the response is not whole
            log.info("gave up on a client that does not read")
        except asyncio.CancelledError:  # by a second signal, or where the time to end is over
            log.info("ended in the middle of an answer")
        finally:
            self._state.running.discard(self)
            expiry.cancel()
            self.stop()
            watcher.cancel()
            await asyncio.gather(self._producer, watcher, return_exceptions=True)

    async def _produce(self) -> None:
        """Wait for a slot and an Engine, and compute."""
        start = time.perf_counter()
        end: BaseException | None = None
        models = self._state.models
        try:
            slot = models.queue.slot(self._slots, self._address)
            async with slot, models.engine(self._model) as engine:
                self._facts["wait_ms"] = 1e3 * (time.perf_counter() - start)
                self._outlet = Outlet(self._put_from_thread, self._facts)
                await self._state.in_thread(self._compute, engine, self._outlet)
        except asyncio.CancelledError:
            end = CancelledError("The request was ended before it began.")
        except Exception as error:
            end = error
        self._parts.put_nowait(end)

    def _put_from_thread(self, part: Headers | bytes) -> None:
        self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    def stop(self) -> None:
        """End it within one step of the Engine, or at once where it still waits."""
        if self._outlet is not None:
            self._outlet.cancel.set()
        else:
            self._producer.cancel()

    def expire(self) -> None:
        """End it as one that has used up its time."""
        self._is_expired = True
        self.stop()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self.stop()

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
            await self._send_part(b"", send, is_last=True)

    async def _next_part(self) -> Part:
        """Return what comes next; in a stream a ping where that takes long."""
        if not self._is_stream or not self._parts.empty():
            return await self._parts.get()
        try:
            async with asyncio.timeout(PING_S):
                return await self._parts.get()
        except TimeoutError:
            return PING

    async def _send_part(self, part: bytes, send: Send, *, is_last: bool = False) -> None:
        async with asyncio.timeout(SEND_S):
            if not self._is_started:
                self._is_started = True
                pairs = {**STREAM_HEADERS, **self._more}.items()
                raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
                await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": part, "more_body": not is_last})

    async def _send_failure(
        self, error: BaseException, scope: Scope, receive: Receive, send: Send
    ) -> None:
        refused = refusal(error, self._body, is_expired=self._is_expired)
        if refused.status == 500:
            log.error("a request failed", exc_info=error)
        if isinstance(error, WorkerError):
            self._state.on_lost(error)
        if self._is_started:
            await self._send_part(event(refused.body), send)
            await self._send_part(b"", send, is_last=True)
        elif not self._is_gone:
            await refused.response()(scope, receive, send)
