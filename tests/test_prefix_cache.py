"""What prompts begin with is read once, and nothing else comes out because of that."""

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
from qaflora_edge.weighing.published.prober import PLACES, Prefixes, Prober

MIB = 1 << 20


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


@pytest.mark.slow
def test_what_is_kept_changes_no_bit(base, loaded) -> None:
    """Two chats in turn, and questions under one system prompt: all as if they were alone."""
    chats = Chats(base)
    system, other = drawn(400, 1), drawn(230, 2)
    mine, yours = [system, drawn(40, 3)], [other, drawn(130, 4)]
    prompts = [
        chats.prompt(*mine),
        chats.prompt(*yours),
        chats.prompt(*mine, drawn(90, 5), drawn(20, 6)),
        chats.prompt(*yours, drawn(70, 7), drawn(66, 8)),
        chats.prompt(system, drawn(55, 9)),
        chats.prompt(system, drawn(41, 10)),
        chats.prompt(other, drawn(12, 11)),
        drawn(300, 12),
        [*drawn(300, 12)[:250], *drawn(40, 13)],
    ]
    options = {"kv_type": "q8_0", "flash_attn": True, "threads": 1}
    sharing = Prober(*loaded, options, n_prefix_byte=64 * MIB)
    n_read = [
        n_read_for(partial(states, tokens=prompt), sharing, loaded, options) for prompt in prompts
    ]
    sharing.close()
    if base.arch != "gemma3":  # a sliding window cannot go back
        # System prompts are 405 and 235 tokens with their ends.
        assert n_read[:4] == [450, 370, 95 + 25, 75 + 71]
        assert n_read[4:7] == [60, 46, 17]
        assert n_read[7:] == [300, 290 - 192]


def test_adapters_in_use_are_kept_apart(base, loaded) -> None:
    sharing = Prober(*loaded, {"threads": 1}, n_prefix_byte=64 * MIB)
    system = drawn(200, 1)
    for seed, rows in enumerate([(0, 1, 2), (0, 2), (1,), (), (0, 1, 2), (0, 2), (1,)]):
        prompt = Chats(base).prompt(system, drawn(30, seed))
        read = partial(states, tokens=prompt, rows=rows)
        n_read = n_read_for(read, sharing, loaded, {"threads": 1})
        if base.arch != "gemma3":
            assert n_read == (240 if seed < 4 else 35)
    sharing.close()


def test_what_is_kept_is_bounded_and_what_was_used_last_stays(base, loaded) -> None:
    with Context(*loaded, is_probe=True, n_seq=1, n_ctx=256, threads=1) as context:

        def ask(prefixes: Prefixes, seed: int) -> int:
            """A question under the system prompt of this seed; gives how much of it was there."""
            prompt = Chats(base).prompt(drawn(95, seed), drawn(5, 50))
            n_kept = prefixes.go_on(context, "key", prompt, context.chunks())
            for start, end in ((n_kept, 100), (100, len(prompt))):
                if start < end:
                    context.decode(prompt[start:end], start=start)
            return n_kept

        none = Prefixes(0)
        assert [ask(none, seed) for seed in (1, 2, 1)] == [0, 0, 0]
        n_byte = context.n_kv_byte
        assert n_byte == context.kv_state().n_byte
        two = Prefixes(2 * n_byte)
        context.clear()
        expected = [0, 0, 0, 100, 100, 0, 100]
        if base.arch != "gemma3":
            assert [ask(two, seed) for seed in (1, 2, 3, 1, 3, 2, 3)] == expected
        assert two.n_byte <= 2 * n_byte


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


@pytest.mark.slow
def test_a_question_that_is_read_in_two_places_goes_on_too(base, loaded) -> None:
    """What stands before it is read as a prompt is; what follows stands for itself."""
    end = base.tokens.index(EOS)
    system, question_opens, answer_opens = drawn(200, 1), drawn(3, 98), drawn(4, 99)
    head = [*system, end, *question_opens]
    asked = [[*head, *drawn(20 + i, 30 + i), end, *answer_opens] for i in range(3)]
    turn = [*asked[2], *drawn(70, 50), end, *question_opens, *drawn(25, 51), end, *answer_opens]
    other = [*drawn(150, 60), end, *question_opens, *drawn(30, 61), end, *answer_opens]
    sharing = Prober(*loaded, {"threads": 1}, n_prefix_byte=64 * MIB)
    n_read = []
    for prompt in (asked[0], asked[1], other, asked[2], turn, asked[0]):
        starts = [i for i in range(3, len(prompt)) if prompt[i - 3 : i] == question_opens]
        span = (starts[-1], len(prompt) - 5)
        read = partial(states_of_places, tokens=prompt, span=span)
        n_read.append(n_read_for(read, sharing, loaded, {"threads": 1}))
        # A query that is read at once takes nothing that was read in another way.
        n_read_for(partial(states, tokens=prompt), sharing, loaded, {"threads": 1})
    sharing.close()
    if base.arch != "gemma3":
        n_head = len(head)
        assert n_read[:4] == [len(asked[0]), 26, len(other), 27]
        assert n_read[4:] == [len(turn) - n_head, 25]
