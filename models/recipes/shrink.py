"""Make trained adapters small: fewer ranks, those that matter most for what modules read.

    python models/recipes/shrink.py math=OUT/math es=OUT/es --base BASE.gguf --data DATA -o SMALL
    qaflora convert SMALL/math --base BASE.gguf --outtype q8_0 -o math.gguf --verify

RECIPE=FOLDER is a PEFT adapter, and the recipe that it was trained by. The base reads a few
examples of all these recipes. Of each module those directions are kept that change its outputs most
there. From rank 16 to 5 a quarter of what an adapter adds goes, measured so, where the plain
singular values of BA would lose half (models/README.md says what that costs).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import RECIPES, examples_of, load, tokens_of

OWN = 0.6  # of what an adapter is measured on comes from its own recipe
PREFIX = "base_model.model."
MAX_TOKENS = 200  # of an example
STEP = 37  # from one example to the next: neighbours are alike
SMALLEST = 1e-6  # of the largest variance: directions that nothing was read in


def main() -> None:
    """Read, cut, write."""
    args = arguments()
    folders = {name: Path(folder) for name, _, folder in (a.partition("=") for a in args.adapters)}
    adapters = {name: modules_of(path) for name, path in folders.items()}
    model, tokenizer = load(args.base)
    recipes = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    read = {}
    for name in folders:
        every = examples_of(recipes[name], args.data)
        examples = itertools.islice(every, 0, STEP * args.examples, STEP)
        texts = [tokens_of(tokenizer, *each, MAX_TOKENS)["input_ids"] for each in examples]
        read[name] = moments(model, texts, adapters)
    for name, path in folders.items():
        small = {}
        for module, (a, b) in adapters[name].items():
            seen = {recipe: of[name, module] for recipe, of in read.items()}
            small[module] = cut(a, b, mixed(seen, name), args.rank)
        write(args.out / path.name, path, small, args.rank)


def arguments() -> argparse.Namespace:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="+", metavar="RECIPE=FOLDER")
    parser.add_argument("--base", required=True, help="GGUF, folder, or name on the Hub")
    parser.add_argument("--data", type=Path, help="folder with the recipes' files; else the Hub")
    parser.add_argument("--rank", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--examples", type=int, default=6, help="of each recipe (%(default)s)")
    parser.add_argument("-o", dest="out", type=Path, required=True, help="gets a folder for each")
    return parser.parse_args()


def modules_of(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A [rank, n_in] and B [n_out, rank], B with the adapter's scale; float64."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {
        name.removeprefix(PREFIX): (
            tensors[f"{name}.lora_A.weight"].double(),
            tensors[f"{name}.lora_B.weight"].double() * scale,
        )
        for name in names
    }


@torch.no_grad()
def moments(
    model: Any, texts: list[list[int]], adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
) -> dict[tuple[str, str], Tensor]:
    """Read texts: adapter, module -> the sum of h h' [rank, rank] over tokens, h = A x."""
    found: dict[tuple[str, str], Tensor] = {}

    def add(module: str, rows: Tensor, inputs: tuple[Tensor]) -> None:
        h = (inputs[0][0] @ rows.T).float()
        for name, part in zip(adapters, h.split(sizes, dim=1), strict=True):
            found[name, module] = found.get((name, module), 0) + (part.T @ part).double()

    modules = dict(model.named_modules())
    first = next(iter(adapters.values()))
    sizes = [next(iter(of.values()))[0].shape[0] for of in adapters.values()]
    for module in first:
        rows = torch.cat([of[module][0] for of in adapters.values()]).to(model.dtype)
        modules[module].register_forward_pre_hook(
            lambda _, inputs, module=module, rows=rows: add(module, rows, inputs)
        )
    for text in texts:
        model.model(input_ids=torch.tensor([text]))
    for module in first:
        modules[module]._forward_pre_hooks.clear()
    return found


def mixed(seen: Mapping[str, Tensor], own: str) -> Tensor:
    """Moments of an adapter's own recipe and of the others, of one size."""
    others = [moment for recipe, moment in seen.items() if recipe != own]
    mean = seen[own] / seen[own].trace()
    if others:
        rest = sum(others[1:], others[0])
        mean = OWN * mean + (1 - OWN) * rest / rest.trace()
    return mean


def cut(a: Tensor, b: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A and B of a lower rank whose product changes the outputs most alike.

    With moment = L L', the mean of |B h - B' h|^2 is |B L - B' L|^2: its best B' L are the first
    terms of the singular value decomposition of B L.
    """
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(values.max() * SMALLEST).sqrt()
    u, s, v = torch.linalg.svd(b @ (vectors * root), full_matrices=False)
    small_a = v[:rank] @ (vectors / root).T @ a
    small_b = (u * s)[:, :rank]
    size = small_a.norm(dim=1)  # rows of A of length 1
    return small_a / size[:, None], small_b * size


def write(out: Path, source: Path, modules: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> None:
    """Write a PEFT folder; B holds the scale."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": tensor.float().contiguous()
        for name, pair in modules.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    print(out)


if __name__ == "__main__":
    main()
