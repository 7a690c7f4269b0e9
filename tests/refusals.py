"""What an expected error says."""

from collections.abc import Callable
from typing import Any

import pytest


def refused(kind: type[Exception], call: Callable[..., object], *args: Any, **options: Any) -> str:
    """Give the message of the expected error, raised exactly as this class."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert type(caught.value) is kind
    return str(caught.value)
