"""The bundles that a server has: their names, their Engines, and the queue before them."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from qaflora_edge.ask import Sampling
from qaflora_edge.bundles.open import unmeasured
from qaflora_edge.config import in_group
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BundleError, BusyError, QafloraError
from qaflora_edge.formats.bundle import NAME_PATTERN, NAME_RULE, is_base, read_bundle_text
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.security import share_of
from qaflora_edge.weighing.strategy import find_strategy
from qaflora_edge.weighing.weigher import Weigher, WeighingFacts, known_of

log = logging.getLogger(__name__)
N_LIGHT = 2  # requests that take no step of an Engine, computed at once


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Say how a server answers; see `qaflora serve --help-all`.

    cors_origins  pages that may ask as our own does; "*" is all
    hosts         names that requests may call the server by, None: any
    adapters      folder of adapters that may be added, resolved; None: adapters cannot change
    takes_teaching  whether who asks may teach the choice
    engine        keywords of every Engine
    sampling      how tokens are chosen where a request says nothing
    chosen        keys of options that the command chose, before what a bundle says
    """

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    max_queue: int = 64
    max_models: int | None = None
    timeout_s: float = 600.0
    ttl_s: float | None = None
    adapters: Path | None = None
    takes_teaching: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    chosen: frozenset[str] = frozenset()

    @property
    def n_slot(self) -> int:
        """Count the requests of a bundle that are answered at once.

        One more than are decoded together: it is weighed at the same time.
        """
        n_parallel = int(self.engine.get("n_parallel", 1))
        return n_parallel + 1 if n_parallel > 1 else 1


class Queue:
    """Let requests wait in the order that they come.

    n_most   requests that may wait, whatever they wait for
    waiting  how many wait, by address
    """

    def __init__(self, n_most: int) -> None:
        self.n_most = n_most
        self.waiting = Counter[str]()

    @asynccontextmanager
    async def slot(self, slots: asyncio.Semaphore, address: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it.

        Raises Refusal when the queue is full, or a quarter of it is taken by this address;
        programs of this machine may take all of it.
        """
        if slots.locked():
            share = share_of(self.n_most, address)
            if self.waiting.total() >= self.n_most or self.waiting[address] >= share:
                message = f"The server is busy: {self.waiting.total()} requests wait already; "
                raise Refusal(503, f"{message}try again later.", code="queue_full")
        self.waiting[address] += 1
        try:
            await slots.acquire()
        finally:
            self.waiting -= Counter([address])  # an address that has none is forgotten
        try:
            yield
        finally:
            slots.release()


@dataclass
class ServedModel:
    """Hold one bundle, opened or not.

    weigher     knows its adapters and defaults
    strategies  that it can follow, as in NAME:STRATEGY
    sha256      of the base's file, and of each adapter's by its name; empty for a base alone
    n_byte      of the base's file and the adapters'
    about       what its adapters are for, questions that the page suggests, and a note on it
    engine      None while it is not loaded; `worker` computes for it
    opening     the task that loads it now; it goes on when the caller gives up
    closing     the one that closed it last
    expiry      closes it where nobody uses it until then
    n_user      requests that use the Engine now
    is_changed  its adapters were: it stays open, for its folder has others
    """

    name: str
    place: Path
    weigher: Weigher
    strategies: tuple[str, ...]
    slots: asyncio.Semaphore
    sha256: Object = field(default_factory=dict)
    family: str = ""
    n_byte: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    about: Object = field(default_factory=dict)
    engine: Engine | None = None
    worker: threading.Thread | None = None
    opening: asyncio.Task[None] | None = None
    closing: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None
    has_failed: bool = False
    n_user: int = 0
    is_changed: bool = False
    used_s: float = 0.0
    created_s: int = field(default_factory=lambda: int(time.time()))

    def can_follow(self, strategy: str) -> bool:
        """Tell whether NAME:STRATEGY is a model: of those that are listed, or a baseline."""
        named = find_strategy(strategy)
        if strategy in self.strategies or named is None or not named.is_baseline:
            return strategy in self.strategies
        with suppress(QafloraError):
            self.weigher.parse(strategy)
            return True
        return False

    @property
    def is_idle(self) -> bool:
        """Tell whether its Engine may be closed."""
        return not self.n_user and not self.is_changed

    @property
    def is_lost(self) -> bool:
        """Tell whether no request can be answered: it cannot be opened, or nothing computes."""
        is_stopped = self.worker is not None and not self.worker.is_alive()
        return self.has_failed or (self.engine is not None and is_stopped)


class ServedModels:
    """Find bundles by name, and open each when it is first asked for."""

    def __init__(self, places: Iterable[Path], options: ServerOptions) -> None:
        self._options = options
        self._loading = asyncio.Lock()
        self.queue = Queue(options.max_queue)
        self.light_slots = asyncio.Semaphore(N_LIGHT)
        self.by_name: dict[str, ServedModel] = {}
        for place in places:
            model = self._read(place)
            if model.name in self.by_name:
                raise BundleError(
                    f"Cannot serve {place}: its name {model.name} is that of "
                    f"{self.by_name[model.name].place} too, expected different names. Change "
                    "`name` in the bundle.json of one."
                )
            self.by_name[model.name] = model

    def _read(self, place: Path) -> ServedModel:
        sha256 = {}
        targets: dict[str, Sequence[str]] = {}
        about = {}
        sampling = self._options.sampling
        if is_base(place):
            header = read_gguf_header(place)
            name = place.stem
            n_layer = header.n_layer
            known = WeighingFacts()
            family = header.architecture
            n_byte = place.stat().st_size
        else:
            text = read_bundle_text(place)
            name = text.name if NAME_PATTERN.fullmatch(text.name or "") else place.resolve().name
            targets = {adapter.name: adapter.targets for adapter in text.adapters}
            n_layer = text.base.n_layer
            known = known_of(text)
            sizes = (adapter.size_bytes or 0 for adapter in text.adapters)
            family = text.base.architecture
            n_byte = text.base.size_bytes + sum(sizes)
            hashes = {adapter.name: adapter.sha256 for adapter in text.adapters}
            sha256 = {"base": text.base.sha256, "adapters": hashes}
            descriptions = {adapter.name: adapter.description for adapter in text.adapters}
            about = {"descriptions": descriptions, "questions": list(text.questions)}
            if note := unmeasured(place, text):
                about["note"] = note
            options = in_group("sampling")
            of_bundle = {
                option: value
                for option, value in text.sampling.items()
                if options[option].key not in self._options.chosen
            }
            sampling = sampling.updated(of_bundle)
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(
                f"Cannot serve {place}: its name is {name!r}, expected {NAME_RULE}. Correct `name` "
                "in bundle.json, or rename the folder or file."
            )
        engine = self._options.engine
        chosen = {key: engine.get(key) for key in ("strategy", "lens", "pool")}
        weigher = Weigher(tuple(targets), n_layer, known.under(**chosen), targets=targets)
        return ServedModel(
            name=name,
            place=place,
            weigher=weigher,
            strategies=weigher.followed,
            slots=asyncio.Semaphore(self._options.n_slot),
            sha256=sha256,
            family=family,
            n_byte=n_byte,
            sampling=sampling,
            about=about,
        )

    def find(self, model: str | None) -> tuple[ServedModel, str | None]:
        """Return the bundle of a model id, and the strategy that the id names.

        Raises Refusal for an unknown id. Without one, the only bundle is meant.
        """
        if model is None and len(self.by_name) == 1:
            return next(iter(self.by_name.values())), None
        name, colon, strategy = (model or "").removesuffix(":latest").partition(":")
        served = self.by_name.get(name)
        if served is not None and (not colon or served.can_follow(strategy)):
            return served, strategy or None
        names = self.listed
        if served is not None:
            names = [name, *(f"{name}:{other}" for other in served.strategies)]
        if len(names) > 5:
            names[5:] = ["..."]
        status = 404
        what = repr(model)
        if model is None:
            status = 400
            what = "missing"
        message = f"The model is {what:.100}, expected one of {', '.join(names)}."
        raise Refusal(status, message, param="model", code="model_not_found")

    @property
    def listed(self) -> list[str]:
        """List ids for GET /v1/models: each bundle, and its base alone."""
        return [model_id for name in self.by_name for model_id in (name, f"{name}:base")]

    def card(self, name: str) -> Json:
        """Return a model id in OpenAI's shape; `meta` says what it is here."""
        model, strategy = self.find(name)
        engine = model.engine
        weigher = model.weigher
        meta: Json = {
            "adapters": list(weigher.adapters),
            "n_layer": weigher.n_layer,
            "n_ctx": self._options.engine.get("n_ctx"),
            "strategy": strategy or weigher.known.strategy,
            "strategies": list(model.strategies),
            "loaded": engine is not None,
            "failed": model.has_failed,
            "sha256": model.sha256,
            "takes_adapters": self._options.adapters is not None,
            "takes_teaching": self._options.takes_teaching,
        }
        meta |= model.about
        if engine is not None:
            meta["n_ctx"] = engine.n_ctx
            meta["base"] = engine.name
            meta["n_ctx_train"] = engine.n_ctx_train
        head = {"id": name, "object": "model", "created": model.created_s, "owned_by": "qaflora"}
        return head | {"meta": meta}

    @asynccontextmanager
    async def engine(self, model: ServedModel) -> AsyncIterator[Engine]:
        """Open the Engine of a bundle where it is not, and keep it open for the block.

        Raises Refusal when it cannot be opened.
        """
        model.n_user += 1
        try:
            if model.engine is None:
                model.opening = model.opening or asyncio.create_task(self._load(model))
                await asyncio.shield(model.opening)
            assert model.engine is not None
            yield model.engine
        finally:
            model.n_user -= 1
            model.used_s = time.monotonic()
            self._expire_later(model)

    def _expire_later(self, model: ServedModel) -> None:
        if model.expiry is not None:
            model.expiry.cancel()
        if self._options.ttl_s is not None and model.is_idle:
            loop = asyncio.get_running_loop()
            model.expiry = loop.call_later(self._options.ttl_s, self.close_idle, model)

    def close_idle(self, model: ServedModel) -> None:
        if model.engine is not None and model.is_idle:
            model.closing = asyncio.create_task(_close(model))
            log.info("closed %s: not in use", model.name)

    async def _load(self, model: ServedModel) -> None:
        start = time.perf_counter()
        model.has_failed = False
        try:
            async with self._loading:
                await self._close_unused()
                if model.closing is not None:
                    await model.closing
                engine = await asyncio.to_thread(Engine, model.place, **self._options.engine)
            thread = threading.Thread(target=_compute, args=(engine,), name=model.name, daemon=True)
            thread.start()
            model.engine = engine
            model.worker = thread
        except Exception as error:
            model.has_failed = True
            log.error("cannot open %s: %s", model.name, error)
            if not isinstance(error, QafloraError):
                raise
            message = f"The model {model.name} cannot be opened; the server's log says why."
            raise Refusal(503, message, code="model_unavailable") from error
        finally:
            model.opening = None
            self._expire_later(model)  # who asked may be gone
        log.info("opened %s in %.1f s", model.name, time.perf_counter() - start)

    async def _close_unused(self) -> None:
        """Close the bundle not used for the longest where max_models are open."""
        opened = [model for model in self.by_name.values() if model.engine]
        idle = [model for model in opened if model.is_idle]
        if self._options.max_models and len(opened) >= self._options.max_models and idle:
            oldest = min(idle, key=lambda model: model.used_s)
            await _close(oldest)
            log.info("closed %s: --max-models are open", oldest.name)

    async def close(self) -> None:
        """Close every Engine, also those that are being opened; calls that go on end."""
        tasks: list[asyncio.Task[None]] = []
        for model in self.by_name.values():
            tasks += filter(None, (model.opening, model.closing))
        await asyncio.gather(*tasks, return_exceptions=True)
        for model in self.by_name.values():
            if model.engine is not None:
                await _close(model)


def _close(model: ServedModel) -> Coroutine[Any, Any, None]:
    engine = model.engine
    assert engine is not None
    model.engine = None  # at once: a request that comes now opens another
    return asyncio.to_thread(engine.close)


def models_of(request: Request) -> ServedModels:
    models: ServedModels = request.app.state.models
    return models


def _compute(engine: Engine) -> None:
    while True:
        try:
            engine.run_forever()
        except BusyError:
            return
        except Exception:
            log.exception("a step failed")
