"""benchmarks/sandbox.py: what of an answer is run as code, and what it cannot do."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from code_metric import programs
from sandbox import Verdict, run_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="there are no limits for a process"),
]
ITEM = {
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Of a circle, rounded."""\n',
    "entry_point": "area",
    "test": "def check(f):\n    assert f(2) == 13\n    assert f(0) == 0\n",
}
RIGHT = [
    "```python\ndef area(r):\n    return round(pi * r * r)\n```",
    "Sure!\n```python\nx = 1\n```\n```py\ndef area(r):\n    return round(pi * r * r)\n```\nDone.",
    "```\nfrom math import pi as p\n\ndef area(r):\n    return round(p * r * r)\n",  # not closed
    "Here it is:\n\ndef area(r):\n    return round(pi * r * r)\n\nIt squares the radius.",
    "    return round(pi * r * r)",
    "```python\nx = r * r\n    return round(pi * x)\n```",
    "if r == 0:\n    return 0\nreturn round(pi * r * r)",
    "```python\narea = lambda r: round(pi * r * r)\n```",
    "def area(r):\n    return round(pi * r * r)\n\nif __name__ == '__main__':\n    input()",
    "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\n"
    "class Disc:\n    r: int\n\ndef area(r):\n    return round(pi * Disc(r).r ** 2)",
]
WRONG = [
    "I cannot do that.",
    "```python\ndef area(r):\n    return round(3 * r * r)\n```",
    "```python\ndef area(r):\n    import os\n    os._exit(0)\n```",
    "```python\ndef area(r:\n```",
]


@pytest.mark.parametrize("answer", RIGHT)
def test_the_code_of_an_answer_is_found(answer) -> None:
    assert run_program(*programs(answer, ITEM)).failure == ""


@pytest.mark.parametrize("answer", WRONG)
def test_what_is_wrong_is_not_right(answer) -> None:
    assert run_program(*programs(answer, ITEM)).failure != ""


def verdict(code: str) -> Verdict:
    return run_program([code], cpu_s=1, wall_s=30)


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("open('x', 'w').write('a' * (2 << 20))", "OSError: [Errno 27] File too large"),
        ("import os\nos._exit(0)", "its process ended early (exit code 0)"),
        ("import os\nos.fork()", "BlockingIOError: [Errno 11] Resource temporarily unavailable"),
        ("import os\nassert os.listdir('.') == []", ""),
        ("input()", "EOFError: EOF when reading a line"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_CPU, (99, 99))", "ValueError: not allowed"),
    ],
)
def test_code_is_bounded(code, failure) -> None:
    found = verdict(code).failure
    assert found.startswith(failure)
    assert bool(found) is bool(failure)


def test_loops_and_sleep_end() -> None:
    assert verdict("while True: pass").failure in (
        "it took too much processor time",
        "it took longer than 30 s",  # on a busy machine
    )
    sleeping = run_program(["import time\ntime.sleep(60)"], wall_s=1)
    assert sleeping.failure == "it took longer than 1 s"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux isolates")
def test_the_rest_of_the_machine_is_out_of_reach(tmp_path) -> None:
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o666)
    writes = verdict(f"open({str(victim)!r}, 'w')")
    if "files" not in writes.isolated:
        pytest.skip("this kernel has no Landlock")
    assert writes.failure.startswith("PermissionError")
    assert victim.read_text() == "mine"
    for code in (f"os.remove({str(victim)!r})", f"os.mkdir({str(tmp_path / 'd')!r})"):
        assert verdict(f"import os\n{code}").failure.startswith("PermissionError")
    net = verdict("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)")
    if not {"network", "tcp"} & set(net.isolated):
        pytest.skip("this system isolates no network")
    assert net.failure.startswith(("PermissionError", "OSError: [Errno 101]"))


def test_what_the_environment_has_stays_outside(monkeypatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert verdict("import os\nassert 'SECRET_TOKEN' not in os.environ").is_passed
