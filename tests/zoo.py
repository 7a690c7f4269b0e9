"""Tiny models of many families with PEFT adapters, their references, and their bases as GGUF.

Written by transformers and peft; the bases and a second conversion of each adapter come from
llama.cpp's own converters at the pin. No code of the package is used here.
"""

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import mixtures
import numpy as np
import torch
from checkpoints import Checkpoint
from families import AnyFamily, Family
from specimen import F32, LAYER_WEIGHTS, TOKENS, Specimen, adapter_jobs, base_job


def find_archive(patches: Path, cache: Path) -> Path:
    """Say where the build put the source archive of the pin."""
    if given := os.environ.get("QAFLORA_SOURCE_ARCHIVE"):
        return Path(given)
    pin = tomllib.loads((patches / "UPSTREAM").read_text(encoding="utf-8"))
    return cache / "sources" / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"


def unpack_upstream(archive: Path, folder: Path) -> Path:
    """Unpack llama.cpp's converters from the binding's source archive; give their folder."""
    wanted = ("conversion/", "gguf-py/gguf/", "convert_lora_to_gguf.py")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if name.startswith(wanted) and member.isfile():
                member.name = name
                tar.extract(member, folder, filter="data")
    return folder


def build(families: Iterable[AnyFamily], upstream: Path, folder: Path) -> dict[str, Specimen]:
    """Make every family's specimen, with one run of upstream's converters for all of them."""
    torch.set_num_threads(1)  # threads cost more than they bring at these sizes
    specimens = {}
    jobs: list[dict[str, object]] = []
    with warnings.catch_warnings():  # of peft and transformers about themselves
        warnings.simplefilter("ignore")
        for index, family in enumerate(families):
            if isinstance(family, Checkpoint):
                specimen = checkpoints.write(family, folder / f"{index}")
                jobs += checkpoints.jobs(specimen)
            else:
                specimen = _build_one(family, folder / f"{index}")
                jobs += [base_job(specimen.hf, specimen.base), *adapter_jobs(specimen)]
            specimens[family.name] = specimen
    jobs_path = folder / "jobs.json"
    jobs_path.write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("upstream_convert.py")
    done = subprocess.run(
        [sys.executable, script, upstream, jobs_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, specimen in specimens.items():
        error = specimen.base.with_name("base.gguf.error")
        assert not error.exists(), f"{name}: {error.read_text('utf-8')}"
        if isinstance(specimen.family, Checkpoint):
            specimens[name] = checkpoints.measured(specimen)
    return specimens


def make_model(family: Family) -> Any:
    """Make a float32 model whose activations and logits have a spread of about one."""
    import transformers

    config = getattr(transformers, family.config)(**family.options)
    config.architectures = [family.model]
    torch.manual_seed(0)
    model = getattr(transformers, family.model)._from_config(config, attn_implementation="eager")
    model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name or ".ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def linear_modules(model: Any, family: Family) -> list[str]:
    """Name the language model's linear layers, without experts and heads."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not any(part in name for part in (".experts", "vision", "visual", "projector"))
    ]
    if family.targets is None:
        return names
    return [name for name in names if name.endswith(family.targets)]


def _build_one(family: Family, folder: Path) -> Specimen:
    import peft
    from transformers.pytorch_utils import Conv1D

    model = make_model(family)
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "upstream.json").write_text(json.dumps(family.restored), encoding="utf-8")
    vocabulary = {str(token): token for token in range(model.get_input_embeddings().num_embeddings)}
    (folder / "hf" / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}), encoding="utf-8"
    )
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    targets = linear_modules(model, family)
    first, last = (name.rpartition(".")[2] for name in (targets[0], targets[-1]))
    options: dict[str, dict[str, Any]] = {
        "projections": {"target_modules": targets},
        "scales": {
            "target_modules": targets,
            "use_rslora": True,
            "rank_pattern": {first: 7},
            "alpha_pattern": {last: 3},
        },
        "embedding": {"target_modules": [names[id(model.get_input_embeddings())]]},
        "head": {"target_modules": [names[id(model.get_output_embeddings())]]},
    }
    if parameters := mixtures.expert_parameters(model):
        options["experts"] = {"target_modules": [], "target_parameters": parameters}
    logits: dict[str, F32] = {}
    states, expert_states = np.empty(0, np.float32), None
    for adapter, more in options.items():
        is_conv = any(isinstance(modules[name], Conv1D) for name in more["target_modules"])
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, fan_in_fan_out=is_conv, **more
        )
        wrapped = peft.get_peft_model(model, config)
        wrapped.create_or_update_model_card = lambda folder: None  # which takes longest to save
        randomise(wrapped)
        wrapped.eval()
        wrapped.save_pretrained(folder / "peft" / adapter)
        logits[adapter] = last_logits(wrapped)
        if adapter == "projections":
            with wrapped.disable_adapter():
                logits["base"] = last_logits(wrapped)
            states = last_states(wrapped)
            scale_layers(wrapped)
            logits["per layer"] = last_logits(wrapped)
        if adapter == "experts":
            expert_states = last_states(wrapped)
            scale_layers(wrapped)
            logits["experts per layer"] = last_logits(wrapped)
        model = wrapped.unload()
    merged = mixtures.write_single_experts(model, folder / "peft" / "single experts", last_logits)
    if merged is not None:
        logits["single experts"] = merged
    return Specimen(family, folder, logits, states, expert_states)


def randomise(wrapped: Any) -> None:
    """Give A and B values under which an adapter moves what it adapts by about half of it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, 0.1)


def blocks_of(wrapped: Any) -> Sequence[Any]:
    found = [
        module
        for name, module in wrapped.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.rpartition(".")[2] in ("layers", "h", "blocks")
        and not any(part in name for part in ("vision", "visual"))
    ]
    (blocks,) = found
    return blocks


@torch.inference_mode()
def last_logits(wrapped: Any) -> F32:
    """Give the logits after TOKENS: [n_vocab]."""
    return wrapped(input_ids=torch.tensor([TOKENS])).logits[0, -1].numpy()


def last_states(wrapped: Any) -> F32:
    """Give the last token's state after each block: [n_layer, n_embd]."""
    kept: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    hooks = [block.register_forward_hook(keep) for block in blocks_of(wrapped)]
    last_logits(wrapped)
    for hook in hooks:
        hook.remove()
    return torch.stack(kept).numpy()


def scale_layers(wrapped: Any) -> None:
    """Weigh the adapter by LAYER_WEIGHTS, in PEFT's own scaling."""
    for block, weight in zip(blocks_of(wrapped), LAYER_WEIGHTS, strict=False):
        for module in block.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= weight
