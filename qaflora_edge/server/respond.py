"""A response that is computed: it waits for a slot, computes in a thread, and is sent as it comes.

What is sent, and how, a Dialect says.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask
from qaflora_edge.dialects.dialect import EVENTS, Dialect, Extras, Reply, Wire
from qaflora_edge.dialects.options import wants_thoughts
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.formats.inputs import Json
from qaflora_edge.inference.sequence import CallEvent
from qaflora_edge.server.receive import Call, address_of, read_call
from qaflora_edge.server.refusals import Refusal, refusal
from qaflora_edge.server.served_models import models_of
from qaflora_edge.weighing.plan import FusionWeights

log = logging.getLogger(__name__)
LIGHT_S = 10.0  # the longest that what takes no step of an Engine is computed
LEAST_LEFT_S = 0.01  # of a call's time that a timer waits for
PING_S = 5.0  # a stream without news sends a comment after as long
STREAM_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx passes events on as they come
}
Part = bytes | BaseException | None  # None is the end


class State(Enum):
    """Say where a response is; the last two end it."""

    WAITING = "for a slot"
    COMPUTING = "in a thread"
    EXPIRED = "its time was over"
    GONE = "the client is"


Compute = Callable[[Engine, "Computed"], None]


class Computed:
    """Answer a call: a stream where the body has `stream`, else one JSON text.

    compute   called in a thread; it sets `headers`, then hands on the answer by `send`
    is_light  it takes no step of the Engine, and does not wait for a slot of answers; it ends
              within LIGHT_S
    facts     for the log and the metrics
    cancel    set when the answer is no longer wanted
    """

    def __init__(
        self, call: Call[Any], compute: Compute, *, is_light: bool = False, wire: Wire = EVENTS
    ) -> None:
        self._call = call
        self._app = call.request.app.state
        self._compute = compute
        self._wire = wire
        self._is_stream = call.body.is_stream
        self._is_light = is_light
        self._slots = self._app.models.light_slots if is_light else call.served.slots
        self._state = State.WAITING
        self.facts: Json = call.request.scope["qaflora"]
        self.facts["model"] = call.served.name
        self.headers: dict[str, str] = {}
        self.cancel = CallEvent()
        self._expiry: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._parts = asyncio.Queue[Part]()

    def send(self, value: Any) -> None:
        """Hand on an answer, or a part of a stream, from the thread that computes."""
        self._hand_on(self._written(value))

    def end(self) -> None:
        if self._is_stream and self._wire.done:
            self._hand_on(self._wire.done)

    def _hand_on(self, part: bytes) -> None:
        self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    def _written(self, value: Any) -> bytes:
        write = self._wire.part if self._is_stream else self._wire.whole
        return write(value)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        self._expire_in(self._app.options.timeout_s)
        self._producer = asyncio.create_task(self._produce())
        watcher = asyncio.create_task(self._watch(receive))
        self._app.running.add(self)
        try:
            await self._send_all(send)
        except asyncio.CancelledError:  # by a second signal, or where the time to end is over
            log.info("ended in the middle of an answer")
        finally:
            self._app.running.discard(self)
            if self._expiry is not None:
                self._expiry.cancel()
            self.stop()
            watcher.cancel()
            await asyncio.gather(self._producer, watcher, return_exceptions=True)

    def _expire_in(self, seconds: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = self._loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        """End it, unless time is left because the Engine computed for others meanwhile."""
        left_s = 0.0
        if self._state is State.COMPUTING and not self._is_light:
            left_s = self._app.options.timeout_s - self.cancel.computed_s
        if left_s > LEAST_LEFT_S:
            self._expire_in(left_s)
        else:
            self.stop(State.EXPIRED)

    async def _produce(self) -> None:
        start = time.perf_counter()
        end: BaseException | None = None
        models = self._app.models
        try:
            slot = models.queue.slot(self._slots, address_of(self._call.request))
            async with slot, models.engine(self._call.served) as engine:
                self.facts["wait_ms"] = 1e3 * (time.perf_counter() - start)
                self._state = State.COMPUTING
                self._expire_in(LIGHT_S if self._is_light else self._app.options.timeout_s)
                await asyncio.to_thread(self._compute, engine, self)
        except asyncio.CancelledError:
            end = CancelledError("The request was ended before it began.")
        except Exception as error:
            end = error
        self._parts.put_nowait(end)

    def stop(self, why: State | None = None) -> None:
        """End it within one step of the Engine, or at once where it still waits."""
        self.cancel.set()
        if self._state is State.WAITING:
            self._producer.cancel()
        self._state = why or self._state

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stop(State.GONE)

    async def _send_all(self, send: Send) -> None:
        part = await self._next_part()
        is_begun = False
        while isinstance(part, bytes):
            if not is_begun:
                is_begun = True
                await self._send_head(part, send)
            await _send_part(part, send)
            part = await self._next_part()
        if isinstance(part, BaseException):
            refused = self._refusal(part)
            if self._state is State.GONE:
                return
            if not is_begun:
                raise refused
            body = refused.body_for(self._call.request.url.path)
            await _send_part(self._written(body), send)
        await _send_part(b"", send, is_last=True)

    async def _next_part(self) -> Part:
        """Return what comes next; in a stream a ping where that takes long."""
        if not self._is_stream or not self._parts.empty():
            return await self._parts.get()
        try:
            async with asyncio.timeout(PING_S):
                return await self._parts.get()
        except TimeoutError:
            return self._wire.ping

    async def _send_head(self, first: bytes, send: Send) -> None:
        fields = {"content-type": "application/json"}
        if self._is_stream:
            fields["content-type"] = self._wire.media
            fields |= STREAM_HEADERS
        else:
            fields["content-length"] = str(len(first))
        fields |= self.headers
        raw = Headers(fields).raw
        head = {"type": "http.response.start", "status": 200, "headers": raw}
        await send(head)

    def _refusal(self, error: BaseException) -> Refusal:
        is_expired = self._state is State.EXPIRED
        refused = refusal(error, self._call.body, is_expired=is_expired)
        if refused.status == 500:
            log.error("a request failed", exc_info=error)
        return refused


async def _send_part(part: bytes, send: Send, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": not is_last})


def extras_of(call: Call[Any]) -> Extras:
    """Say what answers to a call tell besides."""
    body = call.body
    returned = body.fusion.returned if body.fusion else None
    return Extras(returned or "summary", wants_thoughts(body.effort))


def speaking(dialect: Dialect) -> Callable[[Request], Awaitable[Computed | Response]]:
    """Make the route of a dialect."""

    async def answer(request: Request) -> Computed | Response:
        call = await read_call(request, dialect.body)
        asks = dialect.asks(call.body, call.defaults)
        reply = Reply(call.body, call.model, asks, extras_of(call), request.scope["qaflora"])
        if not asks and call.body.is_unload:
            models_of(request).close_idle(call.served)
            return JSONResponse(dialect.whole(reply, iter(())))
        return answered(call, dialect, reply)

    answer.__doc__ = dialect.summary
    return answer


def answered(call: Call[Any], dialect: Dialect, reply: Reply) -> Computed:
    """Answer what is asked; nothing asked takes no step of the Engine."""
    is_stream = call.body.is_stream

    def compute(engine: Engine, out: Computed) -> None:
        asks = [replace(ask, cancel=out.cancel) for ask in reply.asks]
        is_told = is_stream and len(asks) == 1
        if is_told and dialect.progress is not None and call.body.return_progress:
            teller = _Progress(partial(dialect.progress, reply), out)
            asks = [replace(asks[0], on_progress=teller.tell, on_draft=teller.expected)]
        with contextlib.closing(_noted(engine, asks, out, reply.extras)) as answers:
            if is_stream:
                for piece in dialect.pieces(reply, answers):
                    out.send(piece)
                out.end()
            else:
                out.send(dialect.whole(reply, answers))

    return Computed(call, compute, is_light=not reply.asks, wire=dialect.wire)


def _noted(
    engine: Engine, asks: Iterable[Ask], out: Computed, extras: Extras
) -> Generator[Generation]:
    """Yield all answers; note the mix of the first, and the tokens of each when it is over."""
    for ask in asks:
        n_begun = 0
        for answer in engine.submit_all(ask):
            if "strategy" not in out.facts:
                note_mix(answer.fusion, out, extras)
            try:
                yield answer
            finally:
                _note_tokens(out.facts, answer, is_first=n_begun == 0)
            n_begun += 1
        if n_begun < ask.n:
            raise CancelledError("The request was ended before all of its answers began.")


def note_mix(fusion: FusionWeights, out: Computed, extras: Extras) -> None:
    """Note a mix for the log and the header X-Fusion."""
    out.facts["strategy"] = fusion.strategy
    out.facts["probe_ms"] = fusion.probe_ms
    if fusion.means and extras.returned != "none":
        shown = (f"{name}={mean:.2f}" for name, mean in fusion.means.items())
        out.headers["X-Fusion"] = ",".join(shown)


def _note_tokens(facts: Json, answer: Generation, *, is_first: bool) -> None:
    """Count tokens for the log and the metrics; answers share the prompt and a relay's draft."""
    facts.setdefault("prompt_tokens", 0)
    facts.setdefault("completion_tokens", 0)
    facts["completion_tokens"] += answer.n_completion
    if is_first:
        facts["prompt_tokens"] += answer.n_prompt
        facts["completion_tokens"] += answer.n_draft
    if answer.timings.token_s:
        first_s = answer.timings.token_s[0]
        facts.setdefault("first_ms", 1e3 * (first_s - facts["start_s"]))


class _Progress:
    """Tell how far a prompt is, each step once, and the answer that is expected.

    Its fields are those of llama-server; `expected` is the answer so far, of which nothing is
    decided yet.
    """

    def __init__(self, make: Callable[[Json], Any], out: Computed) -> None:
        self._make = make
        self._out = out
        self._start_s = time.perf_counter()
        self._done = set[tuple[str, int]]()

    def tell(self, stage: str, n_done: int, n_token: int) -> None:
        if (stage, n_done) not in self._done:
            self._done.add((stage, n_done))
            self._send(stage, n_done, n_token, None)

    def expected(self, text: str) -> None:
        self._send("drafting", 0, 1, text)

    def _send(self, stage: str, n_done: int, n_token: int, expected: str | None) -> None:
        seconds = time.perf_counter() - self._start_s
        progress: Json = {
            "stage": stage,
            "total": n_token,
            "processed": n_done,
            "time_ms": round(1e3 * seconds, 3),
        }
        if expected is not None:
            progress["expected"] = expected
        self._out.send(self._make(progress))
