"""The bundles that a server has: what they are called, and the Engines of those in use."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qaflora_edge.bundles.open import is_base, read_bundle_text
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BundleError, BusyError, QafloraError
from qaflora_edge.formats.bundle import NAME_PATTERN, NAME_RULE, BundleText
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.server import memory
from qaflora_edge.server.options import ServerOptions
from qaflora_edge.server.refusals import Refusal, unavailable
from qaflora_edge.server.turns import Room, Turns
from qaflora_edge.weighing.weigher import Known, Weigher

log = logging.getLogger(__name__)
T = TypeVar("T")
InThread = Callable[..., Any]


@dataclass
class Shelved:
    """One bundle, opened or not.

    name        how clients call it
    strategies  that it can follow, as in NAME:STRATEGY
    sha256      of the base's file, and of each adapter's by its name; empty for a base alone
    engine      None while it is not loaded
    opening     the task that loads it now; it goes on when who asked gives up
    has_failed  it could not be opened when it was last asked for
    n_user      requests that use the Engine now
    """

    name: str
    place: Path
    adapters: tuple[str, ...]
    n_layer: int
    strategy: str
    strategies: tuple[str, ...]
    turns: Turns
    sha256: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    opening: asyncio.Task[None] | None = None
    has_failed: bool = False
    n_user: int = 0
    used_s: float = 0.0
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def ids(self) -> list[str]:
        return [self.name, *(f"{self.name}:{strategy}" for strategy in self.strategies)]


class Shelf:
    """Bundles by name; each is opened when it is first asked for.

    options    engine (keywords of every Engine) and max_queue are of use here
    in_thread  runs a function that takes long: an awaitable of what it returns

    Raises BundleError for a bundle that cannot be read, or a name that is given twice.
    """

    def __init__(self, places: Iterable[Path], options: ServerOptions, in_thread: InThread) -> None:
        self._engine, self._in_thread = dict(options.engine), in_thread
        self._n_turn = options.n_turn
        self._loading = asyncio.Lock()
        self.room = Room(options.max_queue)
        self.bundles: dict[str, Shelved] = {}
        for place in places:
            bundle = self._read(place)
            if bundle.name in self.bundles:
                raise BundleError(
                    f"Cannot serve {place}: its name {bundle.name} is that of "
                    f"{self.bundles[bundle.name].place} too, expected different names. Change "
                    "`name` in the bundle.json of one."
                )
            self.bundles[bundle.name] = bundle

    def _read(self, place: Path) -> Shelved:
        """What a bundle says of itself; nothing is loaded."""
        if is_base(place):
            name, text, targets = place.stem, None, dict[str, Sequence[str]]()
            n_layer, known = read_gguf_header(place).n_layer, Known()
        else:
            text = read_bundle_text(place)
            name = text.name if NAME_PATTERN.fullmatch(text.name or "") else place.resolve().name
            targets = {adapter.name: adapter.targets for adapter in text.adapters}
            n_layer, known = text.base.n_layer, text.known
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(
                f"Cannot serve {place}: its name is {name!r}, expected {NAME_RULE}. Correct `name` "
                "in bundle.json, or rename the folder or file."
            )
        chosen = {key: self._engine.get(key) for key in ("strategy", "lens", "pool")}
        weigher = Weigher(tuple(targets), n_layer, known.under(**chosen), targets=targets)
        return Shelved(
            name=name,
            place=place,
            adapters=tuple(targets),
            n_layer=n_layer,
            strategy=weigher.known.strategy,
            strategies=weigher.followed,
            sha256={} if text is None else _hashes(text),
            turns=Turns(self._n_turn, self.room),
        )

    # names

    def find(self, model: Any) -> tuple[Shelved, str | None]:
        """The bundle of a model id, and the strategy that the id names.

        Raises Refusal for an id that is not listed. Without one, the only bundle is meant.
        """
        if model is None and len(self.bundles) == 1:
            return next(iter(self.bundles.values())), None
        if isinstance(model, str):
            name, colon, strategy = model.partition(":")
            bundle = self.bundles.get(name)
            if bundle is not None and (not colon or strategy in bundle.strategies):
                return bundle, strategy if colon else None
        shown = f"{model!r:.100}" if model is not None else "missing"
        raise Refusal(
            404 if isinstance(model, str) else 400,
            f"The model is {shown}, expected one of those that GET /v1/models lists.",
            param="model",
            code="model_not_found",
        )

    def listed(self) -> list[dict[str, Any]]:
        """Every model id in the shape of OpenAI's list."""
        return [
            self.card(bundle, model) for bundle in self.bundles.values() for model in bundle.ids
        ]

    def card(self, bundle: Shelved, model: str) -> dict[str, Any]:
        """One model id in OpenAI's shape, and `meta`, what it is here."""
        return {
            "id": model,
            "object": "model",
            "created": bundle.created_s,
            "owned_by": "qaflora",
            "meta": {
                "adapters": list(bundle.adapters),
                "n_layer": bundle.n_layer,
                "n_ctx": self._engine["n_ctx"],
                "strategy": model.partition(":")[2] or bundle.strategy,
                "loaded": bundle.engine is not None,
                "failed": bundle.has_failed,
            },
        }

    def whole_card(self, bundle: Shelved, model: str) -> dict[str, Any]:
        """The same with what tells one bundle from another, and of its base once it is loaded."""
        card = self.card(bundle, model)
        card["meta"]["sha256"] = bundle.sha256
        if bundle.engine is not None:
            card["meta"] |= {"base": bundle.engine.name, "n_ctx_train": bundle.engine.n_ctx_train}
        return card

    # Engines

    @asynccontextmanager
    async def engine(self, bundle: Shelved) -> AsyncIterator[Engine]:
        """The Engine of a bundle, opened where it is not; it stays open meanwhile.

        Raises Refusal when it cannot be opened.
        """
        bundle.n_user += 1
        bundle.used_s = time.monotonic()
        try:
            if bundle.engine is None:
                bundle.opening = bundle.opening or asyncio.create_task(self._load(bundle))
                await asyncio.shield(bundle.opening)
            assert bundle.engine is not None
            yield bundle.engine
        finally:
            bundle.n_user -= 1
            bundle.used_s = time.monotonic()

    async def _load(self, bundle: Shelved) -> None:
        try:
            async with self._loading:
                await self._make_room(bundle)
                bundle.engine = await self._open(bundle)
        finally:
            bundle.opening = None

    async def _make_room(self, bundle: Shelved) -> None:
        """Close the bundles that were not used for the longest while memory is short."""
        while not await self._in_thread(self._has_room, bundle):
            idle = [each for each in self.bundles.values() if each.engine and not each.n_user]
            if not idle:
                log.warning("memory is short for %s, and no other bundle is idle", bundle.name)
                return
            oldest = min(idle, key=lambda each: each.used_s)
            engine, oldest.engine = oldest.engine, None
            assert engine is not None
            await self._in_thread(engine.close)
            log.info("closed %s, to make room for %s", oldest.name, bundle.name)

    def _has_room(self, bundle: Shelved) -> bool:
        """Whether another bundle fits beside those that are open, whose bases stay mapped."""
        opened = {memory.base_id(each.place) for each in self.bundles.values() if each.engine}
        mapped = sum(size for _, size in opened)
        room = memory.available_bytes() - mapped
        return memory.needed_bytes(bundle.place, self._engine) <= room

    async def _open(self, bundle: Shelved) -> Engine:
        start = time.perf_counter()
        bundle.has_failed = False
        try:
            engine: Engine = await self._in_thread(_opened, bundle.place, self._engine)
        except Exception as error:
            bundle.has_failed = True
            log.error("cannot open %s: %s", bundle.name, error)
            if not isinstance(error, QafloraError):
                raise
            raise unavailable(
                f"The model {bundle.name} cannot be opened; the server's log says why.",
                "model_unavailable",
            ) from error
        log.info("opened %s in %.1f s", bundle.name, time.perf_counter() - start)
        return engine

    async def close(self) -> None:
        """Close every Engine, also those that are being opened; calls that go on end."""
        opening = [each.opening for each in self.bundles.values() if each.opening]
        await asyncio.gather(*opening, return_exceptions=True)
        for bundle in self.bundles.values():
            engine, bundle.engine = bundle.engine, None
            if engine is not None:
                await self._in_thread(engine.close)


def _opened(place: Path, options: Mapping[str, Any]) -> Engine:
    """An Engine, and a thread that computes for it."""
    engine = Engine(place, **options)
    name = f"qaflora-{place.name}"
    # A daemon: where a second signal ends the process while this opens, nobody closes the Engine.
    threading.Thread(target=_compute, args=(engine,), name=name, daemon=True).start()
    return engine


def _compute(engine: Engine) -> None:
    """Compute what requests ask of an Engine until it is closed."""
    while True:
        try:
            engine.run_forever()
        except BusyError:
            return
        except Exception:
            log.exception("a step failed")


def _hashes(text: BundleText) -> dict[str, Any]:
    adapters = {adapter.name: adapter.sha256 for adapter in text.adapters}
    return {"base": text.base.sha256, "adapters": adapters}
