"""How long a test waits for another process before it fails.

Only a hang takes so long: machines that run tests may be ten times slower than a developer's, and
busy with other things.
"""

import time
from collections.abc import Callable

PATIENCE_S = 600.0


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until something holds; a failure when it does not come to."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
