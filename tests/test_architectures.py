"""Every architecture that adapters are converted for, against transformers, PEFT and upstream.

The oracle of logits and states is transformers with PEFT in float32; bases, and the tensors that
ours are compared with, come from llama.cpp's converters at the pin. findings.json holds what
`convert_table` finds; a row that is no longer true fails its test.
"""

import re
from pathlib import Path
from typing import Any

import convert_table
import gguf
import numpy as np
import pytest
import tiny
from convert_table import committed, unusual
from families import FAMILIES, GEMMA_3N, MIXTURES
from patience import python
from refusals import refused

from qaflora_edge import Engine
from qaflora_edge.convert import layouts
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import BackendError, UnsupportedAdapterError
from qaflora_edge.files import cache_dir
from qaflora_edge.formats.adapter import why_not_adapted
from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.gguf import GgufHeader


@pytest.fixture(scope="session")
def upstream(checkout, tmp_path_factory) -> Path:
    """Unpack llama.cpp's converters."""
    zoo = pytest.importorskip("zoo")
    archive = zoo.find_archive(checkout / "patches", cache_dir())
    return zoo.unpack_upstream(archive, tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="session")
def findings(request, upstream, tmp_path_factory) -> convert_table.Findings:
    """Specimens of the families whose rows are asked for, made at once."""
    wanted = {
        item.callspec.params["family"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and "findings" in item.fixturenames
    }
    every = {**FAMILIES, GEMMA_3N.name: GEMMA_3N}
    families = [family for name, family in every.items() if name in wanted]
    return convert_table.Findings(families, upstream, tmp_path_factory.mktemp("zoo"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_the_table_is_what_is_found(findings, family) -> None:
    assert unusual(findings.row(family)) == committed()["architectures"][family]


@pytest.mark.slow
@pytest.mark.parametrize("family", [family.name for family in MIXTURES])
def test_row_of_experts_is_what_is_found(findings, family) -> None:
    assert unusual(findings.expert_row(family)) == committed()["experts"][family]


PROBE = """
import sys
from qaflora_edge import Engine, QafloraError
with Engine(base=sys.argv[1], adapters={"it": sys.argv[2]}, n_ctx=64) as engine:
    print(engine.logits([5, 17, 99], weights="static").shape)
    try:
        engine.weights([5, 17, 99])
    except QafloraError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", [GEMMA_3N.name])
def test_block_that_passes_several_streams_on_is_no_crash(findings, family) -> None:
    specimen = findings.specimens[family]
    done = python("-c", PROBE, specimen.base, specimen.upstream("projections"))
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.splitlines() == [
        "(271,)",
        "A context of 2 x 256 tokens cannot be made: architecture 'gemma3n' shows the output of 0 "
        "of 2 blocks; its states cannot be captured.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mamba"])
def test_recurrent_states_that_are_no_numbers_are_nobody_elses(findings, family) -> None:
    """Sequences have no rooms: what one has left is where any other begins."""
    specimen = findings.specimens[family]
    adapters = {"it": specimen.upstream("projections")}
    options: Any = {"base": specimen.base, "adapters": adapters, "strategy": "static", "threads": 1}
    with Engine(n_parallel=3, n_ctx=64, **options) as engine:
        expected = engine.logits([5, 17, 99])
        beside = engine.generate([5, 17, 99, 3], max_tokens=40)
        for _ in range(3):
            with pytest.raises(BackendError, match="NaN, expected numbers"):
                engine.generate([7, 8, 9], weights={"it": 1e30})
            assert np.array_equal(engine.logits([5, 17, 99]), expected)
        list(beside)
        again = engine.generate([5, 17, 99, 3], max_tokens=40)
        list(again)
        assert beside._sequence.answer == again._sequence.answer


def test_tables_have_every_family_and_architecture() -> None:
    assert list(committed()["architectures"]) == list(FAMILIES)
    assert {family.arch for family in FAMILIES.values()} == set(layouts.ARCHITECTURES)
    assert list(committed()["experts"]) == [family.name for family in MIXTURES]
    assert {family.arch for family in MIXTURES} == set(layouts.MIXTURES)


def test_every_architecture_of_llama_cpp_is_reviewed_or_refused(llama_cpp_source) -> None:
    source = (llama_cpp_source / "src" / "llama-arch.cpp").read_text("utf-8")
    names = re.findall(r'\{ LLM_ARCH_\w+, *"([^"(]+)"', source)
    assert len(names) == len(set(names)) > 150
    assert sorted([*layouts.ARCHITECTURES, *layouts.REFUSED]) == sorted(names)


def test_page_has_the_tables_that_were_found() -> None:
    text = convert_table.PAGE.read_text(encoding="utf-8")
    assert convert_table.page(text) == text


def test_refused_for_want_of_names_are_those_that_gguf_lacks() -> None:
    """Once a gguf that names them is installed, they can be tried."""
    unnamed = {name for name, why in layouts.REFUSED.items() if "gguf package" in why}
    assert unnamed
    assert not unnamed & set(gguf.MODEL_ARCH_NAMES.values())


def test_refused_for_what_is_bypassed_are_bypassed() -> None:
    refused = {name for name, why in layouts.REFUSED.items() if "without adapters" in why}
    assert all(ARCH_FACTS[name].bypassed for name in refused)


@pytest.mark.parametrize(
    ("layout", "stem", "shape"),
    [
        (layouts.packed_rope_pairs, "attn_qkv", (33, 64)),
        (layouts.grouped_rope_pairs, "attn_qkv", (33, 64)),
        (layouts.qwen3next_rows, "ssm_in", (95, 64)),
        (layouts.qwen35_rows, "attn_qkv", (33, 64)),
        (layouts.qwen35_rows, "ssm_out", (64, 33)),
        (layouts.halves(ffn_gate_up=("ffn_gate", "ffn_up")), "ffn_gate_up", (33, 64)),
    ],
)
def test_rows_that_tensors_cannot_share_are_refused(tmp_path, layout, stem, shape) -> None:
    counts = {
        **{"attention.head_count": 4, "attention.head_count_kv": 2, "ssm.group_count": 2},
        **{"ssm.time_step_rank": 4, "ssm.state_size": 8, "ssm.inner_size": 32},
    }
    metadata = {f"it.{name}": value for name, value in counts.items()}
    header = GgufHeader(tmp_path, "it", metadata, {}, 0)
    with pytest.raises(layouts.LayoutError, match="cannot share"):
        layout(layouts.Module(f"blk.0.{stem}", header, *shape))


def test_architecture_that_gguf_does_not_know_is_named(tmp_path, monkeypatch) -> None:
    base = tiny.write_shapes(tmp_path / "base.gguf", "qwen2", {"blk.0.attn_k.weight": (32, 64)})
    pairs = {"model.layers.0.self_attn.k_proj": (np.ones((4, 64)), np.ones((32, 4)))}
    folder = tiny.write_pairs_of_peft(tmp_path / "a", pairs)
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {gguf.MODEL_ARCH.LLAMA: "llama"})
    out = tmp_path / "out.gguf"
    assert refused(UnsupportedAdapterError, convert_adapter, folder, base, out) == (
        f"Cannot convert {folder} for {base}: the installed gguf package does not know its "
        "architecture 'qwen2'. Install a newer gguf."
    )


# llama.cpp's names of tensors in its code -> in a GGUF, where they differ.
FIELDS = {
    **{"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "wqkv": "attn_qkv"},
    **{"wq_a": "attn_q_a", "wq_b": "attn_q_b", "wkv_a_mqa": "attn_kv_a_mqa", "wkv_b": "attn_kv_b"},
    **{"wk_b": "attn_k_b", "wv_b": "attn_v_b", "wo_a": "attn_output_a", "wqkv_gate": "attn_gate"},
    **{"indexer_attn_k": "indexer.attn_k", "indexer_attn_q_b": "indexer.attn_q_b"},
    **{"indexer_proj": "indexer.proj", "indexer_kpool_gate": "indexer.kpool_gate"},
    "nextn.eh_proj": "nextn.eh_proj",
}
# src/models/NAME.cpp -> the architectures that use it, where they are not called the same.
FILES = {
    "deepseek2": ("deepseek2", "deepseek2-ocr", "mistral4"),
    "granite-switch": ("graniteswitch",),
    "hy-v4": ("hy_v4",),
    "nemotron-h": ("nemotron_h", "nemotron_h_moe"),
    "nemotron-h-moe": ("nemotron_h_moe",),
    "rwkv6-base": ("rwkv6", "rwkv6qwen2"),
    "rwkv7-base": ("rwkv7", "arwkv7"),
    # Parts beside a language model, which are no base.
    "dflash": (),
    "gemma4-assistant": (),
}
PRODUCT = re.compile(
    r"ggml_mul_mat\(\s*\w+,\s*(?:model\.layers\[[^\]]*\]|layer|model)(?:\.|->)"
    r"((?:nextn\.)?[a-z_0-9]+)"
)


def test_matrices_that_are_bypassed_are_those_of_the_source(llama_cpp_source) -> None:
    found: dict[str, set[str]] = {}
    for path in (llama_cpp_source / "src" / "models").glob("*.cpp"):
        kinds = {FIELDS.get(name, name) for name in PRODUCT.findall(path.read_text("utf-8"))}
        for architecture in FILES.get(path.stem, (path.stem,)) if kinds else ():
            found.setdefault(architecture, set()).update(kinds)
    named = {name: set(facts.bypassed) for name, facts in ARCH_FACTS.items() if facts.bypassed}
    assert named == found


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("llama", "blk.0.attn_q.weight", False),
        ("plm", "blk.0.attn_q.weight", True),
        ("deepseek2", "output.weight", True),
        ("lfm2", "blk.3.shortconv.conv.weight", True),
        ("lfm2", "blk.3.shortconv.in_proj.weight", False),
    ],
)
def test_tensor_is_looked_up_by_its_kind(architecture, name, expected) -> None:
    assert bool(why_not_adapted(architecture, name)) is expected
