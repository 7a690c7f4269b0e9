"""The last query's beginning is not read again, and nothing else comes out because of that."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from decoded import count_decoded, run_alone
from tiny import EOS, F32, TinyBase, write_tiny_adapters, write_tiny_base

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base
from qaflora_edge.weighing.published.prober import PLACES, Prober


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base(tmp_path_factory, request) -> TinyBase:
    """Quantised, so that a differential product is told from a plain one."""
    place = tmp_path_factory.mktemp("prefixes")
    sizes = {"n_ctx": 2048, "n_layer": 2, "n_embd": 96, "n_head": 3, "n_head_kv": 1}
    return write_tiny_base(place / "base.gguf", request.param, dtype="q8_0", **sizes)


@pytest.fixture(scope="module")
def loaded(base) -> tuple[Model, Pack]:
    paths = write_tiny_adapters(base, ("a", "b", "c"))
    model = Model(read_base(base.path))
    return model, Pack(model, [*paths.values()])


def drawn(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


class Chats:
    """Prompts as a chat template makes them: messages that end, and how an answer begins."""

    def __init__(self, base: TinyBase) -> None:
        self._end, self._opening = base.tokens.index(EOS), drawn(4, 99)

    def prompt(self, *messages: Sequence[int]) -> list[int]:
        parts = [[*message, self._end, *self._opening] for message in messages]
        return [token for part in parts for token in part]


def states(prober: Prober, tokens: Sequence[int], rows: Sequence[int] = (0, 1, 2)) -> F32:
    return run_alone(prober.states(tokens, rows))


def n_read_for(
    read: Callable[[Prober], Any], sharing: Prober, loaded: tuple[Model, Pack], options: Any
) -> int:
    """Tokens that are prefilled for what is read; a prober that shares nothing finds the same."""
    with pytest.MonkeyPatch.context() as patch:
        counts = count_decoded(patch, first_only=True)
        found = read(sharing)
    with closing(Prober(*loaded, options)) as alone:
        assert np.array_equal(found, read(alone))
    return sum(counts)


def states_of_places(prober: Prober, tokens: Sequence[int], span: tuple[int, int]) -> list[F32]:
    return [run_alone(prober.states(tokens, (0, 1, 2), place, span)) for place in PLACES]


def test_what_is_reused_changes_no_bit(base, loaded) -> None:
    """A chat that goes on, a question under its system prompt, and another prompt."""
    chats = Chats(base)
    system = drawn(400, 1)
    prompts = [
        chats.prompt(system, drawn(40, 3)),
        chats.prompt(system, drawn(40, 3), drawn(90, 5), drawn(20, 6)),
        chats.prompt(system, drawn(55, 9)),
        drawn(300, 12),
    ]
    options = {"kv_type": "q8_0", "flash_attn": True, "threads": 1}
    sharing = Prober(*loaded, options)
    n_read = [
        n_read_for(partial(states, tokens=prompt), sharing, loaded, options) for prompt in prompts
    ]
    sharing.close()
    if base.arch != "gemma3":  # a sliding window cannot go back
        # The system prompt is 405 tokens with its end.
        assert n_read == [450, 95 + 25, 60, 300]


def test_adapters_in_use_are_kept_apart(base, loaded) -> None:
    sharing = Prober(*loaded, {"threads": 1})
    system = drawn(200, 1)
    for seed, rows in enumerate([(0, 1, 2), (0, 2), (0, 2), ()]):
        prompt = Chats(base).prompt(system, drawn(30, seed))
        read = partial(states, tokens=prompt, rows=rows)
        n_read = n_read_for(read, sharing, loaded, {"threads": 1})
        if base.arch != "gemma3":
            assert n_read == (35 if seed == 2 else 240)
    sharing.close()


def test_a_state_that_is_cut_short_is_refused(loaded) -> None:
    with Context(*loaded, is_probe=True, n_seq=2, n_ctx=64, threads=1) as context:
        context.decode([1, 2, 3])
        held = context.kv_state()
        (*first, data), _ = held.sequences
        with pytest.raises(BackendError, match="A KV state cannot be reused: 0 of"):
            context.load_kv_state(replace(held, sequences=[(*first, data[:-100])]))
        assert context.tokens[0] == []
        context.load_kv_state(held)
        assert context.tokens[0] == [1, 2, 3]


def test_a_question_that_is_read_in_two_places_goes_on_too(base, loaded) -> None:
    """What stands before it is read as a prompt is; what follows stands for itself."""
    end = base.tokens.index(EOS)
    question_opens, answer_opens = drawn(3, 98), drawn(4, 99)
    head = [*drawn(200, 1), end, *question_opens]
    sharing = Prober(*loaded, {"threads": 1})
    n_read = []
    for seed in range(3):
        prompt = [*head, *drawn(20 + seed, 30 + seed), end, *answer_opens]
        read = partial(states_of_places, tokens=prompt, span=(len(head), len(prompt) - 5))
        n_read.append(n_read_for(read, sharing, loaded, {"threads": 1}))
    sharing.close()
    if base.arch != "gemma3":
        assert n_read == [len(head) + 25, 26, 27]
