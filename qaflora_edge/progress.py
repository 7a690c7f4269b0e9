"""How work that takes long tells how far it is."""

from collections.abc import Callable

Tell = Callable[[str, int, int], None]  # what is done; the steps or bytes done, and those in all
TellCount = Callable[[int, int], None]  # the steps or bytes done, and those in all
TellDone = Callable[[int], None]  # the steps or bytes done


def silent(*_: object) -> None:
    """What is called where nobody asks."""
