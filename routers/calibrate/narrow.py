"""Which evaluations are narrow: few ones at every width are fitted in closed loop, measured where they end.

Kept are those that end nearer to the target than everything that costs less, whole evaluations among it.

Adams-Bashforth's weights, which serve more evaluations, shoot beyond the target with so few: pictures with
more contrast than the model's. So weights are fitted near Euler's, which only go along what was computed, and
a plan whose end holds more energy than the target's counts as farther away by that much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..planned.narrow import NarrowPlan
from ..planned.timeplan import Array, TimePlan, euler, resampled, shifted
from ..planned.universal import missing_shift
from ..spec import WIDTHS
from .settings import FEW, NARROW

RATIOS = (0.3, 0.5, 0.7, 0.85)
"""What routers may spend of an evaluation, of the plans that are tried."""
SHIFT = 1.75
"""Of the times towards the noise, unless the scheduler knows better (`warps`)."""


@dataclass(frozen=True)
class Measured:
    """A plan that ran on the recorded samples. share: of the dense run's FLOPs. error: see
    `overshooting_error`.
    """

    plan: TimePlan
    share: float
    error: float
    ratio: float = 1.0


def candidates(
    grid: Array, numbers: Sequence[int], scheduler: Any, routed: bool
) -> Iterator[tuple[TimePlan, float]]:
    """Few narrow evaluations, from the least on, with Euler's weights, and what routers may spend of each.

    grid [N + 1]: the run's own times; numbers: of evaluations. routed: whether there are routers. A model of
    few steps may know no times but its own.
    """
    few = len(grid) - 1 <= FEW
    shift, _ = getattr(scheduler, "warps", {}).get("exact", (SHIFT, 1.0))
    for evaluations in (n for n in numbers if n < len(grid)):
        moved = shifted(resampled(grid, evaluations), missing_shift(grid, shift))
        steps = euler(own_times(grid, evaluations) if few else moved)
        for width in WIDTHS[:-1] if evaluations <= NARROW else ():
            yield replace(steps, widths=np.full(evaluations, width)), 1.0
        for ratio in RATIOS if routed else ():
            yield steps, ratio


def own_times(grid: Array, evaluations: int) -> Array:
    """[n + 1]: some of a run's own times, the first and the last among them, evenly apart."""
    chosen = np.linspace(0, len(grid) - 2, evaluations).round().astype(int)
    return np.append(grid[chosen], grid[-1])


def overshooting_error(ended: Tensor, target: Tensor) -> float:
    """Squared distance and energy beyond the target's, over the target's energy: mean of samples [m, ...]."""
    ended, target = ended.flatten(1).double(), target.flatten(1).double()
    energy = target.square().sum(1)
    distance = (ended - target).square().sum(1) / energy
    beyond = (ended.square().sum(1) / energy - 1).clamp_min(0)
    return float((distance + beyond).mean())


def worth_it(measured: Iterable[Measured], below: float) -> list[NarrowPlan]:
    """The narrow ones of those that ended nearer than everything cheaper, each up to the next one's share.

    below: the least budget that buys more whole evaluations than were measured.
    """
    nearer: list[Measured] = []
    for found in sorted(measured, key=lambda m: m.share):
        if not nearer or found.error < nearer[-1].error:
            nearer.append(found)
    ends = [*(found.share for found in nearer[1:]), below]
    return [
        NarrowPlan(found.plan, found.share, end, found.ratio)
        for found, end in zip(nearer, ends, strict=True)
        if found.plan.narrows or found.ratio < 1
    ]
