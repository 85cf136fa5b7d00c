"""What a call costs at a length that was not counted, told by the lengths that were.

Of all that a transformer does only attention grows with the square of a sequence's length, everything else
with the length itself, so that FLOPs are a parabola in it: three counted lengths give the others. A fourth
shows whether that holds for this transformer (one that pads to windows follows no parabola).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .block import Shapes

NEEDED = 4
EXACT = 1e-6
"""Relative; FLOPs are whole numbers."""


def length_told(
    shapes: Shapes, known: Mapping[Any, NDArray[np.float64]]
) -> tuple[Any, NDArray[np.float64]] | None:
    """Numbers of a call of these shapes, and the shapes of one that it is like but for one length.

    known: numbers of calls by their shapes. None where they do not tell.
    """
    by_places: dict[Any, dict[int, Any]] = {}
    for other in known:
        found = _differs(shapes, other)
        if found is not None:
            by_places.setdefault((found[0], found[2]), {})[found[1]] = other
    for (_, length), others in by_places.items():
        if len(others) < NEEDED:
            continue
        lengths = sorted(others)
        values = [known[others[each]] for each in lengths]
        base, told = (lengths[0], lengths[len(lengths) // 2], lengths[-1]), []
        parts = values[0], values[len(lengths) // 2], values[-1]
        for at in (*lengths, length):
            told.append(sum(w * part for w, part in zip(_lagrange(base, at), parts, strict=True)))
        if all(np.allclose(a, b, rtol=EXACT, atol=0) for a, b in zip(told, values, strict=False)):
            return others[lengths[0]], np.asarray(told[-1])
    return None


def _lagrange(base: tuple[int, int, int], at: int) -> list[float]:
    """Weights of the values at three places, for a parabola's value at another."""
    return [float(np.prod([(at - other) / (one - other) for other in base if other != one])) for one in base]


def _differs(shapes: Shapes, other: Shapes) -> tuple[Any, int, int] | None:
    """Where one length alone differs: its places, the other's and the own length."""
    if len(shapes) != len(other):
        return None
    places, pairs = [], set()
    for (name, shape), (other_name, other_shape) in zip(shapes, other, strict=True):
        if name != other_name or len(shape) != len(other_shape):
            return None
        for axis, (own, its) in enumerate(zip(shape, other_shape, strict=True)):
            if own != its:
                places.append((name, axis))
                pairs.add((its, own))
    if len(pairs) != 1:
        return None
    ((its, own),) = pairs
    return tuple(places), its, own
