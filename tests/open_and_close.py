"""Use an Engine, close it, and fail to open others: whatever is allocated then has leaked.

For `make test-asan`, which looks for leaks at the end of this process.
"""

import tempfile
from pathlib import Path

import tiny

from qaflora_edge import Engine, QafloraError
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.formats.base import read_base

N_CYCLE = 3


def use(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base=base, adapters=adapters, n_ctx=64, threads=1) as engine:
        fusion = engine.weights("Hello")
        engine.hidden_states("Hello", adapter="math")
        engine.logits("Hello there", weights=fusion)
        assert len(list(engine.generate("Hello", max_tokens=4))) <= 4


def fail(base: Path, adapter: Path, broken: Path) -> None:
    """Fail where the library has allocated something already."""
    with Model(read_base(base), gpu_layers=0) as model:
        for path in (broken, base):
            try:
                Pack(model, [adapter, path])
            except QafloraError:
                continue
            raise AssertionError(f"{path} was loaded as an adapter")
    try:
        Model(read_base(broken), gpu_layers=0)
    except QafloraError:
        return
    raise AssertionError("a broken base was loaded")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        base = tiny.write_tiny_base(place / "base.gguf")
        adapters = {
            adapter: tiny.write_tiny_adapter(place / f"{adapter}.gguf", base, seed=seed).path
            for seed, adapter in enumerate(("math", "es"), 1)
        }
        broken = place / "broken.gguf"
        broken.write_bytes(adapters["math"].read_bytes()[:-64])
        for _ in range(N_CYCLE):
            use(base.path, adapters)
            fail(base.path, adapters["math"], broken)
    print(f"{N_CYCLE} cycles")


if __name__ == "__main__":
    main()
