"""One process that feeds one reader; `run` starts it, watches it and starts it again.

The case at hand lies in a folder on disk, so that it is not lost when the process dies.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fuzz.mutate import Case, mutate
from fuzz.targets import TARGETS, Target
from qaflora_edge.errors import QafloraError

SECONDS_PER_CASE = 5  # of computing, so that a busy machine is no finding; all cases are small
SECONDS_UNTIL_KILLED = 30  # for waiting, and a hang inside native code, which no signal interrupts
MEMORY_BYTES = 1 << 30  # beyond what the process has before the first case
MAX_CORPUS = 400
FINDINGS = Path(__file__).parent / "findings"


class Hang(Exception):
    """A case took longer than SECONDS_PER_CASE."""


def write_case(folder: Path, case: Case) -> None:
    """Make a folder hold exactly the files of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in case:
            path.unlink()
    for name, data in case.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def save_finding(target: str, case: Case, reason: str, findings: Path = FINDINGS) -> Path:
    """Keep a case for good; test_fuzz.py replays it from then on."""
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(case.items())))
    folder = findings / target / digest.hexdigest()[:12]
    write_case(folder, case)
    (folder / "reason.txt").write_text(reason, encoding="utf-8")
    return folder


def outcome_of(target: Target, folder: Path, place: Path) -> str:
    """Run one case. Give what came of it, without what differs from file to file.

    Raises what is a finding.
    """
    try:
        with _time_limit():
            target.check(folder, place)
    except QafloraError as error:
        text = str(error).replace(str(folder), "").replace(str(place), "")
        text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "''", text)
        return type(error).__name__ + ": " + re.sub(r"\d+", "0", text)[:120]
    return "accepted"


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang(f"no end after {SECONDS_PER_CASE} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_CASE)
    faulthandler.dump_traceback_later(SECONDS_UNTIL_KILLED, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """Let the address space grow by MEMORY_BYTES at most, where the system can tell its size."""
    statm = Path("/proc/self/statm")
    if not statm.exists() or "ASAN_OPTIONS" in os.environ:
        return
    import resource

    used_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MEMORY_BYTES, hard))


def feed(name: str, work: Path, *, seed: int, seconds: float, n_case: int) -> dict[str, object]:
    """Damage cases until the time or the number is used up. returns  what `run` prints"""
    target, rng = TARGETS[name], random.Random(seed)
    place, folder = work / "place", work / "case"
    place.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds(place)
    corpus = list(seeds)
    outcomes: Counter[str] = Counter()
    for case in corpus:
        write_case(folder, case)
        outcomes[outcome_of(target, folder, place)] += 1
    assert set(outcomes) == {"accepted"}, f"a seed of {name} is refused: {outcomes}"
    limit_memory()
    findings: list[str] = []
    _report(work, 0, outcomes, findings)
    start = last_report = time.monotonic()
    n_done = 0
    while n_done < n_case and time.monotonic() - start < seconds:
        # Half of the cases begin sound, so that the first check is not the only one they meet.
        case = mutate(rng.choice(seeds if rng.random() < 0.5 else corpus), rng)
        write_case(folder, case)
        try:
            outcome = outcome_of(target, folder, place)
        except Exception:
            outcome = "finding"
            path = save_finding(name, case, traceback.format_exc(), work / "findings")
            findings.append(str(path))
        n_done += 1
        if outcome not in outcomes and len(corpus) < MAX_CORPUS:
            corpus.append(case)  # a new way to be refused: its neighbours may have others
        outcomes[outcome] += 1
        if time.monotonic() - last_report > 1:
            last_report = time.monotonic()
            _report(work, n_done, outcomes, findings)
    return _report(work, n_done, outcomes, findings)


def _report(
    work: Path, n_done: int, outcomes: Counter[str], findings: list[str]
) -> dict[str, object]:
    report = {"n_case": n_done, "outcomes": dict(outcomes), "findings": findings}
    (work / "report.tmp").write_text(json.dumps(report), encoding="utf-8")
    os.replace(work / "report.tmp", work / "report.json")
    return report


if __name__ == "__main__":
    name, work, seed, seconds, n_case = sys.argv[1:]
    feed(name, Path(work), seed=int(seed), seconds=float(seconds), n_case=int(n_case))
