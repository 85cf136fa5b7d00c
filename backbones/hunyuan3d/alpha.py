"""Where an alpha channel shows something. Torch-free.

Shapes: H, W rows and columns of the picture in px.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FAINT = 0.1
"""Alpha up to this share of the picture's highest is no foreground: matting leaves traces everywhere."""


def solid(alpha_HW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where the foreground is: pixels that are more than faintly opaque, bool `[H, W]`."""
    mask: NDArray[np.bool_] = alpha_HW > FAINT * alpha_HW.max(initial=0)
    return mask
