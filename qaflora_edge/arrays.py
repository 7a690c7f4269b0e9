"""Arrays as signatures name them; the shape stands in the docstring."""

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
