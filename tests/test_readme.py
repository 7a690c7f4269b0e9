"""The README's commands and its Python run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qaflora_edge


def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[str]:
    text = readme(Path(__file__).resolve().parents[1])
    block = text.split("<!-- tested -->")[1].split("Your own adapters")[0]
    return [line.strip() for line in block.splitlines() if line.startswith("    qaflora ")]


@pytest.mark.parametrize("command", readme_commands())
def test_command_of_the_readme_runs(command: str, checkout: Path, smollm2: Path) -> None:
    program = f'"{Path(sys.executable).parent}/qaflora"'
    line = command.replace("qaflora", program, 1)
    done = subprocess.run(
        line, shell=True, cwd=checkout, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_commands_to_test() -> None:
    assert len(readme_commands()) == 5


def test_python_of_the_readme_runs(checkout: Path, smollm2: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme(checkout), re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'math': ")


def test_changelog_begins_with_this_version(checkout: Path) -> None:
    text = (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.split("## ")[1].split()[0] == qaflora_edge.__version__
