"""Where prompts are cut."""

from collections.abc import Sequence

import numpy as np
import pytest
from raw_context import stats
from tiny import write_tiny_adapter, write_tiny_base

from qaflora_edge.backend.batch import N_TILE, Chunks, chunks_of, n_ubatch
from qaflora_edge.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 256, 700).tolist()


def cut_tokens(tokens: Sequence[int], chunks: Chunks) -> list[int]:
    """Lengths of the chunks."""
    return [end - at for at, end in chunks.cut(tokens)]


@pytest.mark.parametrize("n_seq", [1, 2, 3, 4, 5, 9, 21])
def test_every_piece_has_whole_tiles(n_seq) -> None:
    """Flash attention has 64 rows in a tile: others leave a part of one unused."""
    for n in range(1, 1100):
        lengths = cut_tokens([0] * n, chunks_of(n_seq))
        assert sum(lengths) == n
        assert all(length % N_TILE == 0 for length in lengths[:-1])
        assert lengths[-1] >= min(n, N_TILE)
        assert n_seq * max(lengths) <= n_ubatch(n_seq) <= n_ubatch(n_seq + 1)


def test_chunks_end_where_messages_do() -> None:
    chunks = chunks_of(4, lambda token: token == 9)
    tokens = [0] * 400
    for i in (10, 30, 100, 150, 228, 340):  # 10 is too near to the beginning
        tokens[i] = 9
    assert cut_tokens(tokens, chunks) == [31, 70, 50, 78, 112, 59]
    alone = chunks_of(1, lambda token: token == 9)  # fewer rows would not be worth the matrices
    assert cut_tokens(tokens, alone) == [101, 128, 112, 59]


def test_chunks_get_shorter_where_a_row_has_much_to_look_at() -> None:
    """Rows times tokens before them are bounded, and so is the time of a chunk."""
    at = 0
    lengths = cut_tokens([0] * 20_000, chunks_of(1, n_shallow=600))
    for length in lengths[:-1]:
        assert length == 16 or length * at <= 256 * 600
        at += length
    assert sorted(lengths[:-1], reverse=True) == lengths[:-1]
    assert set(lengths[:-1]) == {256, 192, 128, 64, 48, 32, 16}


def test_a_prompt_ends_in_a_piece_that_the_next_turn_has_too() -> None:
    """A template opens the answer behind the last message: nobody waits for four tokens alone."""
    chunks = chunks_of(4, lambda token: token == 9)
    system, opening, answer = [1] * 90 + [9], [5, 6, 7, 8], [3] * 70 + [9]
    first = [*system, *[2] * 80, 9, *opening]
    assert cut_tokens(first, chunks) == [91, 85]
    second = [*first, *answer, *[4] * 66, 9, *opening]
    assert cut_tokens(second, chunks) == [91, 85, 71, 71]
    assert chunks.n_shared(first, second) == 176
    assert chunks.n_shared(first, [*system, *second[100:]]) == 91


def test_prompts_are_alike_as_far_as_all_their_cuts_are() -> None:
    rng = np.random.default_rng(1)
    chunks = Chunks(8, 4, 3, lambda token: token == 0)
    n_found = 0
    for _ in range(2000):
        both = rng.integers(0, 12, rng.integers(0, 60)).tolist()
        a, b = (both + rng.integers(0, 12, rng.integers(1, 40)).tolist() for _ in range(2))
        cuts = [np.cumsum(cut_tokens(tokens, chunks)).tolist() for tokens in (a, b)]
        pairs = enumerate(zip(a, b, strict=False))
        n_same = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
        alike = [
            at
            for i, at in enumerate(cuts[0])
            if cuts[1][: i + 1] == cuts[0][: i + 1] and at <= min(n_same, len(b) - 1)
        ]
        assert chunks.n_shared(a, b) == max(alike, default=0)
        n_found += len(alike) > 0
    assert n_found > 500


def test_a_piece_of_a_prompt_is_one_micro_batch(tmp_path, monkeypatch) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_ctx=1024)
    path = write_tiny_adapter(tmp_path / "a.gguf", base).path
    with Engine(base=base.path, adapters={"a": path}, n_ctx=1024, strategy="static") as engine:
        context = engine._core.context
        for n, expected in ((300, 1), (600, 3), (550, 2)):
            before = stats(context._pointer).n_decoded
            engine.generate([n % 256, *TOKENS[1:n]], max_tokens=1).text()
            assert stats(context._pointer).n_decoded - before == expected, n
