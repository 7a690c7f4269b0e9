"""What is fuzzed: a folder of seeds for each reader, and what the reader must do with damage.

A check returns when the reader accepted a case and raises a QafloraError when it refused it.
Whatever else it raises is a finding, as are a crash, a hang and too much memory.
"""

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from fuzz.mutate import Case
from qaflora_edge.ask import Ask
from qaflora_edge.bundles.modelfile import read_modelfile
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import ChatTemplateError, InputFileError
from qaflora_edge.formats.adapter import check_adapter, read_adapter_gguf, read_pair
from qaflora_edge.formats.document import document_text, read_pdf
from qaflora_edge.formats.gguf import read_gguf_header, read_values
from qaflora_edge.inference.constraint import schema_grammar
from qaflora_edge.peft.config import parse_config
from qaflora_edge.peft.folder import read_fields, read_peft
from qaflora_edge.peft.modules import read_safetensors
from qaflora_edge.prompt.conversation import load_session
from qaflora_edge.prompt.template import render

MODULES = ("model.layers.0.self_attn.q_proj", "a" * 60 + "b", "lm_head")
SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": 32}


@dataclass(frozen=True)
class Target:
    """One reader: cases to begin with, made in an empty folder, and the check of a case.

    check  takes the folder of a case, and a folder with the undamaged seeds
    """

    seeds: Callable[[Path], list[Case]]
    check: Callable[[Path, Path], None]


def read_case(folder: Path) -> Case:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "reason.txt"
    }


@cache
def _base(place: Path) -> tiny.TinyBase:
    return tiny.write_tiny_base(place / "base.gguf", **SMALL)


def _written(place: Path, base: tiny.TinyBase, *options: Mapping[str, Any]) -> list[Case]:
    path = place / "adapter.gguf"
    return [
        {"a.gguf": tiny.write_tiny_adapter(path, base, **each).path.read_bytes()}
        for each in options
    ]


def _adapters(place: Path) -> list[Case]:
    return _written(
        place,
        _base(place),
        {"targets": ("attn_q",), "layers": (0,), "rank": 2},
        {"targets": ("token_embd", "output", "ffn_down"), "rank": 3, "outtype": "f16"},
        {"targets": ("attn_k", "attn_v"), "rank": 32, "outtype": "q8_0"},
    )


def _pefts(place: Path) -> list[Case]:
    base = _base(place)
    options: tuple[Mapping[str, Any], ...] = (
        {"targets": ("q_proj",), "layers": (0,), "rank": 2},
        {"targets": ("k_proj", "embed_tokens"), "use_rslora": True, "dtype": "BF16", "rank": 2},
        {
            "targets": ("q_proj", "down_proj"),
            "rank_pattern": {"q_proj": 3, r"layers\.(0|1)\.mlp\.down_proj": 5},
            "alpha_pattern": {".*q_proj": 16.0},
            "dtype": "F16",
        },
    )
    return [
        read_case(tiny.write_tiny_peft(place / f"peft{index}", base, **option))
        for index, option in enumerate(options)
    ]


@cache
def _mixture(place: Path) -> tiny.TinyBase:
    return tiny.write_tiny_base(place / "mixture.gguf", n_expert=3, **SMALL)


def _expert_adapters(place: Path) -> list[Case]:
    return _written(
        place,
        _mixture(place),
        {"targets": ("ffn_up_exps",), "layers": (0,), "rank": 2},
        {"targets": ("ffn_gate_exps", "ffn_down_exps", "attn_q"), "rank": 3, "outtype": "f16"},
        {"targets": ("ffn_down_exps",), "layers": (1,), "rank": 32, "outtype": "q8_0"},
    )


def _expert_pefts(place: Path) -> list[Case]:
    """Experts one by one, and stacked in a parameter."""
    _mixture(place)
    experts = "model.layers.0.mlp.experts"
    one = {f"{experts}.1.up_proj": ((2, 32), (32, 2)), f"{experts}.2.w2": ((2, 32), (32, 2))}
    stacked = {f"{experts}.base_layer": ((6, 32), (64, 6)), experts: ((6, 32), (32, 6))}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    cases = []
    for modules, parameters in ((one, None), (stacked, targets)):
        pairs = {name: (np.ones(a), np.ones(b)) for name, (a, b) in modules.items()}
        config = {"r": 2, "target_parameters": parameters, "peft_version": "0.21.2"}
        cases.append(read_case(tiny.write_pairs_of_peft(place / "pairs", pairs, **config)))
    up = "model.layers.0.mlp.switch_mlp.up_proj"
    of_mlx = {"a": (3, 2, 32), "b": (3, 32, 2)}
    tensors = {f"{up}.lora_{side}": np.ones(of_mlx[side], np.float32) for side in "ab"}
    tiny.write_safetensors(place / "weights", tensors)
    content = json.dumps({"lora_parameters": {"rank": 2, "scale": 20.0}}).encode()
    weights = (place / "weights").read_bytes()
    cases.append({"adapter_config.json": content, "adapters.safetensors": weights})
    return cases


def _parts_of_pefts(suffix: str, place: Path) -> list[Case]:
    return [
        {name: data for name, data in case.items() if name.endswith(suffix)}
        for case in _pefts(place)
    ]


def _mlx(place: Path) -> list[Case]:
    rng = np.random.default_rng(0)
    tensors = {
        f"{MODULES[0]}.lora_a": rng.standard_normal((32, 4)).astype(np.float32),
        f"{MODULES[0]}.lora_b": rng.standard_normal((4, 32)).astype(np.float32),
    }
    tiny.write_safetensors(place / "adapters.safetensors", tensors)
    config = {
        "fine_tune_type": "lora",
        "model": "tiny",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }
    weights = (place / "adapters.safetensors").read_bytes()
    return [{"adapter_config.json": json.dumps(config).encode(), "adapters.safetensors": weights}]


def _sessions(place: Path) -> list[Case]:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "finish_reason": "stop"},
    ]
    bundle = {"name": "demo", "base_sha256": "0" * 64, "adapters": {"math": "1" * 64}}
    session = {
        "format": "qaflora-session/1",
        "bundle": bundle,
        "strategy": "qa-flora",
        "adapters": ["math"],
        "messages": messages,
    }
    return [{"session.json": json.dumps(session).encode()}]


def _schemas(place: Path) -> list[Case]:
    item = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": -3, "maximum": 99}},
    }
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "kind": {"enum": ["a", "b", 1, None]},
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 3},
        },
        "required": ["name"],
        "additionalProperties": False,
        "$defs": {"item": item},
    }
    return [{"schema.json": json.dumps(schema).encode()}]


def _models(place: Path) -> list[Case]:
    """Bases that run, with one and two kinds of layers and both kinds of vocabulary."""
    path = place / "model.gguf"
    options: tuple[Mapping[str, Any], ...] = (
        {},
        {"arch": "qwen2", "tied": False, "dtype": "q8_0"},
        {"arch": "gemma3", "n_layer": 2, "spm": True},
    )
    cases = []
    for option in options:
        tiny.write_tiny_base(path, **{**SMALL, "n_layer": 1, **option})
        cases.append({"a.gguf": path.read_bytes()})
    return cases


def _bundles(place: Path) -> list[Case]:
    from qaflora_edge.bundles.create import create_bundle

    base = _base(place)
    adapter = tiny.write_tiny_adapter(place / "es.gguf", base, layers=(0,), targets=("attn_q",))
    create_bundle(place / "bundle", base.path, {"es": adapter.path}, name="tiny")
    text = json.loads((place / "bundle/bundle.json").read_bytes())
    text["fusion"]["typical"] = {"es": {"norm": [0.5, 1.0], "raw": [0.25, 2.0]}}
    return [{**read_case(place / "bundle"), "bundle.json": json.dumps(text).encode()}]


def _modelfiles(place: Path) -> list[Case]:
    base = _base(place)
    adapter = tiny.write_tiny_adapter(place / "es.gguf", base, layers=(0,), targets=("attn_q",))
    text = f"""# mine
FROM {base.path}
ADAPTER {adapter.path}
SYSTEM \"\"\"
You sell rugs.

Be short.\"\"\"
PARAMETER temperature 0.5
PARAMETER stop "###"
PARAMETER num_predict -1
PARAMETER num_ctx 4096
LICENSE MIT
MESSAGE user "Is Toronto in Canada?"
MESSAGE assistant yes
"""
    return [{"Modelfile": text.encode()}, {"Modelfile": text.encode("utf-16")}]


def pdf(objects: list[bytes]) -> bytes:
    """Put a PDF together, with its table of places."""
    data = b"%PDF-1.7\n"
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    begin = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"<</Size %d/Root 1 0 R>>" % (len(objects) + 1)
    return data + b"trailer\n%s\nstartxref\n%d\n%%%%EOF\n" % (trailer, begin)


def _documents(place: Path) -> list[Case]:
    """Texts, and PDFs with a stream as it is, packed, spelt out, and with a table of characters."""
    shown = b"BT /F1 12 Tf 72 720 Td (The thing on a ring) Tj 0 -14 Td [(of) -250 (two)] TJ ET"
    packed = zlib.compress(shown)
    table = (
        b"begincmap 1 beginbfrange <41> <5A> <0041> endbfrange 1 beginbfchar <61> <0061> endbfchar"
    )
    streams = {
        b"": shown,
        b"/Filter/FlateDecode": packed,
        b"/Filter/ASCIIHexDecode": shown.hex().encode() + b">",
        b"/Filter[/ASCII85Decode/FlateDecode]": base64.a85encode(packed) + b"~>",
    }
    cases: list[Case] = [{"a.txt": b"The thing.\r\n"}, {"a.txt": "wide é".encode("utf-16")}]
    for keys, stream in streams.items():
        objects = [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
            b"/Resources<</Font<</F1 5 0 R>>>>>>",
            b"<</Length %d%s>>\nstream\n%s\nendstream" % (len(stream), keys, stream),
            b"<</Type/Font/Subtype/TrueType/BaseFont/X/Encoding/WinAnsiEncoding/ToUnicode 6 0 R>>",
            b"<</Length %d>>\nstream\n%s\nendstream" % (len(table), table),
        ]
        cases.append({"a.pdf": pdf(objects)})
    return cases


def _templates(place: Path) -> list[Case]:
    return [{"a.jinja": text.encode()} for text in (tiny.CHATML, tiny.QWEN)]


TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}},
}
SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
WEIGHED = {"model": "m", "fusion": {"strategy": "static", "weights": {"math": 0.5}}, "seed": 1}
BODIES: Mapping[str, Mapping[str, Any]] = {
    "chat": {
        **WEIGHED,
        "messages": [*SAID, {"role": "assistant", "content": "A"}, {"role": "user", "content": []}],
        "tools": [TOOL],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
        "logit_bias": {"5": 1.5},
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 4,
    },
    "text": {**WEIGHED, "prompt": ["a", "b"], "n": 2, "logprobs": 1, "echo": False},
    "completion": {**WEIGHED, "prompt": [1, 2, 3], "n_predict": 4, "lora": [{"id": 0, "scale": 1}]},
    "infill": {"input_prefix": "def f(", "input_suffix": "return", "n_predict": 4},
    "responses": {
        **WEIGHED,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "instructions": "Be brief.",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
    },
    "messages": {
        "model": "m",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "tools": [{"name": "look", "description": "Look.", "input_schema": {"type": "object"}}],
        "stop_sequences": ["x"],
    },
    "ollama": {
        "model": "m",
        "messages": SAID,
        "options": {"num_predict": 4, "temperature": 0.5, "stop": ["x"]},
        "format": "json",
        "think": False,
    },
    "generate": {"model": "m", "prompt": "Hi", "system": "Be brief.", "options": {"top_k": 3}},
}


def _bodies(place: Path) -> list[Case]:
    return [{f"{name}.json": json.dumps(body).encode()} for name, body in BODIES.items()]


# --- checks ---------------------------------------------------------------------------------


def _check_safetensors(folder: Path, place: Path) -> None:
    for path in folder.glob("*.safetensors"):
        for tensor in read_safetensors(path).values():
            values = tensor.read()
            assert values.shape == tensor.shape
            assert np.isfinite(values).all()


def _check_config(folder: Path, place: Path) -> None:
    folder, fields = read_fields(folder)
    config = parse_config(folder / "adapter_config.json", fields)
    for module in MODULES:
        size = config.size_of(module)
        assert 1 <= size.rank <= 1 << 14
        assert np.isfinite(np.float32(size.scale))


def _check_peft(folder: Path, place: Path) -> None:
    for module in read_peft(folder).modules.values():
        n_rank = module.rank * max(1, module.n_expert)
        assert module.read_a().shape == (n_rank, module.n_in)
        by_expert = (module.n_expert * module.n_out, module.rank)
        shape = by_expert if module.is_b_by_expert else (module.n_out, n_rank)
        assert module.read_b().shape == shape


def _check_adapter(folder: Path, place: Path, base: str = "base.gguf") -> None:
    info = read_adapter_gguf(folder / "a.gguf")
    check_adapter(info, read_gguf_header(place / base))
    for name in info.ranks:
        a, b, _ = read_pair(info, name)
        assert a.ndim == b.ndim == (3 if "exps." in name else 2)


def _check_base(folder: Path, place: Path) -> None:
    header = read_gguf_header(folder / "a.gguf")
    counts = (header.n_layer, header.n_embd, header.n_head, header.n_head_kv, header.n_vocab)
    assert min(counts) >= 1
    for info in header.tensors.values():
        assert read_values(header.path, info).shape == info.shape


def _check_bundle(folder: Path, place: Path) -> None:
    bundle = load_bundle(folder)
    inside = folder.resolve()
    for path in bundle.adapter_paths.values():
        assert path.resolve().is_relative_to(inside)


def _check_convert(folder: Path, place: Path, base: str = "base.gguf") -> None:
    """What is converted can be read again and fits; a refusal leaves no file."""
    out = place / "converted.gguf"
    out.unlink(missing_ok=True)
    try:
        convert_adapter(folder, place / base, out)
    except BaseException:
        assert not out.exists()
        raise
    finally:
        assert not list(place.glob(".tmp-*"))
    check_adapter(read_adapter_gguf(out), read_gguf_header(place / base))


def _check_session(folder: Path, place: Path) -> None:
    load_session(folder / "session.json").messages("")


def _check_schema(folder: Path, place: Path) -> None:
    """A schema that is taken becomes a grammar that llguidance takes."""
    try:
        schema = json.loads((folder / "schema.json").read_bytes())
    except (ValueError, RecursionError):
        return  # JSON is not read by what is tested here
    schema_grammar(schema)


def _check_native_adapter(folder: Path, place: Path, base: str = "base.gguf") -> None:
    """An adapter that we accept is loaded and used by the library without harm."""
    from fuzz.native import use_adapter

    _check_adapter(folder, place, base)
    use_adapter(place / base, folder / "a.gguf")


def _check_native_base(folder: Path, place: Path) -> None:
    """A base that we accept is refused by the library or used, and never ends the process."""
    from fuzz.native import use_base

    use_base(folder / "a.gguf")


def _check_native_experts(folder: Path, place: Path) -> None:
    _check_native_adapter(folder, place, "mixture.gguf")


def _check_expert_pefts(folder: Path, place: Path) -> None:
    _check_peft(folder, place)
    _check_convert(folder, place, "mixture.gguf")


def _check_modelfile(folder: Path, place: Path) -> None:
    modelfile = read_modelfile(folder / "Modelfile")
    assert len(modelfile.adapters) <= 256 * 4


def _check_document(folder: Path, place: Path) -> None:
    """A PDF is read in this process: in that of its own nothing would be seen."""
    for path in folder.glob("a.*"):
        data = path.read_bytes()
        if path.suffix == ".txt":
            document_text(path.name, data)
            continue
        answer = read_pdf(data)
        if "text" not in answer:
            raise InputFileError(answer["fault"])
        json.dumps(answer).encode()


def _check_template(folder: Path, place: Path) -> None:
    """A template may fail in any way, but within its budget, and it gives a text."""
    text = (folder / "a.jinja").read_bytes().decode("utf-8", "replace")
    messages = [*SAID, {"role": "assistant", "content": "A"}]
    try:
        rendered = render(text, bos_token="<s>", eos_token="</s>", messages=messages, tools=[TOOL])
    except Exception as error:
        raise ChatTemplateError(f"{type(error).__name__}: {error}") from error
    assert isinstance(rendered, str)


def _check_bodies(folder: Path, place: Path) -> None:
    """A body of a request is refused by its field, or becomes an Ask."""
    from qaflora_edge.dialects import anthropic, ollama, openai_chat, openai_responses, texts
    from qaflora_edge.server.receive import _parsed
    from qaflora_edge.server.refusals import Refusal

    dialects = {
        "chat": openai_chat.CHAT,
        "text": texts.COMPLETIONS,
        "completion": texts.COMPLETION,
        "infill": texts.INFILL,
        "responses": openai_responses.RESPONSES,
        "messages": anthropic.MESSAGES,
        "ollama": ollama.CHAT,
        "generate": ollama.GENERATE,
    }
    for path in folder.glob("*.json"):
        dialect = dialects[path.stem]
        try:
            body = _parsed(dialect.body, path.read_bytes())
        except Refusal as refusal:
            raise InputFileError(str(refusal)) from refusal
        dialect.asks(body, Ask(()))


TARGETS: Mapping[str, Target] = {
    "modelfile": Target(_modelfiles, _check_modelfile),
    "document": Target(_documents, _check_document),
    "template": Target(_templates, _check_template),
    "bodies": Target(_bodies, _check_bodies),
    "safetensors": Target(partial(_parts_of_pefts, ".safetensors"), _check_safetensors),
    "config": Target(partial(_parts_of_pefts, ".json"), _check_config),
    "peft": Target(_pefts, _check_peft),
    "mlx": Target(_mlx, _check_peft),
    "convert": Target(_pefts, _check_convert),
    "adapter": Target(_adapters, _check_adapter),
    "base": Target(_models, _check_base),
    "bundle": Target(_bundles, _check_bundle),
    "session": Target(_sessions, _check_session),
    "schema": Target(_schemas, _check_schema),
    "native": Target(_adapters, _check_native_adapter),
    "model": Target(_models, _check_native_base),
    "experts": Target(_expert_adapters, _check_native_experts),
    "expert-pefts": Target(_expert_pefts, _check_expert_pefts),
}
