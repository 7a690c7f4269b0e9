"""How many modules lie on the path of one answer, from the command line to the graph and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import TinyBundle
from click.testing import CliRunner

import qaflora_edge
from qaflora_edge.backend.context import Context
from qaflora_edge.cli import main
from qaflora_edge.inference.sequence import Sequence

PACKAGE = Path(qaflora_edge.__file__).parent


@pytest.mark.parametrize("strategy", ["qa-flora", "two-place", "static"])
def test_an_answer_passes_at_most_15_modules(
    calibrated: TinyBundle, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Modules of every function that waits while the library computes, or takes a token back."""
    seen: set[str] = set()

    def noting(method: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe()
            while frame.f_back is not None:
                frame = frame.f_back
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(PACKAGE):
                    seen.add(str(path.relative_to(PACKAGE)))
            return method(*args, **kwargs)

        return noted

    monkeypatch.setattr(Context, "decode_spans", noting(Context.decode_spans))
    monkeypatch.setattr(Sequence, "take", noting(Sequence.take))
    words = ["run", str(calibrated.folder), "How far?", "--max-tokens", "4", "--strategy", strategy]
    assert CliRunner().invoke(main, words).exit_code == 0
    seen |= {"backend/context.py", "inference/sequence.py"}
    assert len(seen) <= 15, sorted(seen)
