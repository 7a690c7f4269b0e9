"""What the table of architectures is found from: one family's files, and what a reference says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tiny
from tiny import F32

TOKENS = [5, 17, 99, 3, 250, 77, 34, 120, 8, 61, 200, 11]
ADAPTERS = ("projections", "scales", "embedding", "head")
EXPERTS = ("experts", "single experts")  # of mixtures: of stacked parameters, and one by one
# Upstream reads nothing that makes scales differ, and no parameters.
UPSTREAM = {"projections", "embedding", "head", "single experts"}
LAYER_WEIGHTS = (0.25, -0.75, 0.5)  # of the layers, two of most families


class Named(Protocol):
    """What every family says of itself: see families.Family."""

    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def tolerance(self) -> float: ...


@dataclass(frozen=True)
class Specimen:
    """One family's files, and what the reference says of them.

    logits  "base", an adapter, or "per layer" -> [n_vocab] after TOKENS
    states  [n_layer, n_embd] of the last token after each block, under "projections"
    expert_states  the same under "experts", of a mixture that has them
    """

    family: Named
    folder: Path
    logits: Mapping[str, F32]
    states: F32
    expert_states: F32 | None = None

    @property
    def hf(self) -> Path:
        return self.folder / "hf"

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def experts(self) -> list[str]:
        """Those of EXPERTS that it has."""
        return [adapter for adapter in EXPERTS if adapter in self.logits]

    def peft(self, adapter: str) -> Path:
        return self.folder / "peft" / adapter

    def upstream(self, adapter: str) -> Path:
        return self.folder / f"upstream-{adapter}.gguf"


def base_job(hf: Path, out: Path) -> dict[str, object]:
    tokens = [*tiny.byte_tokens(), *(merge.replace(" ", "") for merge in tiny.MERGES)]
    return {
        "hf": str(hf),
        "out": str(out),
        "tokens": [*tokens, *tiny.CONTROLS],
        "n_control": len(tiny.CONTROLS),
        "merges": list(tiny.MERGES),
    }


def adapter_jobs(specimen: Specimen) -> list[dict[str, object]]:
    """Ask upstream_convert for each adapter that it reads rightly."""
    return [
        {
            "hf": str(specimen.hf),
            "out": str(specimen.upstream(adapter)),
            "peft": str(specimen.peft(adapter)),
            "outtype": "f32",
        }
        for adapter in (*ADAPTERS, *specimen.experts)
        if adapter in UPSTREAM
    ]
