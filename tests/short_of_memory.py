"""Let each piece of memory fail in turn that our native code asks for; a program of its own.

It is run with tests/native/short_of_memory.cpp preloaded, and prints how many there were.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base

TOKENS = [5, 6, 7, 8, 9]
SAID = "not enough memory"
Array = Any


class Desk:
    """A base, two adapters, and what is done with them: each method gives arrays to compare."""

    def __init__(self, place: Path, **base_options: Any) -> None:
        base = tiny.write_tiny_base(place / "base.gguf", n_layer=1, **base_options)
        targets = ("attn_q", "attn_v", *tiny.EXPERT_STEMS) if base.n_expert else tiny.STEMS
        adapters = tiny.seeded_adapters(base, 1, 2, targets=targets)
        self.paths = [adapter.path for adapter in adapters]
        self.model = Model(read_base(base.path))
        self.pack = Pack(self.model, self.paths)
        options: dict[str, Any] = {"n_ctx": 64, "threads": 2}
        self.context = Context(self.model, self.pack, n_seq=2, **options)
        self.probe = Context(self.model, self.pack, n_seq=3, is_probe=True, **options)
        weights = np.full((2, self.model.n_layer), 0.5, np.float32)
        self.weights = weights
        self.states = np.ones((3, self.model.n_layer, self.model.n_embd), np.float32)
        self.states[1:] += np.arange(self.model.n_embd, dtype=np.float32) / 64

    def make_pack(self) -> Array:
        with Pack(self.model, self.paths) as pack:
            return np.array(pack.first_layers)

    def make_context(self) -> Array:
        with Context(self.model, self.pack, n_ctx=64, threads=2) as context:
            return np.array(context.n_seq)

    def make_probe(self) -> Array:
        options = {"is_probe": True, "is_differential": True}
        with Context(self.model, self.pack, n_ctx=64, n_seq=3, threads=2, **options) as probe:
            probe.decode(TOKENS)
            return np.stack([probe.states(seq) for seq in range(3)])

    def decode(self) -> Array:
        for seq in range(2):
            self.context.clear(seq)
            self.context.set_weights(self.weights, seq=seq)
        self.context.capture_begin("inputs")
        self.context.decode(TOKENS)
        inputs = self.context.inputs(1, len(TOKENS))
        return np.concatenate([self.context.logits(), inputs.ravel()])

    def probe_states(self) -> Array:
        for seq in range(3):
            self.probe.clear(seq)
        for seq in range(2):
            self.probe.set_weights(np.eye(2, dtype=np.float32)[:, [seq]], seq=seq + 1)
        self.probe.capture_begin("mean")
        self.probe.decode(TOKENS, outputs="all")
        return np.stack([self.probe.states(seq) for seq in range(3)])

    def divergence(self) -> Array:
        return self.probe.divergence(self.states[0], self.states[1:], "norm")


def in_turn(hook: Any, action: Callable[[], Array]) -> int:
    """Do an action with each piece of memory failing; give how many pieces failed."""
    action()
    hook.short_of_memory_record()
    expected = action()
    n_ours = hook.short_of_memory_end()
    places = hook.short_of_memory_ours()[:n_ours]
    n_failed = 0
    for place in places:
        hook.short_of_memory_fail(place)
        said, found = "", None
        try:
            found = action()
        except BackendError as error:
            said = str(error)
        n_failed += hook.short_of_memory_end()
        # A thread that cannot be had is no failure: the others do its share.
        assert SAID in said or found is not None, said
        if found is not None:
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(action(), expected)  # nothing is left of the failures
    assert n_failed >= n_ours - 1, (n_failed, n_ours)
    return n_failed


def main() -> None:
    hook = ctypes.CDLL(None)
    hook.short_of_memory_fail.argtypes = [ctypes.c_long]
    hook.short_of_memory_end.restype = ctypes.c_long
    hook.short_of_memory_ours.restype = ctypes.POINTER(ctypes.c_long)
    counts = {}
    place = Path(sys.argv[1])
    for kind, options in {"dense": {"dtype": "q8_0"}, "experts": {"n_expert": 4}}.items():
        (place / kind).mkdir()
        desk = Desk(place / kind, **options)
        for action in (
            *(desk.make_pack, desk.make_context, desk.make_probe),
            *(desk.decode, desk.probe_states, desk.divergence),
        ):
            counts[f"{kind} {action.__name__}"] = in_turn(hook, action)
            print(kind, action.__name__, counts[f"{kind} {action.__name__}"], file=sys.stderr)
    print(json.dumps({"failed": counts}))


if __name__ == "__main__":
    main()
