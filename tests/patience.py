"""How long a test waits for another process before it fails.

Only a hang takes so long: machines that run tests may be ten times slower than a developer's, and
busy with other things.
"""

PATIENCE_S = 600.0
