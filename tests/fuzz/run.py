"""Fuzz every reader for some minutes: `make fuzz MINUTES=5`.

Prints the number of cases per reader and every finding; exits with 1 when there is one. A finding
is kept in tests/fuzz/findings, from where the tests replay it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz.targets import TARGETS, read_case
from fuzz.worker import FINDINGS, SECONDS_UNTIL_KILLED, save_finding

N_CASE_UNBOUNDED = 1 << 62
SECONDS_TO_START = 60


def fuzz_target(
    name: str, seconds: float, seed: int, findings: Path, n_case: int = N_CASE_UNBOUNDED
) -> dict[str, Any]:
    """Feed one reader; a worker that dies is a finding, and another one goes on.

    returns  n_case, n_outcome, n_accepted, and the folders of findings
    """
    total: dict[str, Any] = {"n_case": 0, "outcomes": set(), "n_accepted": 0, "findings": []}
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and total["n_case"] < n_case:
        with tempfile.TemporaryDirectory(prefix="qaflora-fuzz-") as work_name:
            work = Path(work_name)
            problem = _run_worker(name, work, seed, left, n_case - total["n_case"])
            report = json.loads((work / "report.json").read_text(encoding="utf-8"))
            total["n_case"] += report["n_case"]
            total["outcomes"] |= set(report["outcomes"])
            total["n_accepted"] += report["outcomes"].get("accepted", 0)
            kept = [
                save_finding(name, read_case(Path(found)), _reason(Path(found)), findings)
                for found in report["findings"]
            ]
            if problem:
                kept.append(save_finding(name, read_case(work / "case"), problem, findings))
            total["findings"] += [folder for folder in kept if folder not in total["findings"]]
        seed += 1
    return {**total, "n_outcome": len(total.pop("outcomes"))}


def _run_worker(name: str, work: Path, seed: int, seconds: float, n_case: int) -> str | None:
    """Run one worker to its end. returns  how it died, or None"""
    command = [sys.executable, "-P", "-m", "fuzz.worker"]
    command += [name, str(work), str(seed), str(seconds), str(n_case)]
    places = [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[1])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(place for place in places if place),
        "QAFLORA_CACHE": str(work / "cache"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    try:
        timeout = seconds + SECONDS_TO_START + SECONDS_UNTIL_KILLED
        result = subprocess.run(command, env=env, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        return f"the worker did not end\n{(error.stderr or b'').decode('utf-8', 'replace')[-4000:]}"
    if result.returncode == 0:
        return None
    text = result.stderr.decode("utf-8", "replace")[-4000:]
    if not (work / "report.json").exists():  # it fed nothing: the fuzzer is at fault
        raise RuntimeError(f"The worker of {name} did not start:\n{text}")
    return f"the worker ended with {result.returncode}\n{text}"


def _reason(folder: Path) -> str:
    return (folder / "reason.txt").read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="over all readers together")
    parser.add_argument("--seed", type=int, default=None, help="the same seed, the same cases")
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}, {options.minutes:g} minutes over {len(options.targets)} readers")
    n_finding = 0
    for name in options.targets:
        found = fuzz_target(name, 60 * options.minutes / len(options.targets), seed, FINDINGS)
        n_finding += len(found["findings"])
        counts = f"{found['n_case']} cases, {found['n_outcome']} outcomes"
        print(f"{name}: {counts}, {len(found['findings'])} findings", flush=True)
        for folder in found["findings"]:
            print(f"  {folder}: {_reason(folder).strip().splitlines()[-1]}", flush=True)
    return 1 if n_finding else 0


if __name__ == "__main__":
    sys.exit(main())
