"""Arrays as signatures name them; the shape stands in the docstring. Numpy is not imported."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike as ArrayLike
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]
else:
    ArrayLike = F32 = F64 = Any
