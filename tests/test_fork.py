"""Engines and processes: no waiting for threads that a fork did not take along, no copies."""

import sys

import pytest
from patience import python

CODE = """\
import os, sys
from qaflora_edge import Engine, QafloraError

engine = Engine(sys.argv[1], n_ctx=128)
if sys.argv[2] == "used":
    engine.weights("the king")

def own():
    with Engine(sys.argv[1], n_ctx=128) as new:
        new.weights("the king")

child = os.fork()
if child == 0:
    for call in (lambda: engine.weights("the king"), own):
        try:
            call()
            print("worked", flush=True)
        except QafloraError as error:
            print(error, flush=True)
    engine.close()
    os._exit(0)
os.waitpid(child, 0)
print(child != 0 and len(engine.weights("the king").adapters))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("state", ["fresh", "used"])
def test_forked_process_is_told_and_does_not_wait(made, state) -> None:
    done = python("-c", CODE, made.folder, state, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "2"  # the parent goes on
    if state == "fresh":
        assert lines == ["worked", "worked"]
        return
    assert len(set(lines)) == 1
    assert lines[0].startswith("This process was forked from process ")
    assert lines[0].endswith(
        ", in which an Engine was in use, and the library's threads are not here. Start processes "
        "with multiprocessing's method 'spawn', or fork before the first Engine is used."
    )
