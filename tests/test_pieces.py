"""Where prompts are cut."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_adapter, write_tiny_base

from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.pieces import N_TILE, n_ubatch, pieces_of
from qaflora_edge.engine import Engine
from qaflora_edge.weighing.probe import Prober
from qaflora_edge.weighing.reading import run_alone

TOKENS = np.random.default_rng(5).integers(0, 256, 700).tolist()


def cut(n: int, n_seq: int) -> list[int]:
    pieces = pieces_of(n_seq)
    lengths: list[int] = []
    while sum(lengths) < n:
        lengths.append(pieces.next(n - sum(lengths)))
    return lengths


@pytest.mark.parametrize("n_seq", [1, 2, 3, 4, 5, 9, 21])
def test_every_piece_has_whole_tiles(n_seq: int) -> None:
    """A piece below 64 rows of a sequence is computed row by row: three times as slow."""
    for n in range(1, 1100):
        lengths = cut(n, n_seq)
        assert sum(lengths) == n
        assert all(length % N_TILE == 0 for length in lengths[:-1])
        assert lengths[-1] >= min(n, N_TILE)
        assert n_seq * max(lengths) <= n_ubatch(n_seq) <= n_ubatch(n_seq + 1)


def test_what_a_prompt_begins_with_is_cut_alike_however_long_it_is() -> None:
    for n in range(200, 900):
        shorter = cut(n - 64, 4)[:-1]
        assert cut(n, 4)[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (1, 700, [128, 128, 128, 128, 188]),
        (3, 100, [100]),
        (3, 300, [64, 64, 64, 108]),
        (8, 256, [64] * 4),
        (8, 40, [40]),
    ],
)
def test_a_piece_of_the_probe_is_one_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, n: int, expected: list[int]
) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_ctx=1024)
    paths = [write_tiny_adapter(tmp_path / f"{i}.gguf", base, seed=i).path for i in range(k)]
    lengths: list[int] = []
    n_decoded: list[int] = []
    decode = Context.decode_spans

    def noting(self: Context, spans: Sequence[Span]) -> list[int]:
        before = self.n_decoded
        assert [span.seq for span in spans] == list(range(1 + k))
        (length,) = {len(span.tokens) for span in spans}
        rows = decode(self, spans)
        lengths.append(length)
        n_decoded.append(self.n_decoded - before)
        return rows

    monkeypatch.setattr(Context, "decode_spans", noting)
    model = Model(base.path)
    prober = Prober(model, Pack(model, paths), {"threads": 1})
    run_alone(prober.states(TOKENS[:n], range(k), "last"))
    assert lengths == expected
    assert n_decoded == [1] * len(expected)
    prober.close()


def test_a_piece_of_a_prompt_is_one_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_ctx=1024)
    path = write_tiny_adapter(tmp_path / "a.gguf", base).path
    with Engine(base=base.path, adapters={"a": path}, n_ctx=1024, strategy="static") as engine:
        context = engine._core.context
        for n, expected in ((300, 1), (600, 3), (550, 2)):
            before = context.n_decoded
            engine.generate([n % 256, *TOKENS[1:n]], max_tokens=1).text()
            assert context.n_decoded - before == expected, n
