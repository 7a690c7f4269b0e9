"""Completion: what is suggested."""

import contextlib
import shutil

import pytest
from bundles import TinyBundle
from click.testing import CliRunner

from qaflora_edge.cli import main


def suggested(made: TinyBundle, line: str, **more: str) -> list[str]:
    """What fish is told for a line, whose last word is not finished."""
    words, _, last = line.rpartition(" ")
    asked = {"_QAFLORA_COMPLETE": "fish_complete", "COMP_WORDS": words, "COMP_CWORD": last}
    with contextlib.chdir(made.folder.parent):
        done = CliRunner().invoke(main, [], env={**asked, **more}, prog_name="qaflora")
    assert (done.exit_code, done.stderr) == (0, "")
    return [line.partition(",")[2].partition("\t")[0] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qaflora com", ["compare", "completion"]),
        ("qaflora run --st", ["--strategy", "--stop"]),
        ("qaflora run bundle hi --lens ", ["norm", "raw"]),
        ("qaflora run bundle --strategy s", ["spectr"]),
    ],
)
def test_suggestions(made, line, expected) -> None:
    assert suggested(made, line) == expected


def test_bundles_by_name_are_suggested(made, tmp_path) -> None:
    shutil.copytree(made.folder, tmp_path / "named")
    place = {"QAFLORA_BUNDLES": str(tmp_path)}
    assert suggested(made, "qaflora chat na", **place) == ["named"]


def test_broken_settings_suggest_files(made, tmp_path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("=", encoding="utf-8")
    assert suggested(made, "qaflora chat na", QAFLORA_CONFIG=str(config)) == ["na"]
