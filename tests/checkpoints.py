"""Families whose code is not in transformers, written as the files that their owners publish.

The reference of an adapter is the checkpoint that has it merged, in float64, converted by
llama.cpp's own converter and run without adapters. No code of the package is used here, but to
load models.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from specimen import F32, LAYER_WEIGHTS, TOKENS, Specimen, adapter_jobs, base_job
from stock import StockContext

from qaflora_edge import Engine
from qaflora_edge.backend.model import Model
from qaflora_edge.formats.base import read_base

# llama.cpp looks GELU up in a table of float16, and some of its other kernels round as well: bases
# without any adapter are then this far from transformers, relative to the largest logit.
EXACT = 1e-5
ROUNDED = 3e-3

N_LAYER = 2
RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Checkpoint:
    """A family as its published files have it.

    config    config.json
    linear    name of a module that is adapted -> n_out, n_in; "{}" is the block's number
    others    name of a tensor beside those -> its shape; "{}" likewise
    head      None where it is always the embedding, of which an adapter cannot be merged
    upstream  why upstream's adapter is another, if it is
    """

    name: str
    arch: str
    config: Mapping[str, Any]
    linear: Mapping[str, tuple[int, int]]
    others: Mapping[str, tuple[int, ...]]
    embedding: str
    head: str | None
    tolerance: float
    upstream: str = ""

    @property
    def n_vocab(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def n_embd(self) -> int:
        return next(n_in for _, n_in in self.linear.values())  # of the first projection


def write(family: Checkpoint, folder: Path) -> Specimen:
    """Write the checkpoint, its adapters, and the checkpoints that have them merged."""
    rng = np.random.default_rng(0)
    weights = _weights(family, rng)
    _write_checkpoint(family, folder / "hf", weights)
    specimen = Specimen(family, folder, {}, np.empty(0, np.float32))
    for adapter, pairs, fields in _adapters(family, rng):
        _write_peft(specimen.peft(adapter), pairs, fields)
        merged = _merged(weights, pairs, fields, lambda _: 1.0)
        _write_checkpoint(family, folder / "merged" / adapter, merged)
        if adapter == "projections":
            merged = _merged(weights, pairs, fields, lambda name: LAYER_WEIGHTS[_layer(name)])
            _write_checkpoint(family, folder / "merged" / "per layer", merged)
    return specimen


def jobs(specimen: Specimen) -> list[dict[str, object]]:
    """What upstream_convert is to make of the files."""
    merged = (specimen.folder / "merged").iterdir()
    return [
        base_job(specimen.hf, specimen.base),
        *(base_job(hf, specimen.folder / f"merged {hf.name}.gguf") for hf in merged),
        *adapter_jobs(specimen),
    ]


def measured(specimen: Specimen) -> Specimen:
    """Run what was merged, by llama.cpp without adapters."""
    names = [path.name for path in (specimen.folder / "merged").iterdir()]
    paths = {which: specimen.folder / f"merged {which}.gguf" for which in names}
    logits = {which: _logits(path) for which, path in {**paths, "base": specimen.base}.items()}
    with Engine(base=paths["projections"], n_ctx=64, kv_type="f32", flash_attn=False) as engine:
        states = engine.hidden_states(TOKENS)
    return replace(specimen, logits=logits, states=states)


def _logits(path: Path) -> F32:
    """returns  [n_vocab]  after TOKENS"""
    with Model(read_base(path)) as model:
        context = StockContext(model, n_ctx=64)
        try:
            return context.decode(TOKENS)
        finally:
            context.close()


def _weights(family: Checkpoint, rng: np.random.Generator) -> dict[str, F32]:
    """Make all tensors: matrices whose products have a spread of about one, norms around one."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": shape for name, shape in family.linear.items()
    }
    shapes |= family.others
    weights = {
        name.format(layer): _random(rng, name, shape)
        for layer in range(N_LAYER)
        for name, shape in shapes.items()
        if layer == 0 or "{}" in name
    }
    for name in filter(None, (family.embedding, family.head)):
        weights[f"{name}.weight"] = _random(rng, name, (family.n_vocab, family.n_embd))
    return weights


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> F32:
    values = rng.standard_normal(shape)
    if len(shape) > 1:
        values *= shape[-1] ** -0.5
    elif name.endswith("bias"):
        values *= 0.1
    else:
        values = 1 + 0.1 * values
    return values.astype(np.float32)


Pairs = Mapping[str, tuple[F32, F32]]  # module -> A [rank, n_in], B [n_out, rank]


def _adapters(
    family: Checkpoint, rng: np.random.Generator
) -> list[tuple[str, Pairs, dict[str, Any]]]:
    """Make each adapter: its name, its pairs and the fields of its config."""
    modules = {
        name.format(layer): shape
        for layer in range(N_LAYER)
        for name, shape in family.linear.items()
    }
    first, last = (name.rpartition(".")[2] for name in (*modules,)[:: len(modules) - 1])
    outside = (family.n_vocab, family.n_embd)
    patterns = {"use_rslora": True, "rank_pattern": {first: 7}, "alpha_pattern": {last: 3}}
    made: list[tuple[str, Pairs, dict[str, Any]]] = []
    for adapter, shapes, fields in (
        ("projections", modules, {}),
        ("scales", modules, patterns),
        ("embedding", {family.embedding: outside[::-1]} if family.head else {}, {}),
        ("head", {family.head: outside} if family.head else {}, {}),
    ):
        pairs: dict[str, tuple[F32, F32]] = {}
        for name, (n_out, n_in) in shapes.items():
            rank = _of(fields, "rank_pattern", name, RANK)
            a = rng.standard_normal((rank, n_in)) * n_in**-0.5
            b = rng.standard_normal((n_out, rank)) * 0.1
            pairs[name] = (a.astype(np.float32), b.astype(np.float32))
        if pairs:
            made.append((adapter, pairs, {**fields, "target_modules": list(shapes)}))
    return made


def _of(fields: Mapping[str, Any], pattern: str, name: str, default: int) -> int:
    """Look a module up in a pattern whose keys are ends of names."""
    value: int = fields.get(pattern, {}).get(name.rpartition(".")[2], default)
    return value


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _merged(
    weights: Mapping[str, F32],
    pairs: Pairs,
    fields: Mapping[str, Any],
    weigh: Callable[[str], float],
) -> dict[str, F32]:
    """Add `weigh(module) * scale * B A` to each weight, in float64."""
    merged = dict(weights)
    for name, (a, b) in pairs.items():
        alpha = _of(fields, "alpha_pattern", name, ALPHA)
        scale = alpha / (len(a) ** 0.5 if fields.get("use_rslora") else len(a))
        delta = weigh(name) * scale * (b.astype(np.float64) @ a.astype(np.float64))
        weight = merged[f"{name}.weight"]
        delta = delta if delta.shape == weight.shape else delta.T  # of an embedding
        merged[f"{name}.weight"] = (weight + delta).astype(np.float32)
    return merged


def _write_checkpoint(family: Checkpoint, folder: Path, weights: Mapping[str, F32]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family.config), encoding="utf-8")
    tiny.write_safetensors(folder / "model.safetensors", weights)


def _write_peft(folder: Path, pairs: Pairs, fields: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    tensors: dict[str, F32] = {}
    for name, (a, b) in pairs.items():
        is_embedding = len(pairs) == 1 and a.shape[1] > b.shape[0]
        for side, values in (("A", a), ("B", b)):
            end = f"lora_embedding_{side}" if is_embedding else f"lora_{side}.weight"
            tensors[f"base_model.model.{name}.{end}"] = values
    tiny.write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
