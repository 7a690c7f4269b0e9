"""Kill a process at every step at which it touches a file, and look at what is left.

    python -P -m kill_points FOLDER     prints what was found, as JSON

A step is a call that opens, writes, flushes, moves or removes. The process is forked anew for each
one, so that hundreds of points take seconds; it is run apart from pytest, which has threads.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tiny

from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.hub import registry

STEPS = {"open", "write", "writelines", "tofile", "truncate", "flush", "close", "fsync", "flock"}
STEPS |= {"replace", "rename", "unlink", "mkdir", "seek", "scandir"}


def run_until(action: Callable[[], object], n_step: int) -> bool:
    """Run an action in a process that is killed before its step of that number.

    returns  whether it came to its end first
    """
    pid = os.fork()
    if pid == 0:
        left = n_step

        def step(frame: object, event: str, function: object) -> None:
            nonlocal left
            if event == "c_call" and getattr(function, "__name__", "") in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(step)
        try:
            action()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def kill_everywhere(
    write: Callable[[Path], object], out: Path, before: bytes | None, whole: bytes
) -> dict[str, int]:
    """Kill the writing of a file at every step, in a new folder each time; count what is there.

    before  what the file holds at first, None for no file
    """
    states = {"n_step": 0, "before": 0, "whole": 0, "half": 0, "left_over": 0}
    is_done = False
    while not is_done:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if before is not None:
            out.write_bytes(before)
        is_done = run_until(lambda: write(out), states["n_step"])
        content = out.read_bytes() if out.exists() else None
        states["before" if content == before else "whole" if content == whole else "half"] += 1
        states["left_over"] += any(path != out for path in out.parent.iterdir())
        states["n_step"] += 1
    return states


def kill_conversions(place: Path) -> dict[str, dict[str, int]]:
    """Kill a conversion, with nothing and with an older file at its target."""
    base = tiny.write_tiny_base(place / "base.gguf", n_layer=1)
    peft = tiny.write_tiny_peft(place / "peft", base, targets=("q_proj", "down_proj"))
    whole = convert_adapter(peft, base.path, place / "whole.gguf").path.read_bytes()

    def convert(out: Path) -> None:
        convert_adapter(peft, base.path, out)

    return {
        "convert": kill_everywhere(convert, place / "absent/math.gguf", None, whole),
        "convert over a file": kill_everywhere(convert, place / "older/math.gguf", b"old", whole),
    }


def kill_pulls(place: Path) -> dict[str, dict[str, int]]:
    """Kill a pull to a folder of a model that the cache has."""
    whole = bytes(range(256)) * 20_000  # some chunks
    os.environ["QAFLORA_CACHE"] = str(place / "cache")
    (place / "cache" / "models").mkdir(parents=True)
    (place / "cache" / "models" / "fake.gguf").write_bytes(whole)
    entry = {
        "description": "a model",
        "file": "fake.gguf",
        "sha256": hashlib.sha256(whole).hexdigest(),
        "size_bytes": len(whole),
        "architecture": "llama",
        "kind": "base",
        "license": "MIT",
        "sources": [],
    }
    models = {"format": "qaflora-registry/1", "models": {"fake": entry}}
    (place / "registry.json").write_text(json.dumps(models), encoding="utf-8")
    registry.package_data = lambda name: place / "registry.json"

    def pull(out: Path) -> None:
        registry.fetch_model("fake", to=out.parent)

    return {"pull": kill_everywhere(pull, place / "models/fake.gguf", None, whole)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps(kill_conversions(folder) | kill_pulls(folder)))
