"""A request that computes: it waits for a slot, computes in a thread, and is sent as it comes."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.server.requests import Refusal, address_of, refusal
from qaflora_edge.server.served_models import ServedModel

log = logging.getLogger(__name__)
PING_S = 5.0  # a stream without news sends a comment after as long
SEND_S = 60.0  # the longest that a client may take to read what was sent
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx passes events on as they come
}
Part = bytes | BaseException | None  # None is the end


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


class Computed:
    """Answer a request: events where the body has `stream`, else one JSON text.

    media, ping, framed  how a stream is written
    compute   called in a thread; it sets `headers`, then hands on the answer by `send`
    is_light  it takes no step of the Engine, and does not wait for a slot of answers
    body      the request's
    facts     for the log and the metrics
    cancel    set when the answer is no longer wanted
    """

    media, ping = "text/event-stream; charset=utf-8", b": ping\n\n"

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        body: Any,
        compute: Callable[[Engine, "Computed"], None],
        *,
        is_light: bool = False,
    ) -> None:
        self._state = request.app.state
        self._address = address_of(request)
        self._model, self._compute, self.body = model, compute, body
        self._is_stream = bool(getattr(body, "stream", False))
        self._slots = self._state.models.light_slots if is_light else model.slots
        self.facts: dict[str, Any] = request.scope["qaflora"]
        self.facts["model"] = model.name
        self.headers: dict[str, str] = {}
        self.cancel = threading.Event()
        self._is_expired = self._is_gone = self._is_started = self._is_computing = False
        self._loop, self._parts = asyncio.get_running_loop(), asyncio.Queue[Part]()

    def send(self, part: bytes) -> None:
        """Hand on a part of the answer, from the thread that computes."""
        self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    def framed(self, value: Any) -> bytes:
        """Encode a part of the answer: an event of a stream, or all of it."""
        return event(value) if self._is_stream else encoded(value)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        self._producer = asyncio.create_task(self._produce())
        watcher = asyncio.create_task(self._watch(receive))
        expiry = self._loop.call_later(self._state.options.timeout_s, self.expire)
        self._state.running.add(self)
        try:
            await self._send_all(send)
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
                self.facts["wait_ms"] = 1e3 * (time.perf_counter() - start)
                self._is_computing = True
                await asyncio.to_thread(self._compute, engine, self)
        except asyncio.CancelledError:
            end = CancelledError("The request was ended before it began.")
        except Exception as error:
            end = error
        self._parts.put_nowait(end)

    def stop(self) -> None:
        """End it within one step of the Engine, or at once where it still waits."""
        self.cancel.set()
        if not self._is_computing:
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

    async def _send_all(self, send: Send) -> None:
        while (part := await self._next_part()) is not None:
            if isinstance(part, BaseException):
                refused = self._refusal(part)
                if self._is_gone:
                    return
                if not self._is_started:
                    raise refused
                await self._send_part(self.framed(refused.body), send)
                break
            await self._send_part(part, send)
        await self._send_part(b"", send, is_last=True)

    async def _next_part(self) -> Part:
        """Return what comes next; in a stream a ping where that takes long."""
        if not self._is_stream or not self._parts.empty():
            return await self._parts.get()
        try:
            async with asyncio.timeout(PING_S):
                return await self._parts.get()
        except TimeoutError:
            return self.ping

    async def _send_part(self, part: bytes, send: Send, *, is_last: bool = False) -> None:
        async with asyncio.timeout(SEND_S):
            if not self._is_started:
                self._is_started = True
                whole = {"content-type": "application/json", "content-length": str(len(part))}
                own = {**STREAM_HEADERS, "content-type": self.media} if self._is_stream else whole
                raw = Headers({**own, **self.headers}).raw
                await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": part, "more_body": not is_last})

    def _refusal(self, error: BaseException) -> Refusal:
        refused = refusal(error, self.body, is_expired=self._is_expired)
        if refused.status == 500:
            log.error("a request failed", exc_info=error)
        return refused
