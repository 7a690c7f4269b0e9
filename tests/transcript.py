"""The first hour of a new user, typed in a clone: the transcript in docs/quickstart.md.

    python tests/transcript.py --write      types it anew and replaces it in the page

The clone is as `make demo` leaves it: the package installed, the source beside it, the base pulled.
Tests type it with the smaller base's bundle under the name `demo`.
"""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs/quickstart.md"
BLOCK = re.compile(r"```transcript\n(.*?)```\n", re.DOTALL)
DEMO = runpy.run_path(str(CHECKOUT / "models/demo.py"))
SPANISH, RUSSIAN, FACT, GENERAL, _ = DEMO["QUESTIONS"]
SCRIPT = f"""\
from qaflora_edge import Engine

question = "{FACT.text}"
with Engine("demo") as engine:
    answer = engine.chat([{{"role": "user", "content": question}}])
    print(answer.choices[0].message.content)
"""


@dataclass(frozen=True)
class Step:
    """A command, and what its output has on every machine."""

    command: str
    stable: tuple[str, ...]


STEPS = (
    Step(f'qaflora run demo "{SPANISH.text}"', (SPANISH.right, "[math ×1", "tok/s")),
    Step(f'qaflora weights demo "{SPANISH.text}"', SPANISH.mix),
    Step(f'qaflora run demo "{RUSSIAN.text}"', (RUSSIAN.right, "[json ×1")),
    Step(f'qaflora run demo "{GENERAL.text}"', (GENERAL.right, "[base;")),
    Step("cat first.py", tuple(SCRIPT.splitlines())),
    Step("python first.py", (FACT.right,)),
    Step("QAFLORA_BUNDLES=. qaflora list | head -n 1", ("bundle   demo",)),
)


def type_all(clone: Path) -> str:
    """Type every command in a clone; what a terminal would show, with its own paths left out."""
    left_out = ("PYTHONSAFEPATH", "QAFLORA_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment |= {
        "QAFLORA_CACHE": os.environ.get("QAFLORA_CACHE", ""),
        "QAFLORA_CONFIG": os.devnull,
        "HF_HOME": str(clone / "hub"),
        "TERM": "dumb",
    }
    shown = ""
    for step in STEPS:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step.command],
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{step.command}: exit code {done.returncode}\n{done.stdout}")
        shown += f"$ {step.command}\n{done.stdout}\n"
    return shown.replace(f"{clone}/", "").replace(str(Path.home()), "~")


def make_clone(folder: Path, bundle: str) -> Path:
    """The files of the checkout that Python and the commands find in a clone; `demo` is bundle."""
    for name in ("qaflora_edge", "models", "patches"):
        (folder / name).symlink_to(CHECKOUT / name)
    (folder / "demo").symlink_to(CHECKOUT / bundle)
    (folder / "first.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def outputs(shown: str) -> dict[str, str]:
    """Command -> output of a transcript."""
    parts = re.split(r"^\$ (.+)\n", shown, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        text = type_all(make_clone(Path(place).resolve(), DEMO["QWEN"].bundle))
    if sys.argv[1:] == ["--write"]:
        page = PAGE.read_text(encoding="utf-8")
        block = f"```transcript\n{text.rstrip()}\n```\n"
        PAGE.write_text(BLOCK.sub(lambda _: block, page), encoding="utf-8")
    else:
        print(text)
