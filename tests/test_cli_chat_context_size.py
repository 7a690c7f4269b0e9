"""The context of a chat where nobody says how large it is"""

from pathlib import Path

import pytest
from bundles import make_bundle

from qaflora_edge import Engine
from qaflora_edge.cli.chat import context_size as module
from qaflora_edge.cli.chat.context_size import context_size
from qaflora_edge.formats.gguf import n_kv_value, read_gguf_header


def test_it_is_what_the_base_was_trained_for(tmp_path: Path) -> None:
    made = make_bundle(tmp_path)
    with Engine(made.folder, threads=1) as engine:
        assert context_size(made.folder, "f16") == engine.n_ctx_train < module.LARGEST


def test_it_is_bounded_where_the_base_was_trained_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_bundle(tmp_path)
    monkeypatch.setattr(module, "_n_ctx_train", lambda header: 131072)
    assert context_size(made.folder, "f16") == 8192
    n_byte = 2 * n_kv_value(read_gguf_header(made.base.path))
    monkeypatch.setattr(module, "memory_bytes", lambda: 8.0 * 4096 * n_byte)
    assert context_size(made.folder, "f16") == 4096
    assert context_size(made.folder, "q8_0") == 4096
    assert context_size(made.folder, "f32") == 2048
    monkeypatch.setattr(module, "memory_bytes", lambda: 0.0)
    assert context_size(made.folder, "f16") == module.LEAST


def test_the_values_of_the_cache_are_those_of_the_model(smollm2: Path) -> None:
    # 30 layers, keys and values of 3 heads of 64.
    assert n_kv_value(read_gguf_header(smollm2)) == 30 * 2 * 3 * 64


def test_a_base_that_is_not_here_is_told_by_who_opens_it(tmp_path: Path) -> None:
    made = make_bundle(tmp_path)
    made.base.path.unlink()
    assert context_size(made.folder, "f16") == module.LEAST
