"""Verification of a conversion: what is right passes, what is wrong is found and not kept."""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from refusals import refused

from qaflora_edge.convert import adapter as convert
from qaflora_edge.convert.adapter import convert_adapter, stored_type
from qaflora_edge.convert.plan import plan_modules
from qaflora_edge.convert.planned import PlannedModule
from qaflora_edge.convert.verify import verify_conversion
from qaflora_edge.errors import ConversionError
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.peft.folder import read_peft

MODULES = 3 * 7
ALL = [*tiny.HF_TARGETS, "embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("arch", "rank", "outtype"),
    [("llama", 3, "f32"), ("llama", 3, "f16"), ("qwen2", 3, "bf16"), ("llama", 64, "q8_0")],
)
def test_what_was_converted_is_within_rounding(tmp_path, arch, rank, outtype) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", arch, tied=False)
    options = {"use_rslora": True, "alpha_pattern": {"q_proj": 5, "down_proj": 0.25}}
    folder = tiny.write_tiny_peft(tmp_path / "a", base, rank=rank, targets=ALL, **options)
    steps: list[tuple[int, int]] = []
    options = {"outtype": outtype, "progress": lambda *step: steps.append(step)}
    converted = convert_adapter(folder, base.path, tmp_path / "out.gguf", verify=True, **options)
    n_module = MODULES + 2
    assert steps == [(done, 2 * n_module) for done in range(1, 2 * n_module + 1)]
    assert len(converted.checks) == n_module
    assert {check.module for check in converted.checks} == read_peft(folder).modules.keys()
    for check in converted.checks:
        assert 0 <= check.of_allowed <= 1
        assert check.is_right
        # The bound must be near enough to find mistakes: rounding uses a good part of it.
        if outtype != "f32" and rank == 3:
            assert check.of_allowed > 0.05


def test_differences_are_those_of_a_and_b(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", "qwen2")
    folder = tiny.write_tiny_peft(tmp_path / "a", base, alpha=6, targets=["v_proj"])
    out = tmp_path / "out.gguf"
    converted = convert_adapter(folder, base.path, out, outtype="bf16", verify=True)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    load_file = pytest.importorskip("safetensors.numpy").load_file
    source = load_file(folder / "adapter_model.safetensors")
    for layer, check in enumerate(converted.checks):
        name, stem = f"model.layers.{layer}.self_attn.v_proj", f"blk.{layer}.attn_v.weight"
        assert (check.module, check.tensor) == (name, stem)
        differences = []
        for side in "ab":
            values = source[f"base_model.model.{name}.lora_{side.upper()}.weight"]
            tensor = stored[f"{stem}.lora_{side}"]
            read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            differences.append(np.abs(read - values).max())
        assert check.largest_difference == pytest.approx(max(differences), rel=1e-6)


Change = Callable[[Any], Any]
MISTAKES: dict[str, tuple[str, Change]] = {
    "rows in HF's order": ("b", lambda b: b[np.argsort(b[:, 0], kind="stable")]),
    "scale off by a hundredth": ("b", lambda b: b * np.float32(1.01)),
    "columns of A rolled": ("a", lambda a: np.roll(a, 1, axis=1)),
    "one value lost": ("a", lambda a: np.where(a == a.max(), 0, a)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_mistake_is_found_and_the_older_file_kept(tmp_path, monkeypatch, mistake, outtype) -> None:
    wrong_side, change = MISTAKES[mistake]
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["q_proj", "up_proj"], layers=[0])
    original = convert.encoded_tensor

    def wrong(module: PlannedModule, side: str, wanted: Any) -> Any:
        encoded = original(module, side, wanted)
        if module.target != "attn_q" or side != wrong_side:
            return encoded
        kind = stored_type(module.shape(side)[-1], wanted)
        values = gguf.quants.dequantize(encoded, kind).astype(np.float32)
        return gguf.quants.quantize(np.ascontiguousarray(change(values), np.float32), kind)

    monkeypatch.setattr(convert, "encoded_tensor", wrong)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"older")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError) as caught:
        convert_adapter(folder, base.path, out, outtype=outtype, verify=True)
    assert out.read_bytes() == b"older"
    assert sorted(tmp_path.iterdir()) == before
    right, wrong_check = sorted(caught.value.checks, key=lambda check: check.of_allowed)
    assert right.is_right
    assert right.tensor == "blk.0.ffn_up.weight"
    assert not wrong_check.is_right
    assert str(caught.value) == (
        f"The conversion is wrong: 1 of 2 modules differ from {folder}, most of all "
        "model.layers.0.self_attn.q_proj (blk.0.attn_q.weight), by "
        f"{wrong_check.largest_difference:.3g}, {wrong_check.of_allowed:.3g} times what rounding "
        "explains; expected at most once. Nothing was kept; please report this."
    )


def test_missing_module_is_found(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    folder = tiny.write_tiny_peft(tmp_path / "a", base)
    header = read_gguf_header(base.path)
    _, modules = plan_modules(read_peft(folder), header)
    convert_adapter(folder, base.path, tmp_path / "out.gguf")
    verify_conversion(tmp_path / "out.gguf", modules)
    assert refused(ConversionError, verify_conversion, tmp_path / "out.gguf", modules[1:]) == (
        f"The conversion is wrong: tensor {modules[0].base_name} is there in the file; expected "
        "the 20 modules of the adapter. Nothing was kept; please report this."
    )
