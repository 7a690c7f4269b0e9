"""How long a test waits for another process before it fails.

Only a hang takes so long: machines that run tests may be ten times slower than a developer's, and
busy with other things.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 600.0


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until something holds; a failure when it does not come to."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def python(*words: object, env: dict[str, str] | None = None, **options: Any) -> Any:
    """Run another Python with these words; env is added to this process's environment."""
    command = [sys.executable, *map(str, words)]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": PATIENCE_S} | options
    return subprocess.run(command, env=os.environ | (env or {}), **options)
