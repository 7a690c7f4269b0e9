"""The PEFT reader, against PEFT itself and against damaged or richer adapters."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hf
import numpy as np
import pytest
import tiny
from refusals import refused

from qaflora_edge.errors import (
    InputFileError,
    PeftConfigError,
    SafetensorsFileError,
    UnsupportedAdapterError,
)
from qaflora_edge.peft.config import REFUSED, parse_config
from qaflora_edge.peft.folder import read_peft

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
PAIR = {A0: np.ones((4, 64), np.float32), B0: np.ones((64, 4), np.float32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tiny.TinyBase:
    return tiny.write_tiny_base(tmp_path_factory.mktemp("base") / "base.gguf", tied=False)


def write_pair(folder: Path, tensors: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """Write a folder with one module, or with other tensors."""
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tiny.write_safetensors(folder / "adapter_model.safetensors", tensors or PAIR)
    return folder


def refusal(kind: type[Exception], folder: Path) -> str:
    return refused(kind, read_peft, folder)


PATTERNS: list[dict[str, Any]] = [
    {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2, r"model\.layers\.2\.mlp.*": 6},
        "alpha_pattern": {r"layers\.[01]\.mlp\.(gate|up)_proj": 3, "k_proj": 32, "_proj": 5},
    },
    {
        "use_rslora": True,
        "lora_alpha": 6,
        "rank_pattern": {".*mlp.*": 2, "o_proj": 7, "v_proj|self_attn.k_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "o_proj|v_proj": 2.5},
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("options", PATTERNS)
def test_rank_and_scale_equal_those_of_peft(tmp_path, base, options) -> None:
    expected = hf.lora_layers(hf.peft_model(base, tmp_path, **options))
    adapter = read_peft(tmp_path)
    assert adapter.modules.keys() == expected.keys()
    for name, module in expected.items():
        ours = adapter.modules[name]
        assert ours.scale == module.scaling["default"]
        assert ours.rank == module.r["default"]
        np.testing.assert_array_equal(ours.read_a(), module.lora_A["default"].weight.detach())
        np.testing.assert_array_equal(ours.read_b(), module.lora_B["default"].weight.detach())


def test_defaults_are_those_of_peft(tmp_path) -> None:
    pair = {A0: np.ones((8, 64), np.float32), B0: np.ones((64, 8), np.float32)}
    folder = write_pair(tmp_path / "a", pair)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (module,) = read_peft(folder).modules.values()
    assert (module.rank, module.scale) == (8, 1.0)


def test_embedding_and_copies_of_its_base_weight_are_understood(tmp_path, base) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["embed_tokens", "lm_head"])
    adapter = read_peft(folder)
    embedding, head = adapter.modules["model.embed_tokens"], adapter.modules["lm_head"]
    assert embedding.is_embedding
    assert not head.is_embedding
    assert (embedding.n_in, embedding.n_out) == (base.n_vocab, base.n_embd)
    assert (head.n_in, head.n_out) == (base.n_embd, base.n_vocab)
    copy = {**PAIR, A0.replace("lora_A", "base_layer"): np.ones((64, 64), np.float32)}
    copy[A0.replace("lora_A.weight", "base_layer.bias")] = np.ones(64, np.float32)
    assert len(read_peft(write_pair(tmp_path / "b", copy)).modules) == 1


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "transformer.h.1.attn.c_attn",
    "layers.1.q_proj",
    "lm_head",
    "q_proj",
]
RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "lm_head", "model.layers.11.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj", "up_proj", "lm_head"], "layers_to_transform": [0, 11]},
]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_targets_are_those_of_peft(tmp_path, rule) -> None:
    peft = pytest.importorskip("peft")
    exists = pytest.importorskip("peft.tuners.tuners_utils").check_target_module_exists
    fields = {"peft_type": "LORA", **rule}
    ours, theirs = parse_config(tmp_path, fields), peft.LoraConfig(**rule)
    for name in NAMES:
        with nullcontext() if exists(theirs, name) else pytest.raises(PeftConfigError):
            ours.check_target(name)


def test_names_of_a_whole_state_are_understood(tmp_path, base) -> None:
    """As `model.state_dict()` has them, with the adapter's name and what wrappers put in."""
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["q_proj", "embed_tokens"])
    plain = read_peft(folder)
    load_file = pytest.importorskip("safetensors.numpy").load_file
    tensors = load_file(folder / "adapter_model.safetensors")
    state = {
        "module.base_model.model.model._orig_mod." + name.removeprefix("base_model.model.model."):
            values
        for name, values in tensors.items()
    }  # fmt: skip
    state = {
        f"{name.removesuffix('.weight')}.math.weight" if name.endswith(".weight")
        else f"{name}.math": values
        for name, values in state.items()
    }  # fmt: skip
    tiny.write_safetensors(folder / "adapter_model.safetensors", state)
    named = read_peft(folder)
    assert named.modules.keys() == plain.modules.keys()
    nested = {f"base_model.model.{name}": values for name, values in tensors.items()}
    tiny.write_safetensors(folder / "adapter_model.safetensors", nested)
    assert read_peft(folder).modules.keys() == plain.modules.keys()


FEATURES = REFUSED["fields"]
OTHER = ["only LoRA can be represented", "Merge the adapter into its base, or train a plain LoRA."]


@pytest.mark.parametrize("field", FEATURES)
def test_feature_is_refused_by_name_and_no_obstacle_where_it_is_off(tmp_path, field) -> None:
    reason, advice = FEATURES[field]
    folder = write_pair(tmp_path / "a", **{field: {"x": 1}})
    assert refusal(UnsupportedAdapterError, folder) == (
        f"Cannot use {folder / 'adapter_config.json'}: {field} is " + '{"x": 1}; '
        f"{reason}, and a plain LoRA cannot represent it. {advice}"
    )
    assert read_peft(write_pair(tmp_path / "a", **{field: False})).modules


@pytest.mark.parametrize("kind", [*REFUSED["types"], "SOMETHING_NEW"])
def test_other_peft_types_are_refused_by_name(tmp_path, kind) -> None:
    reason, advice = REFUSED["types"].get(kind, OTHER)
    folder = write_pair(tmp_path / "a", peft_type=kind)
    assert refusal(UnsupportedAdapterError, folder) == (
        f"Cannot use {folder / 'adapter_config.json'}: peft_type is {kind!r}; expected 'LORA', for "
        f"{reason}. {advice}"
    )


@pytest.mark.slow
def test_types_that_are_named_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    known = {kind.value for kind in peft.PeftType}
    assert REFUSED["types"].keys() <= known


@pytest.mark.parametrize("init", [True, None, "gaussian"])
def test_initialisation_that_leaves_the_base_alone_is_taken(tmp_path, init) -> None:
    assert read_peft(write_pair(tmp_path / "a", init_lora_weights=init)).modules


def test_tied_embedding_and_head_are_refused(tmp_path, base) -> None:
    config = {"ensure_weight_tying": True}
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["lm_head"], config=config)
    assert refusal(UnsupportedAdapterError, folder) == (
        f"Cannot use {folder / 'adapter_config.json'}: ensure_weight_tying is true and module "
        "lm_head has a LoRA; one LoRA shared by embedding and head cannot be represented. Train "
        "without it, or leave these modules out."
    )
    folder = tiny.write_tiny_peft(tmp_path / "b", base, targets=["q_proj"], config=config)
    assert read_peft(folder).modules


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
FOREIGN = {
    "base_model.model.transformer.h.0.ln_1.weight": "a norm's weight",
    f"{LAYER}.lora_magnitude_vector.math.weight": "a DoRA magnitude vector",
    f"{LAYER}.lora_B.bias": "a bias",
    "base_model.model.lm_head.base_layer.weight": "a whole weight matrix",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta":
        "single trained token embeddings",
    "base_model.model.lm_head.modules_to_save.math.weight": "a module that was trained whole",
    f"{LAYER}.hada_w1_a": "a part of LoHa",
    "prompt_embeddings": "a trained prompt",
    "base_model.model.prompt": "not known here",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_tensor_of_another_kind_is_refused_by_name(tmp_path, name) -> None:
    folder = write_pair(tmp_path / "a", {**PAIR, name: np.ones(64, np.float32)})
    advice = "Train a plain LoRA, or merge the adapter into its base."
    if FOREIGN[name] == "a whole weight matrix":
        advice = (
            "PEFT saves these whole where the vocabulary was resized or an embedding is a target. "
            "If they were not trained, save the adapter again with "
            "save_pretrained(save_embedding_layers=False); else merge it into its base."
        )
    assert refusal(UnsupportedAdapterError, folder) == (
        f"Cannot use {folder / 'adapter_model.safetensors'}: tensor {name} is {FOREIGN[name]}; "
        f"expected only lora_A and lora_B, for a plain LoRA cannot represent more. {advice}"
    )


MODULE = "model.layers.0.self_attn.q_proj"
APART = "The two files do not belong together; save the adapter again"
INIT = (
    "this initialisation changes the base's weights too, and the adapter alone does not fit the "
    "unchanged base. "
)
NOT_NAMED = (
    f"module {MODULE} has tensors, but target_modules, exclude_modules and layers_to_transform do "
    f"not name it; expected every module that has tensors. {APART}."
)
# The error, fields of the config, the tensors, the file that is named, and what is said of it.
REFUSALS: list[tuple[type[Exception], dict[str, Any], dict[str, Any], str, str]] = [
    (UnsupportedAdapterError, {"init_lora_weights": "pissa_niter_4"}, PAIR, "config.json",
     f'init_lora_weights is "pissa_niter_4"; {INIT}Save it with PEFT\'s save_pretrained('
     "path_initial_model_for_weight_conversion=...)."),
    (UnsupportedAdapterError, {"init_lora_weights": "loftq"}, PAIR, "config.json",
     f'init_lora_weights is "loftq"; {INIT}{OTHER[1]}'),
    (PeftConfigError, {"target_modules": ["k_proj"]}, PAIR, "config.json", NOT_NAMED),
    (PeftConfigError, {"target_modules": ["q_proj"], "layers_to_transform": 1}, PAIR,
     "config.json", NOT_NAMED),
    (PeftConfigError, {"exclude_modules": ["q_proj"]}, PAIR, "config.json", NOT_NAMED),
    (PeftConfigError, {"rank_pattern": {"q_proj": 8}}, PAIR, "config.json",
     f"module {MODULE} has rank 8 by r and rank_pattern, but lora_A is [4, 64] and lora_B "
     f"[64, 4]; expected [8, n_in] and [n_out, 8]. {APART}."),
    (UnsupportedAdapterError, {},
     {**PAIR, **{name.replace(".weight", ".es.weight"): PAIR[name] for name in PAIR}},
     "model.safetensors",
     "its tensors belong to several adapters, one without a name, 'es'; expected one. Load it with "
     "PEFT and save each with save_pretrained(selected_adapters=[...])."),
    (SafetensorsFileError, {}, {**PAIR, A0: np.zeros((0, 64), np.float32)}, "model.safetensors",
     f"tensor {A0} is empty, of shape [0, 64]; expected a matrix. DeepSpeed ZeRO-3 and FSDP leave "
     "such files where the parts of a matrix were not gathered before saving: save the adapter "
     "again with them gathered, for ZeRO-3 with stage3_gather_16bit_weights_on_model_save."),
    (UnsupportedAdapterError, {}, {**PAIR, A0: np.ones((4, 3, 3, 3), np.float32)},
     "model.safetensors",
     f"tensor {A0} has shape [4, 3, 3, 3]; expected a matrix. Only LoRA on linear layers and "
     "embeddings can be represented."),
    (SafetensorsFileError, {}, {A0: PAIR[A0]}, "model.safetensors",
     f"module {MODULE} has lora_A but no lora_B; expected both. The file is incomplete; save the "
     "adapter again."),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(tmp_path, case) -> None:
    kind, config, tensors, file, message = case
    folder = write_pair(tmp_path / "a", tensors, **config)
    assert refusal(kind, folder) == f"Cannot use {folder / f'adapter_{file}'}: {message}"


def test_file_that_git_lfs_left_out_is_told(tmp_path) -> None:
    path = write_pair(tmp_path / "a") / "adapter_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    assert refusal(InputFileError, path.parent).startswith(
        f"Cannot read {path}: opening or reading it failed: it is a Git LFS pointer; run `git lfs "
    )


LACKS = "adapter_config.json is missing; expected a PEFT folder. "
HEAD = "expected a PEFT folder with adapter_config.json and adapter_model.safetensors. "
PICKLE = (
    "pickles can run code; expected adapter_model.safetensors. Load it with PEFT and save it with "
    "save_pretrained(..., safe_serialization=True)."
)
SAVED = "Give the folder that PEFT's save_pretrained wrote."
# Files that there are, the path that is given, and what is said of it; {} is their folder.
FILES: list[tuple[list[str], str, str]] = [
    ([], "none", f"it does not exist; {HEAD}Check the path."),
    ([], "x" * 300, f"it cannot be examined (File name too long); {HEAD}Check the path."),
    ([], "", LACKS + SAVED),
    (["adapter_config.json"], "", f"adapter_model.safetensors is missing. {SAVED}"),
    (["adapter_config.json", "adapter_model.bin"], "", f"it has adapter_model.bin, and {PICKLE}"),
    (["adapter_config.json", "adapter_0.pt"], "", f"it has adapter_0.pt, and {PICKLE}"),
    (["adapter_config.json", "adapter_model.safetensors"], "adapter_model.safetensors",
     f"it is a file; {HEAD}Give {{}}."),
    (["a.gguf"], "a.gguf",
     f"it is a file; {HEAD}A GGUF is not converted: put an adapter GGUF in a bundle as it is, with "
     "`qaflora bundle create`."),
    (["bundle.json"], "",
     f"{LACKS}It is a bundle; of a bundle give one file, such as adapters/NAME.gguf."),
    (["math.gguf"], "", f"{LACKS}Of an adapter GGUF give the file."),
    (["adapter_model.safetensors"], "",
     f"{LACKS}Without it nobody knows the scale of adapter_model.safetensors. {SAVED}"),
    (["config.json"], "",
     f"{LACKS}It holds a whole model: a merged adapter is no adapter any more. Give the folder "
     "that was merged, or make the model itself a base with llama.cpp's convert_hf_to_gguf.py."),
]  # fmt: skip


@pytest.mark.parametrize(("files", "given", "message"), FILES)
def test_what_is_no_adapter_is_told_from_what_there_is(tmp_path, files, given, message) -> None:
    for name in files:
        (tmp_path / name).write_text('{"peft_type": "LORA"}')
    path = tmp_path / given
    text = f"Cannot read the adapter {path}: {message.format(tmp_path)}"
    assert refusal(InputFileError, path) == text


def test_of_checkpoints_the_last_is_suggested(tmp_path) -> None:
    for step in (50, 100, 1000):
        only = write_pair(tmp_path / f"checkpoint-{step}")
        if step == 50:
            assert read_peft(tmp_path).folder == only
    assert refusal(InputFileError, tmp_path) == (
        f"Cannot read the adapter {tmp_path}: it holds 3 adapters in sub-folders, checkpoint-50, "
        "checkpoint-100, checkpoint-1000; expected one. Give one of them, such as "
        f"{tmp_path / 'checkpoint-1000'}."
    )


RANKS = "a whole number from 1 to 16384"
ALPHAS = "a number from 1e-30 to 1e+30, or minus such"
FIELDS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"peft_type": None}, "field peft_type", "null", '"LORA"'),
    ({"r": 0}, "field r", "0", RANKS),
    ({"r": 10**30}, "field r", str(10**30), RANKS),
    ({"lora_alpha": 0}, "field lora_alpha", "0", ALPHAS),
    ({"lora_alpha": 1e300}, "field lora_alpha", "1e+300", ALPHAS),
    ({"use_rslora": "yes"}, "field use_rslora", '"yes"', "true or false"),
    ({"rank_pattern": [1]}, "field rank_pattern", "[1]", "an object of up to 16384 patterns"),
    ({"alpha_pattern": {"q": "x"}}, "field alpha_pattern.q", '"x"', ALPHAS),
    ({"alpha_pattern": {"[": 1}}, "a pattern", '"["',
     "a regular expression (unterminated character set at position 1)"),
    ({"rank_pattern": {"a" * 257: 1}}, "a pattern", f'"{"a" * 257}'[:77] + "...",
     "up to 256 characters"),
    ({"target_modules": [3]}, "field target_modules[0]", "3", "a name"),
    ({"layers_to_transform": [0.5]}, "field layers_to_transform[0]", "0.5", "a layer"),
    ({"bias": "some"}, "field bias", '"some"', "'none', 'all' or 'lora_only'"),
    ({"base_model_name_or_path": 1}, "field base_model_name_or_path", "1", "a name"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "field", "found", "expected"), FIELDS)
def test_wrong_field_is_named(tmp_path, config, field, found, expected) -> None:
    check_field(write_pair(tmp_path / "a", **config), field, found, expected)


def check_field(folder: Path, field: str, found: str, expected: str) -> None:
    assert refusal(PeftConfigError, folder) == (
        f"Cannot use {folder / 'adapter_config.json'}: {field} is {found}, expected {expected}"
        ". Correct the file, or save the adapter again."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"r": 1, "r": 2}', "the key 'r' is given twice"),
        (b'{"a":' + b"[" * 200_000, "it is nested too deeply"),
    ],
)
def test_config_that_is_no_json_object_is_refused(tmp_path, content, reason) -> None:
    folder = write_pair(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(content)
    assert refusal(PeftConfigError, folder) == (
        f"Cannot read {folder / 'adapter_config.json'}: {reason}; expected a JSON object. "
        "Give the folder that PEFT's save_pretrained wrote, or fetch it again."
    )


def test_patterns_that_take_long_are_refused(tmp_path, monkeypatch) -> None:
    a, b = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32)
    name = "a" * 150
    module = f"base_model.model.{name}"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    monkeypatch.setattr("qaflora_edge.peft.config._Clock.left_s", 0.05)
    folder = write_pair(tmp_path / "a", tensors, rank_pattern={"(a|aa)+$b": 4})
    assert refused(PeftConfigError, read_peft, folder) == (
        f"Cannot use {folder / 'adapter_config.json'}: matching its patterns with its modules "
        f"takes more than 1 s, expected less; it ended at {name} with (.*\\.)?((a|aa)+$b). "
        "Write the patterns with fewer repeats and alternatives, or save the adapter again."
    )
    assert len(read_peft(write_pair(folder, tensors, rank_pattern={".*a.*x": 4})).modules) == 1


def test_adapter_without_lora_is_refused(tmp_path) -> None:
    folder = write_pair(tmp_path / "a")
    tiny.write_safetensors(folder / "adapter_model.safetensors", {})
    assert refusal(SafetensorsFileError, folder) == (
        f"Cannot use the adapter {folder}: its weights hold no lora_A or lora_B; expected a "
        "trained LoRA. Save the adapter again."
    )


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, "BF16"), (-np.inf, "F16")])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, dtype) -> None:
    b = PAIR[B0].copy()
    b[3, 1] = bad
    folder = write_pair(tmp_path / "a")
    tiny.write_safetensors(folder / "adapter_model.safetensors", {A0: PAIR[A0], B0: b}, dtype)
    (module,) = read_peft(folder).modules.values()
    assert refused(SafetensorsFileError, module.read_b) == (
        f"Cannot use tensor {B0} of {folder / 'adapter_model.safetensors'}: 1 of its 256 values "
        "are NaN or infinite; expected finite numbers. The training diverged or the file is "
        "corrupted; use an earlier checkpoint."
    )
