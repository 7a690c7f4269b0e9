"""Run a command with the sanitizers' runtimes loaded, and judge what they report.

    python tests/sanitized.py [--no-leaks | --threads] COMMAND ...

Python itself is not instrumented, so the runtime is preloaded, and Python takes its memory from
malloc so that the buffers it lends to the library are guarded. A report about memory or undefined
behaviour fails. Leaks count where our libraries allocated: the
interpreter keeps much until its end. They are not looked for in tests that close nothing, for a
model that Python still holds at its end is no leak of the library.

--threads is for a library with the thread sanitizer: of its reports those count that have a frame
of ours. It sees Python's locks, and no memory of Python's own. Nothing is suppressed so far.

The library is built with its asserts. ggml has some against values that are no numbers, llama.cpp
has one against rows without logits. Tests that cause these on purpose look at QAFLORA_TEST_ASSERTS.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Frames of our libraries: by the source's path, as symbols are found, or by the library's.
OURS = re.compile(r"^\s+#\d+ .*(/llama\.cpp-\w|/patches/src/|/libllama|/libggml)", re.MULTILINE)


def preloaded(names: Sequence[str]) -> str:
    """Find the runtimes of the compiler. libstdc++ too: ASan must see its throw at the start."""
    compiler = os.environ.get("CXX", "c++")
    paths = []
    for name in names:
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            sys.exit(f"{compiler} has no {name}; install the sanitizers of GCC, or set CXX=g++.")
        paths.append(path)
    return " ".join(paths)


def environment(logs: Path, option: str) -> dict[str, str]:
    if option == "--threads":
        return {
            "LD_PRELOAD": preloaded(["libtsan.so", "libstdc++.so"]),
            "PYTHONMALLOC": "malloc",
            "TSAN_OPTIONS": f"exitcode=0:history_size=4:log_path={logs}/tsan",
        }
    leaks = not option
    return {
        "LD_PRELOAD": preloaded(["libasan.so", "libstdc++.so"]),
        "PYTHONMALLOC": "malloc",
        # Huge allocations must fail as they would elsewhere: hostile files ask for them.
        "ASAN_OPTIONS": f"detect_leaks={leaks:d}:allocator_may_return_null=1:log_path={logs}/asan",
        "LSAN_OPTIONS": "exitcode=0:max_leaks=0:report_objects=0",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs}/ubsan",
        "QAFLORA_TEST_ASSERTS": "1",
    }


def split_reports(text: str) -> list[str]:
    """Take a log apart: one report for each error, and for each leak."""
    starts = r"(?m)^(?===\d+==ERROR|\S+: runtime error:|Direct leak|Indirect leak|WARNING: Thread)"
    return [part for part in re.split(starts, text) if part.strip().strip("=")]


def is_problem(report: str) -> bool:
    if "runtime error:" in report:
        return True
    if report.startswith(("Direct leak", "Indirect leak", "WARNING: Thread")):
        return OURS.search(report) is not None
    return "ERROR: LeakSanitizer: detected" not in report


def main(command: list[str]) -> int:
    option = command.pop(0) if command[0].startswith("--") else ""
    with tempfile.TemporaryDirectory(prefix="qaflora-sanitizers-") as folder:
        env = os.environ | environment(Path(folder), option)
        code = subprocess.run(command, env=env).returncode
        reports = [
            report
            for path in sorted(Path(folder).iterdir())
            for report in split_reports(path.read_text("utf-8", "replace"))
        ]
    problems = sorted({report for report in reports if is_problem(report)})
    for report in problems:
        print(report, file=sys.stderr)
    print(f"sanitizers: {len(reports)} reports, {len(problems)} of them problems; exit code {code}")
    return code or (1 if problems else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
