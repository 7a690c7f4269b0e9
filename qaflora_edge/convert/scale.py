"""The scales of an adapter's modules, and the one alpha of its GGUF. No I/O."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from qaflora_edge.peft.module import PeftModule


def common_alpha(modules: Sequence[PeftModule]) -> float:
    """Choose the alpha under which most modules need no change; a float32 value.

    A GGUF holds one alpha, and the runtime's scale is alpha / rank of the tensor.
    """
    counts = Counter(float(np.float32(module.scale * module.rank)) for module in modules)
    return max(counts, key=lambda alpha: (counts[alpha], alpha))


def scale_factor(scale: float, rank: int, alpha: float) -> float:
    """Give what B is multiplied by so that alpha / rank gives `scale`; exactly 1 if it does."""
    if float(np.float32(scale * rank)) == alpha:
        return 1.0
    return scale * rank / alpha
