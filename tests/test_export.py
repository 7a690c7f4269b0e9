"""qaflora export: one adapter for a mix, against stock llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from bundles import qaflora
from test_backend import TOKENS, fused_logits, stock_logits
from tiny import F32

from qaflora_edge import Engine
from qaflora_edge.convert.adapter import mix_modules, write_mix
from qaflora_edge.convert.planned import MixedModule
from qaflora_edge.formats.adapter import read_adapter
from qaflora_edge.formats.base import read_base
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.show import who_spoke

OUTSIDE = ("token_embd", "output")
PROJECTIONS = (*tiny.STEMS, *OUTSIDE)


def mixed(
    folder: Path, targets: tuple[str, ...], **options: object
) -> tuple[F32, tiny.TinyBase, GgufHeader, list[MixedModule]]:
    """Give the fused logits of three adapters, weighed in each layer, and their mix."""
    base = tiny.write_tiny_base(folder / "base.gguf", **options)  # type: ignore[arg-type]
    adapters = [
        tiny.write_tiny_adapter(folder / "a.gguf", base, targets=targets),
        tiny.write_tiny_adapter(folder / "b.gguf", base, targets=targets, rank=7, alpha=3, seed=2),
        tiny.write_tiny_adapter(folder / "c.gguf", base, targets=targets[:2], rank=2, layers=[2]),
    ]
    weights = np.array([[0, 0.7, 0.4], [0, -0.5, 1.3], [0.2, 0.2, 0.6]], np.float32)
    header = read_base(base.path)
    infos = {a.path.stem: read_adapter(read_gguf_header(a.path), header) for a in adapters}
    return fused_logits(base, adapters, weights), base, header, mix_modules(infos, weights)


@pytest.mark.parametrize("n_expert", [0, 4])
def test_stock_llama_cpp_gives_the_logits_of_the_mix(tmp_path, n_expert) -> None:
    targets = (*tiny.STEMS[:4], *tiny.EXPERT_STEMS, *OUTSIDE) if n_expert else PROJECTIONS
    fused, base, header, modules = mixed(tmp_path, targets, tied=False, n_expert=n_expert)
    errors = {}
    for outtype in ("f32", "f16", "q8_0"):
        path = tmp_path / f"{outtype}.gguf"
        write_mix(path, header, modules, "it", outtype)
        own = stock_logits(base, [path], [1.0])
        errors[outtype] = np.abs(own - fused).max() / np.abs(fused).max()
    assert errors["f32"] < 1e-5 < errors["f16"] < 1e-3 < errors["q8_0"] < 0.05
    assert np.abs(fused - stock_logits(base)).max() > 0.1  # the adapters do something
    ranks = read_adapter(read_gguf_header(path), header).ranks  # and we take it as any other
    found = {name: rank for name, rank in ranks.items() if "attn_q" in name or "blk" not in name}
    assert found == {"blk.1.attn_q.weight": 11, "blk.2.attn_q.weight": 13, "output.weight": 11}


def test_command_writes_the_mix_of_a_prompt(made, tmp_path) -> None:
    out = tmp_path / "mix.gguf"
    command = ["export", made.folder, "-o", out, "--outtype", "f32"]
    result = qaflora(*command)
    assert (result.exit_code, out.exists()) == (2, False)
    assert "qa-flora weighs by the prompt: give --prompt TEXT, or --strategy ma" in result.stderr
    result = qaflora(*command, "--prompt", "the")
    with Engine(made.folder, n_ctx=64, kv_type="f32", flash_attn=False) as engine:
        fusion = engine.weights("the")
        fused = engine.logits(TOKENS, weights=fusion)
    assert result.stderr == f"Wrote {out}: {who_spoke(fusion)}; rank 12.\n"
    error = stock_logits(made.base, [out], [1.0]) - fused
    assert np.abs(error).max() < 1e-3 * np.abs(fused).max()
    result = qaflora(*command, "--strategy", "static")
    told = f"Error: Cannot write {out}: it is a file already. Choose another name.\n"
    assert result.stderr == told


@pytest.mark.parametrize(
    ("stem", "options", "message"),
    [
        ("attn_q", ["--strategy", "base"], "no adapter weighs anything where it adapts the base,"),
        ("output", [], "a.gguf adapts output.weight, and llama.cpp takes no adapter of an embeddi"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_written(
    tmp_path, own_cache, stem, options, message
) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    adapter = tiny.write_tiny_adapter(tmp_path / "a.gguf", base, targets=[stem]).path
    before = sorted(tmp_path.iterdir())
    words = ["export", base.path, "-o", tmp_path / "mix", "--adapter", adapter, *options]
    result = qaflora(*words, *([] if "--strategy" in options else ["--strategy", "single:a"]))
    assert (result.exit_code, sorted(tmp_path.iterdir())) == (1, before)
    assert "Error: Cannot export the mix: " in result.stderr
    assert message in result.stderr
