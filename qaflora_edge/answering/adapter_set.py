"""The adapter set: what a call uses from its begin to its end."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qaflora_edge.inference.core import Core
    from qaflora_edge.prompt.tokens import Reader
    from qaflora_edge.weighing.weigher import Weigher


@dataclass(frozen=True)
class AdapterSet:
    """Hold a base with adapters in memory.

    core     computes with them
    weigher  knows the adapters in use, and the defaults
    reader   turns what is asked into tokens
    seed     of sampled answers, when a call gives none
    """

    core: "Core"
    weigher: "Weigher"
    reader: "Reader"
    seed: int | None = None
