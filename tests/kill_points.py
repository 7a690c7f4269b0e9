"""Kill a process at every step at which it touches a file, and look at what is left.

    python -P -m kill_points FOLDER     prints what was found, as JSON

A step is a call that opens, writes, flushes, moves or removes. The process is forked anew for each
one, so that hundreds of points take seconds; it is run apart from pytest, which has threads.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tiny

from qaflora_edge.convert import convert_adapter

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


def kill_conversions(place: Path) -> dict[str, object]:
    """Kill a conversion at every step, with nothing and with an older file at its target."""
    base = tiny.write_tiny_base(place / "base.gguf", n_layer=1)
    peft = tiny.write_tiny_peft(place / "peft", base, targets=("q_proj", "down_proj"))
    whole = convert_adapter(peft, base.path, place / "whole.gguf").path.read_bytes()
    found: dict[str, object] = {}
    for name, before in (("absent", None), ("older", b"an older file")):
        folder = place / name
        states = {"before": 0, "whole": 0, "half": 0, "left_over": 0}
        n_step, is_done = 0, False
        while not is_done:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            out = folder / "math.gguf"
            if before is not None:
                out.write_bytes(before)
            is_done = run_until(lambda out=out: convert_adapter(peft, base.path, out), n_step)
            content = out.read_bytes() if out.exists() else None
            states["before" if content == before else "whole" if content == whole else "half"] += 1
            states["left_over"] += any(path != out for path in folder.iterdir())
            n_step += 1
        found[name] = {"n_step": n_step, **states}
    return found


if __name__ == "__main__":
    print(json.dumps(kill_conversions(Path(sys.argv[1]))))
