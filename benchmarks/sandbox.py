"""Run code that a model wrote, in a process of its own with bounds on all that it may use.

10 seconds of processor time (60 in all), 512 MiB of memory, 1 MiB for each file, no further process
or thread, an empty folder that goes afterwards, none of the environment. On Linux there is no
network where the system lets a user make a namespace, and nothing outside the folder is written
where the kernel has Landlock; a verdict says what of the two held. As root it runs as `nobody`.

The bounds are for mistakes of models. What you may read, the code may read.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO


class SandboxError(Exception):
    """Code cannot be run within bounds on this system."""


CPU_S, WALL_S = 10, 60  # the second is for what sleeps, and for a busy machine
MEMORY_BYTES = 512 << 20
_LIMITS = {
    "RLIMIT_CPU": CPU_S,
    "RLIMIT_AS": MEMORY_BYTES,
    "RLIMIT_FSIZE": 1 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_NPROC": 0,  # no further process, and no thread
    "RLIMIT_CORE": 0,
}
_CHILD = Path(__file__).with_name("sandbox_child.py")
_SAID_MAX = 1 << 16  # bytes that the child may say


@dataclass(frozen=True)
class Verdict:
    """What came of a program.

    failure   why it did not end as it should; "" where it did
    isolated  what the system kept it from, besides the limits: "network" (or only "tcp"), "files"
    """

    failure: str
    isolated: tuple[str, ...]

    @property
    def is_passed(self) -> bool:
        return not self.failure


def check_can_run() -> None:
    """Raise SandboxError where this system cannot bound a process."""
    if os.name != "posix":
        raise SandboxError(
            f"Cannot run the code of answers: this system ({sys.platform}) has no limits for a "
            "process. Evaluate on Linux or macOS."
        )
    verdict = run_program(["pass"])
    if not verdict.is_passed:
        raise SandboxError(
            f"Cannot run the code of answers: an empty program failed here ({verdict.failure})."
        )


def run_program(
    sources: Sequence[str], test: str = "", *, cpu_s: int = CPU_S, wall_s: float = WALL_S
) -> Verdict:
    """Run the first of some sources that is Python, in an empty folder that goes afterwards.

    test  runs after it, where it left its names; the source is a module `answer`, not `__main__`

    Raises SandboxError when no process can be started.
    """
    word = secrets.token_hex(16)
    limits = {**_LIMITS, "RLIMIT_CPU": cpu_s}
    reader, writer = os.pipe()
    with (
        os.fdopen(reader, "rb") as said,
        tempfile.TemporaryDirectory(prefix="qaflora-code-", ignore_cleanup_errors=True) as folder,
    ):
        if os.geteuid() == 0:
            os.chmod(folder, 0o777)  # the user nobody writes into it
        asked = {"pipe": writer, "word": word, "limits": limits}
        asked |= {"sources": list(sources), "test": test}
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_environment(folder),
                pass_fds=[writer],
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(
                f"Cannot run the code of answers: {sys.executable} does not start "
                f"({error.strerror})."
            ) from error
        finally:
            os.close(writer)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(asked).encode(), timeout=wall_s)
            is_slow = process.poll() is None
        finally:
            _kill(process)
        return _verdict(said, word, process.returncode, is_slow, wall_s)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of ours; libraries that would start threads start none, sets have one order."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    place = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}
    return {**place, **dict.fromkeys(threads, "1"), "PYTHONHASHSEED": "0"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(said: IO[bytes], word: str, code: int, is_slow: bool, wall_s: float) -> Verdict:
    os.set_blocking(said.fileno(), False)
    first, _, rest = (said.read(_SAID_MAX) or b"").partition(b"\n")
    if not first:
        raise SandboxError(
            "Cannot run the code of answers: the process that is to run it ended before it began "
            f"(exit code {code})."
        )
    begun = json.loads(first)
    if begun["problem"]:
        raise SandboxError(f"Cannot run the code of answers: {begun['problem']}.")
    isolated = tuple(begun["isolated"])
    with contextlib.suppress(ValueError, KeyError, TypeError):
        last = json.loads(rest)
        if last["word"] == word and not is_slow:
            return Verdict(str(last["failure"]), isolated)
    if is_slow:
        return Verdict(f"it took longer than {wall_s:g} s", isolated)
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return Verdict("it took too much processor time", isolated)
    return Verdict(f"its process ended early (exit code {code})", isolated)
