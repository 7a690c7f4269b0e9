"""What llama_decode refuses with adapters, and what a decode that failed or was ended leaves."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
from raw_context import RawContext, Row, rows_of
from tiny import F32, seeded_adapters, write_tiny_base

from qaflora_edge.backend import library as native
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.formats.base import read_base

TOKENS = [72, 101, 261, 32, 113, 117, 101, 115, 116, 262, 111, 102]
OTHERS = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
DIFFERENTIAL = native.CONTEXT_PROBE | native.CONTEXT_DIFFERENTIAL


@pytest.fixture(params=["q8_0"])
def loaded(request, tmp_path) -> Iterator[tuple[Model, Pack]]:
    """Quantised, so that a differential product is told from a plain one."""
    base = write_tiny_base(tmp_path / "base.gguf", dtype=request.param)
    paths = [adapter.path for adapter in seeded_adapters(base, 1, 2, 3, strength=0.02)]
    with Model(read_base(base.path)) as model, Pack(model, paths) as pack:
        yield model, pack


def probe(loaded: tuple[Model, Pack], flags: int = DIFFERENTIAL, **params: object) -> RawContext:
    """Sequence 0 is the base, 1 to 3 have an adapter each."""
    model, pack = loaded
    context = RawContext(model, pack, flags=flags, n_seq=4, **params)
    for ia in range(3):
        weights = np.zeros((3, model.n_layer), np.float32)
        weights[ia] = 1.0
        context.set_weights(1 + ia, weights)
    context.capture_begin()
    return context


def together(n_seq: int, tokens: list[int] = TOKENS) -> list[Row]:
    return [row for seq in range(n_seq) for row in rows_of(tokens, seq=seq)]


UNEVEN = [*(Row(t, i, 0) for i, t in enumerate(TOKENS[:2])), *rows_of(TOKENS[:3], seq=1)]
REFUSED = {
    "no base": ([*rows_of(TOKENS, seq=1), *rows_of(TOKENS, seq=2)], "given sequence 1 where 0 was"),
    "a gap": ([*rows_of(TOKENS, seq=0), *rows_of(TOKENS, seq=2)], "given sequence 2 where 0 was"),
    "two queries": (
        [*together(2), *rows_of(OTHERS, seq=2), *rows_of(OTHERS, seq=3)],
        "sequence 2 of a differential probe has another token, position or output than the base "
        "at its position 0; decode one query at a time",
    ),
    "outputs of one": (
        [*(Row(t, i, 0) for i, t in enumerate(TOKENS)), *rows_of(TOKENS, seq=1)],
        "another token, position or output than the base at its position 11",
    ),
    "one goes on alone": (UNEVEN, "given sequence 1 where 0 was expected; decode the base, which"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_differential_probe_that_cannot_be_subtracted_is_refused(loaded, name) -> None:
    rows, message = REFUSED[name]
    context = probe(loaded)
    assert context.decode(rows) == -3
    assert message in native.last_error()
    # It can be used at once, and what was refused left nothing behind.
    context.clear()
    context.capture_begin()
    assert context.decode(together(4)) == 0
    assert native.last_error() == ""
    found = [context.states(seq) for seq in range(4)]
    context.close()
    fresh = probe(loaded)
    assert fresh.decode(together(4)) == 0
    assert np.array_equal(found, [fresh.states(seq) for seq in range(4)])
    fresh.close()


def test_a_unified_kv_is_refused_by_a_differential_probe(loaded) -> None:
    context = probe(loaded, kv_unified=True)
    assert context.decode(together(4)) == -3
    assert native.last_error() == (
        "the sequences of a differential probe are not told apart by row; make the context "
        "without a unified KV, and give each token one sequence"
    )
    assert context.decode(rows_of(TOKENS)) == 0  # the base alone
    context.close()


def test_fewer_adapters_than_all_are_subtracted_alike(loaded) -> None:
    """In micro-batches of any length. The base alone is read as it is."""

    def states(n_seq: int, flags: int = DIFFERENTIAL, **params: object) -> F32:
        context = probe(loaded, flags, **params)
        assert context.decode(together(n_seq)) == 0
        found = [context.states(seq) for seq in range(n_seq)]
        context.close()
        return np.array(found)

    assert np.array_equal(states(1), states(1, native.CONTEXT_PROBE))
    every = states(4)
    assert np.array_equal(states(2), every[:2])
    move = every[1] - every[0]
    short = states(2, n_ubatch=7)
    plain = states(2, native.CONTEXT_PROBE)
    # other rows are rounded together there, which moves base and adapted state alike
    error = np.abs(short[1] - short[0] - move).max()
    assert error < 0.3 * np.abs(plain[1] - plain[0] - move).max()


def mixed(loaded: tuple[Model, Pack]) -> RawContext:
    """Three sequences with a mix each, two tokens of all three in a micro-batch."""
    model, pack = loaded
    context = RawContext(model, pack, n_seq=3, n_ubatch=6)
    rng = np.random.default_rng(3)
    for seq in range(3):
        context.set_weights(seq, rng.random((3, model.n_layer)).astype(np.float32))
    return context


def abort_in_second(context: RawContext) -> None:
    """End the decode at the 20th node of its second micro-batch."""
    n_decoded, n_asked = context.n_decoded, 0

    def is_due() -> bool:
        nonlocal n_asked
        n_asked += context.n_decoded == n_decoded + 1
        return n_asked >= 20

    context.abort_when(is_due)


@pytest.mark.parametrize("loaded", ["f32"], indirect=True)  # numbers hang on no batch's shape
def test_an_ended_decode_keeps_the_micro_batches_before(loaded) -> None:
    """What each sequence holds is what llama_memory_seq_pos_max says; going on is exact."""
    lengths = (2, 6, 12)
    whole = mixed(loaded)
    rows = [row for seq, n in enumerate(lengths) for row in rows_of(TOKENS[:n], seq=seq)]
    assert whole.decode(rows) == 0
    expected = [whole.logits(sum(lengths[: seq + 1]) - 1) for seq in range(3)]
    whole.close()

    context = mixed(loaded)
    abort_in_second(context)
    assert context.decode(rows) == 2
    assert native.last_error() == ""
    # The first micro-batch had two tokens of each; of the second, sequences 1 and 2, nothing stays.
    assert [context.pos_max(seq) for seq in range(3)] == [1, 1, 1]
    # Sequence 0 was complete, yet no logits of a decode that failed can be read.
    if "QAFLORA_TEST_ASSERTS" not in os.environ:  # a library with asserts ends the process
        assert [context.logits(row) for row in (1, 7, 19)] == [None, None, None]

    context.abort_when(None)
    context.forget(0, 1)  # so its last token is read again
    again = [
        row
        for seq, n in enumerate(lengths)
        for row in rows_of(
            TOKENS[context.pos_max(seq) + 1 : n], seq=seq, start=context.pos_max(seq) + 1
        )
    ]
    assert context.decode(again) == 0
    for seq, row in enumerate((0, 4, 14)):
        # other micro-batches: sums of another order in float32
        np.testing.assert_allclose(context.logits(row), expected[seq], atol=1e-4, rtol=0)
    context.close()
