"""The readers under damaged files: a short run of the fuzzer, and its findings of the past."""

from pathlib import Path

import pytest
from fuzz.mutate import Gguf
from fuzz.run import fuzz_target
from fuzz.targets import TARGETS, read_case
from fuzz.worker import FINDINGS, outcome_of, save_finding, write_case

N_CASE = 120


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_reader_survives_damaged_files(name, tmp_path) -> None:
    found = fuzz_target(name, 60, seed=1, findings=tmp_path, n_case=N_CASE)
    assert found["n_case"] == N_CASE  # the time is for slow machines: 1 s is the rule
    assert found["findings"] == []
    assert found["n_accepted"] >= 1  # the seeds
    assert found["n_outcome"] >= 10  # the damage goes deeper than the first check


@pytest.mark.parametrize(
    "finding", sorted(FINDINGS.glob("*/*/")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_finding_of_the_past_stays_fixed(finding, tmp_path) -> None:
    target = TARGETS[finding.parent.name]
    target.seeds(tmp_path)
    write_case(tmp_path / "case", read_case(finding))
    outcome_of(target, tmp_path / "case", tmp_path)


def test_gguf_is_put_together_as_it_was(tmp_path) -> None:
    for case in TARGETS["adapter"].seeds(tmp_path) + TARGETS["base"].seeds(tmp_path):
        assert Gguf(case["a.gguf"]).join() == case["a.gguf"]


def test_a_reader_that_fails_is_found(tmp_path, monkeypatch) -> None:
    """The fuzzer itself: an error that is no QafloraError is not taken for a refusal."""
    from dataclasses import replace

    def check(folder: Path, place: Path) -> None:
        raise KeyError("not expected")

    broken = replace(TARGETS["config"], check=check)
    with pytest.raises(KeyError, match="not expected"):
        outcome_of(broken, tmp_path, tmp_path)
    folder = save_finding("config", {"a.json": b"{}"}, "KeyError", tmp_path)
    assert read_case(folder) == {"a.json": b"{}"}
    assert (folder / "reason.txt").read_text() == "KeyError"
