"""A bundle in memory: it is opened once, and its adapters come and go while calls run."""

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from qaflora_edge.backend.model import Model, shared_model
from qaflora_edge.bundles.open import Begin, BundleFiles, load_bundle
from qaflora_edge.errors import OptionError, QafloraError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.formats.inputs import checksum
from qaflora_edge.inference.core import Core
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.weigher import Weigher, not_loaded

if TYPE_CHECKING:
    from qaflora_edge.bundles.edit import OpenEngine
    from qaflora_edge.bundles.taught import Taught
    from qaflora_edge.formats.adapter import AdapterInfo
    from qaflora_edge.prompt.tokens import Reader
    from qaflora_edge.weighing.adapter_inputs import AttentionSizes


@dataclass(frozen=True)
class AdapterSet:
    """Hold a base with adapters in memory: what a call uses from its begin to its end.

    core     computes with them
    weigher  knows the adapters in use, and the defaults
    reader   turns what is asked into tokens
    seed     of sampled answers, when a call gives none
    """

    core: Core
    weigher: Weigher
    reader: "Reader"
    seed: int | None


class BundleMemory:
    """Keep a base and its adapters in memory.

    options  of every Core
    current  attribute: what calls use that begin now; those that have begun keep theirs
    files    attribute: facts of the files
    taught   attribute: examples of adapters
    """

    current: AdapterSet
    files: BundleFiles
    taught: "Taught"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._changing = threading.Lock()
        self._cores: list[weakref.ref[Core]] = []  # also those that answer their last requests

    def open(
        self,
        path: Path,
        adapters: Mapping[str, Path] | None,
        defaults: Mapping[str, str | None],
        *,
        reasoning: str,
        seed: int | None,
    ) -> None:
        """Open a bundle, or a base and adapters, as load_bundle takes them.

        defaults  strategy, lens, pool and prefill; None: the bundle's
        """

        def use(opened: BundleFiles) -> None:
            # A base alone chooses its strategy when it gets its first adapter.
            is_alone = opened.text is None and not opened.adapters
            self._chooses = defaults["strategy"] is None and is_alone
            weigher = Weigher(
                adapters=tuple(opened.adapters),
                n_layer=opened.header.n_layer,
                known=opened.known.under(**defaults),
                targets={name: info.targets for name, info in opened.adapters.items()},
            )
            core = self._open_core(opened, weigher)
            from qaflora_edge.prompt.tokens import Reader  # as a thread has imported it

            system = opened.text.system if opened.text else None
            messages = opened.text.examples if opened.text else ()
            examples = tuple(structs.asdict(message) for message in messages)
            reader = Reader(core.model, core.n_ctx, system or None, examples, reasoning)
            from qaflora_edge.bundles.taught import Taught

            self.taught = Taught(path, self._base_sha256, opened.header.n_embd)
            core.examples = self.taught.examples
            self.current = AdapterSet(core, weigher, reader, seed)

        with self._loading() as begin:
            self.files = load_bundle(path, adapters, begin=begin, use=use)
        self.taught.examples()  # a damaged file is told of now
        self._cores = [weakref.ref(self.current.core)]

    def _base_sha256(self) -> str:
        text = self.files.text
        return checksum(self.files.base_path) if text is None else text.base.sha256

    @contextmanager
    def _loading(self) -> Iterator[Begin]:
        """Give what lets the library load a base, in a thread, while adapters are read."""
        placing = self._options["placing"]
        loading: list[Future[Model]] = []

        def begin(header: GgufHeader) -> None:
            if placing["rpc"] is None:  # a worker that is silent is waited for once
                loading.append(thread.submit(shared_model, header, placing))

        with ThreadPoolExecutor(1) as thread:
            try:
                yield begin
            finally:
                for model in loading:
                    with suppress(QafloraError):  # which opening meets too
                        model.result().close()

    def _open_core(self, opened: BundleFiles, weigher: Weigher) -> Core:
        infos = opened.adapters.values()
        paths = (opened.base_path, *(info.path for info in infos))
        states = {path: opened.states[path] for path in paths}
        with ThreadPoolExecutor(1) as thread:  # while the library loads the base
            sizes = thread.submit(_read_ahead, weigher, infos).result
            return Core(opened.header, opened.adapters, states, sizes=sizes, **self._options)

    def cores(self) -> list[Core]:
        """List those that compute, or answer their last requests."""
        return [core for reference in self._cores if (core := reference())]

    def close(self) -> None:
        """Free all of it. A second call does nothing; raises BusyError within a call."""
        while cores := [core for core in self.cores() if not core.is_closed]:
            for core in cores:
                core.close()

    def run_forever(self) -> None:
        """Compute what other threads ask for, until close()."""
        core = None
        while core is not self.current.core:  # until close(), once for each set of adapters
            core = self.current.core
            with core.call():
                core.loop.run_forever()

    def add_adapter(
        self, name: str | None, path: AnyPath, engine: "OpenEngine", progress: Tell
    ) -> str:
        """Load an adapter as Engine.add_adapter does.

        engine  opens one that measures it
        """
        from qaflora_edge.bundles.create import BEST, with_adapter
        from qaflora_edge.bundles.source import find_adapter

        source = find_adapter(path)  # other changes do not wait for what the Hub sends
        with self._changing:
            weigher = self.current.weigher
            strategies = {weigher.known.strategy, *{BEST}.intersection(weigher.followed)}
            opened = with_adapter(self.files, source, name, engine, strategies, progress)
            *_, name = opened.adapters
            self._change(opened, {*weigher.adapters, name})
        return name

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter. Raises StrategyError."""
        with self._changing:
            if name not in self.files.adapters:
                raise not_loaded(name, self.files.adapters)
            left = {other: info for other, info in self.files.adapters.items() if other != name}
            self._change(replace(self.files, adapters=left), self.current.weigher.adapters)

    def _change(self, opened: BundleFiles, used: Collection[str]) -> None:
        from qaflora_edge.bundles.create import UNMEASURED

        old = self.current
        weigher = replace(
            old.weigher,
            adapters=tuple(name for name in opened.adapters if name in used),
            known=replace(old.weigher.known, typical=opened.known.typical),
            targets={name: info.targets for name, info in opened.adapters.items()},
        )
        if self._chooses and UNMEASURED in weigher.followed:
            weigher = replace(weigher, known=replace(weigher.known, strategy=UNMEASURED))
        core = self._open_core(opened, weigher)
        core.examples = self.taught.examples
        core.n_ctx = old.core.n_ctx  # as much memory was free at first
        with old.core.call():  # raises BusyError after close()
            self._cores = [weakref.ref(kept) for kept in (*self.cores(), core)]
            self.files = opened
            self._chooses = False
            self.current = replace(old, core=core, weigher=weigher)
        old.core.loop.leave()

    def use_adapters(self, names: Sequence[str]) -> None:
        """Weigh only these adapters from now on. Raises StrategyError."""
        with self._changing, self.current.core.call():
            self.current = replace(self.current, weigher=self.current.weigher.using(names))

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this strategy where a call names none. Raises StrategyError."""
        with self._changing, self.current.core.call():
            weigher = self.current.weigher
            weigher = replace(weigher, known=replace(weigher.known, strategy=strategy))
            self.current = replace(self.current, weigher=weigher)
            self._chooses = False


def paths_of(
    bundle: AnyPath | None, base: AnyPath | None, adapters: Mapping[str, AnyPath] | None
) -> tuple[Path, dict[str, Path] | None]:
    """Give the bundle, or the base and its adapters, as load_bundle takes them."""
    if bundle is not None and (base is not None or adapters is not None):
        raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
    if bundle is not None:
        return Path(bundle), None
    if base is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    return Path(base), {name: Path(path) for name, path in (adapters or {}).items()}


def _read_ahead(weigher: Weigher, infos: "Iterable[AdapterInfo]") -> "list[AttentionSizes]":
    """Read what a first chat needs: templates' code, and for two-place the adapters' matrices."""
    from qaflora_edge.weighing.adapter_inputs import AttentionSizes

    import_module("qaflora_edge.prompt.tokens")
    strategy = weigher.strategy_of(None)
    needed = infos if strategy is not None and strategy.reads_added else ()
    return [AttentionSizes(info, weigher.n_layer) for info in needed]
