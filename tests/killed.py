"""Run actions that die at a chosen moment, as by SIGKILL: nothing of theirs is tidied up.

The moments are the calls that touch files: the process is killed before the n-th of them. Each
attempt is a fork of this process, so that nothing is imported twice.
"""

import io
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

# Names of built-in functions and methods; Python code reaches files through these.
TOUCHING = {
    *("open", "write", "writelines", "tofile", "truncate", "flush", "fsync", "close", "flock"),
    *("replace", "rename", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "rmtree"),
    *("utime", "chmod", "sendfile", "copy_file_range"),
}


def run(action: Callable[[], object], kill_before: int = 0) -> int | None:
    """Run an action in a fork; kill it before that call. Give the calls it made, None if killed."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        os._exit(_act(action, kill_before, writer))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, f"the action failed: {told}"
    return int(told)


def _act(action: Callable[[], object], kill_before: int, writer: int) -> int:
    n_call = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal n_call
        if event == "c_call" and function.__name__ in TOUCHING and not _is_in_memory(function):
            n_call += 1
            if n_call == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        action()
        told, code = str(n_call), 0
    except BaseException:
        told, code = traceback.format_exc(), 1
    sys.setprofile(None)
    os.write(writer, told.encode())
    return code


def _is_in_memory(function: Any) -> bool:
    return isinstance(getattr(function, "__self__", None), io.StringIO | io.BytesIO)


def at_many_points(
    start: Path,
    place: Path,
    action: Callable[[Path], object],
    check: Callable[[Path], bool],
    most: int,
) -> dict[str, int]:
    """Kill an action at up to `most` moments, each time on a fresh copy of a folder.

    start   what the action finds
    place   a folder for the copies
    check   given the copy, raises when something half-written is taken for whole, and tells
            whether the action has taken effect; asked after the kill, and after another attempt

    Gives how many moments there were, at how many it was killed, and after how many attempts it
    had taken effect.
    """
    for name in ("first", "whole"):  # the first makes what they share, such as files of locks
        copy = shutil.copytree(start, place / name, symlinks=True)
        n_call = run(lambda copy=copy: action(copy))  # type: ignore[misc]
        assert n_call is not None
        assert check(copy)
    most = min(most, n_call)
    moments = sorted({1 + index * n_call // most for index in range(most)} | {n_call - 1, n_call})
    n_killed = n_done = 0
    for moment in moments:
        copy = shutil.copytree(start, place / f"killed-{moment}", symlinks=True)
        is_killed = run(lambda copy=copy: action(copy), moment) is None  # type: ignore[misc]
        n_killed += is_killed
        is_done = check(copy)
        n_done += is_done
        if not is_done:
            assert run(lambda copy=copy: action(copy)) is not None  # type: ignore[misc]
            assert check(copy)
        shutil.rmtree(copy)
    return {"calls": n_call, "killed": n_killed, "done": n_done}
