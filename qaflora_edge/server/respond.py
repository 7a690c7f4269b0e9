"""A response that is computed: it waits for a slot, computes in a thread, and is sent as it comes.

How a stream is written is a Wire; a dialect says which.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.server.receive import address_of
from qaflora_edge.server.refusals import Refusal, refusal
from qaflora_edge.server.served_models import ServedModel

log = logging.getLogger(__name__)
PING_S = 5.0  # a stream without news sends a comment after as long
SEND_S = 60.0  # the longest that a client may take to read what was sent
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


@dataclass(frozen=True)
class Wire:
    """Say how a dialect writes.

    media  of a stream
    part   writes one of its parts, which may have a name
    ping   keeps a silent one alive
    done   ends one that went well
    whole  writes an answer without a stream
    """

    media: str
    part: Callable[[Any, str], bytes]
    ping: bytes = b""
    done: bytes = b""
    whole: Callable[[Any], bytes] = encoded


def _event(value: Any, name: str) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encoded(value) + b"\n\n"


def _line(value: Any, name: str = "") -> bytes:
    return encoded(value) + b"\n"


_EVENTS = "text/event-stream; charset=utf-8"
EVENTS = Wire(_EVENTS, _event, ping=b": ping\n\n")
CHUNKS = replace(EVENTS, done=b"data: [DONE]\n\n")
LINES = Wire("application/x-ndjson", _line, whole=_line)  # Ollama's


class Computed:
    """Answer a request: a stream where the body has `stream`, else one JSON text.

    compute   called in a thread; it sets `headers`, then hands on the answer by `send`
    is_light  it takes no step of the Engine, and does not wait for a slot of answers
    body      the request's
    facts     for the log and the metrics
    cancel    set when the answer is no longer wanted
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        body: Any,
        compute: Callable[[Engine, "Computed"], None],
        *,
        is_light: bool = False,
        wire: Wire = EVENTS,
    ) -> None:
        self._state = request.app.state
        self._path = request.url.path
        self._wire = wire
        self._address = address_of(request)
        self._model = model
        self._compute = compute
        self.body = body
        self.is_stream = bool(getattr(body, "stream", False))
        self._slots = self._state.models.light_slots if is_light else model.slots
        self.facts: dict[str, Any] = request.scope["qaflora"]
        self.facts["model"] = model.name
        self.headers: dict[str, str] = {}
        self.cancel = threading.Event()
        self._is_expired = False  # its time was over
        self._is_gone = False  # the client is
        self._is_started = False  # its head is sent
        self._is_computing = False
        self._loop = asyncio.get_running_loop()
        self._parts = asyncio.Queue[Part]()

    def send(self, value: Any, name: str = "") -> None:
        """Hand on an answer, or a part of a stream, from the thread that computes."""
        self._hand_on(self._written(value, name))

    def end(self) -> None:
        """Say that a stream ends well."""
        if self.is_stream and self._wire.done:
            self._hand_on(self._wire.done)

    def _hand_on(self, part: bytes) -> None:
        self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    def _written(self, value: Any, name: str = "") -> bytes:
        return self._wire.part(value, name) if self.is_stream else self._wire.whole(value)

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
                await self._send_part(self._written(refused.body_for(self._path)), send)
                break
            await self._send_part(part, send)
        await self._send_part(b"", send, is_last=True)

    async def _next_part(self) -> Part:
        """Return what comes next; in a stream a ping where that takes long."""
        if not self.is_stream or not self._parts.empty():
            return await self._parts.get()
        try:
            async with asyncio.timeout(PING_S):
                return await self._parts.get()
        except TimeoutError:
            return self._wire.ping

    async def _send_part(self, part: bytes, send: Send, *, is_last: bool = False) -> None:
        async with asyncio.timeout(SEND_S):
            if not self._is_started:
                self._is_started = True
                raw = Headers({**self._own_headers(part), **self.headers}).raw
                await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": part, "more_body": not is_last})

    def _own_headers(self, part: bytes) -> dict[str, str]:
        if self.is_stream:
            return {**STREAM_HEADERS, "content-type": self._wire.media}
        return {"content-type": "application/json", "content-length": str(len(part))}

    def _refusal(self, error: BaseException) -> Refusal:
        refused = refusal(error, self.body, is_expired=self._is_expired)
        if refused.status == 500:
            log.error("a request failed", exc_info=error)
        return refused
