"""Let each system call of a writer fail in turn, and lose what it did not sync; its own program.

It is run with tests/native/file_calls.c preloaded, and prints how many calls there were.
"""

import ctypes
import errno
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from qaflora_edge.bundles.open import verify_bundle
from qaflora_edge.cli import main
from qaflora_edge.errors import QafloraError
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.prompt.conversation import Conversation, load_session, save_session

Hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
WRITING = ("write", "ftruncate64", "copy_file_range", "sendfile64")


class Watcher:
    """See the calls that touch a folder: fail one, or keep what is on the disk before each.

    fail_at  the call that fails, from 1; 0: none
    lost     a folder for copies of the folder in which what was never synced is empty
    """

    def __init__(self, folder: Path, fail_at: int = 0, lost: Path | None = None) -> None:
        self.folder = str(folder.resolve())
        self.fail_at = fail_at
        self.lost = lost
        self.n_call = 0
        self.dirty: set[str] = set()  # written, and not synced
        self.hook = Hook(self.see)

    def see(self, name_bytes: bytes, path_bytes: bytes) -> int:
        path = os.path.abspath(os.fsdecode(path_bytes))
        name = name_bytes.decode()
        if not path.startswith(self.folder):
            return 0
        self.n_call += 1
        if self.lost is not None:
            self.keep(name, path)
        return errno.EIO if self.n_call == self.fail_at else 0

    def keep(self, name: str, path: str) -> None:
        assert self.lost is not None
        copy = self.lost / f"{self.n_call:04}-{name}"
        shutil.copytree(self.folder, copy, symlinks=True)
        for written in self.dirty:
            there = copy / os.path.relpath(written, self.folder)
            if there.is_file():
                os.truncate(there, 0)
        if name in WRITING:
            self.dirty.add(path)
        if name == "fsync":
            self.dirty.discard(path)
        if name == "rename":  # what is renamed unsynced is empty under its new name
            assert not self.dirty & {path}

    def __enter__(self) -> "Watcher":
        ctypes.CDLL(None).file_calls_watch(self.hook)
        return self

    def __exit__(self, *_: object) -> None:
        ctypes.CDLL(None).file_calls_watch(None)


def in_fork(action: Callable[[], str]) -> str:
    """Do something in a fork, and give what it says."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        try:
            said = action()
        except BaseException:
            said = "FOUND: " + traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(process, 0)
    assert status == 0, status
    return said


def command(*words: object) -> str:
    """Run a command of qaflora; give its message, or nothing."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exit_code == 0:
        return ""
    assert result.exit_code == 1, (result.exit_code, result.exception, result.stderr)
    assert result.stderr.startswith("Error: "), (result.stderr, result.exception)
    return str(result.stderr)


def save(place: Path, question: str = "new") -> str:
    """Save a session of one turn; give the error's message, or nothing."""
    conversation = Conversation()
    conversation.add(question, "an answer")
    bundle = {"name": "tiny", "base_sha256": "0" * 64, "adapters": {}}
    try:
        save_session(place / "s.json", conversation, bundle=bundle, strategy="static", adapters=[])
    except QafloraError as error:
        return f"Error: {error}"
    return ""


def state_of(place: Path) -> str:
    """Tell what is there of all that the actions write: each file whole, or refused with words."""
    told = []
    for kind, path, read in (
        ("new", place / "new", lambda path: sorted(verify_bundle(path).adapter_paths)),
        ("bundle", place / "bundle", lambda path: sorted(verify_bundle(path).adapter_paths)),
        ("gguf", place / "out.gguf", lambda path: len(read_gguf_header(path).tensors)),
        ("session", place / "s.json", lambda path: load_session(path).said),
    ):
        if not path.exists():
            told.append(f"{kind}: none")
            continue
        try:
            told.append(f"{kind}: {read(path)}")  # type: ignore[no-untyped-call]
        except QafloraError as error:
            told.append(f"{kind}: REFUSED {error}")
    return "\n".join(told)


ACTIONS: dict[str, Callable[[Path], str]] = {
    "create": lambda place: command(
        *("bundle", "create", place / "new", "--base", place / "bundle" / "base.gguf"),
        *("--adapter", f"a={place / 'peft'}", "--no-calibrate"),
    ),
    "add": lambda place: command(
        *("bundle", "add", place / "bundle", f"c={place / 'peft'}", "--no-calibrate")
    ),
    "remove": lambda place: command("bundle", "remove", place / "bundle", "es"),
    "convert": lambda place: command(
        *("convert", place / "peft", "--base", place / "bundle" / "base.gguf"),
        *("-o", place / "out.gguf", "--force"),
    ),
    "save": save,
}


def in_turn(start: Path, place: Path, action: Callable[[Path], str]) -> dict[str, int]:
    """Let each call fail, then lose what was not synced at each; give the counts."""
    copy = place / "copy"

    def fresh() -> Path:
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(start, copy, symlinks=True))

    def attempt(watcher: Watcher) -> str:
        with watcher:
            said = action(copy)
        return json.dumps([said, watcher.n_call])

    fresh()
    old = state_of(copy)
    said = in_fork(lambda: action(copy))
    new = state_of(copy)
    assert said == "", said
    assert old != new, old
    assert "REFUSED" not in old + new
    n_call = n_told = 0
    for number in range(1, 10_000):
        fresh()
        report = in_fork(lambda number=number: attempt(Watcher(copy, number)))
        assert not report.startswith("FOUND"), report
        said, n_call = json.loads(report)
        state = state_of(copy)
        if n_call < number:
            assert (said, state) == ("", new)
            break
        n_told += bool(said)
        # What fails while it is tidied up, or is done in vain, does not count as a failure.
        assert state in ((old, new) if said else (new,)), (number, said, state)
    fresh()
    lost = place / "lost"
    lost.mkdir()
    report = in_fork(lambda: attempt(Watcher(copy, lost=lost)))
    assert not report.startswith("FOUND"), report
    kept = sorted(lost.iterdir())
    states = []
    for folder in kept:
        shutil.rmtree(copy)
        folder.rename(copy)  # where the bundle knows its files
        states.append(state_of(copy))
        assert states[-1] in (old, new) or "REFUSED" in states[-1], (folder.name, states[-1])
    shutil.rmtree(lost)
    n_refused = sum("REFUSED" in state for state in states)
    return {"calls": n_call, "told": n_told, "lost": len(kept), "refused": n_refused}


def run() -> None:
    start, place, *names = sys.argv[1:]
    counts: dict[str, Any] = {}
    for name in names or ACTIONS:
        counts[name] = in_turn(Path(start), Path(place), ACTIONS[name])
        print(name, counts[name], file=sys.stderr)
    print(json.dumps(counts))


if __name__ == "__main__":
    run()
