"""A plan bent as a whole: ten numbers that are 0 for Adams-Bashforth's weights and change them along the run.

Weights and times bend smoothly from the run's beginning to its end, so that a handful of samples tell the
numbers (`refine.py`) and one set serves every number of evaluations.
"""

from __future__ import annotations

import numpy as np

from .timeplan import Array, TimePlan, adams_bashforth

BENDS = 10
"""Numbers of a bend: log of the shift, bend of the times towards both ends, then two for each of slope,
scale, curve and state: where the run begins, and how that changes until its end."""
PASSES = 3
"""Outputs that a step is made from."""
POWERS = (1, 2, 0, 2)
"""Of the steps' length, by which slope, scale, curve and state grow."""
LONGEST, MANY = 2.0, 2.5
"""Steps count as so much longer than those that numbers were found for, at most; up to so many times as many
evaluations are bent alike."""
COMMON = np.array([0.0, 0.0, 0.10, -0.44, 0.022, -0.060, 0.025, 0.030, -0.018, -0.020])
COMMON_AT = 7
"""What refinement gave on samples of qwen-image-tiny, and at how many evaluations. It serves flux-tiny too,
which it never saw (docs/notes/solver-plan.md): v is continued a little further early in a run, less far at
its end.
"""


def bent(plan: TimePlan, numbers: Array, at: int) -> TimePlan:
    """A plan of Adams-Bashforth's, of order two, bent. Raises ValueError if that moves times across another.

    slope: relative change of the weight on v_i - v_{i-1}. scale: added to the newest output's weight. curve:
    added to that of v_i - 2 v_{i-1} + v_{i-2}. state: added to that of x. at: evaluations of the plan that
    the numbers were found for; with fewer, slope, scale and state grow like what they make up for, and with
    many they vanish, so that the plan comes to the exact solution as Adams-Bashforth's does.
    """
    ratio = at / plan.evaluations
    longer = min(max(ratio, min(1.0, MANY * ratio)), LONGEST)
    shift, bend, *rest = np.asarray(numbers, float).tolist()
    times = _bent_times(plan.times, shift, bend)
    own = adams_bashforth(times, 2).weights
    weights, state = np.zeros((len(own), PASSES)), np.zeros(len(own))
    weights[:, :2] = own
    for step, done in enumerate(np.linspace(0, 1, len(own))):
        slope, scale, curve, state[step] = (
            (start + change * done) * longer**power
            for start, change, power in zip(rest[::2], rest[1::2], POWERS, strict=True)
        )
        weights[step, :2] += slope * own[step, 1] * np.array([-1, 1])
        weights[step, 0] += scale
        if step >= 2:
            weights[step] += curve * np.array([1, -2, 1])
    return TimePlan(times, weights, state)


def _bent_times(times: Array, shift: float, bend: float) -> Array:
    """Times whose log odds, as shares of the run's span, are stretched and moved."""
    share = (times[1:-1] - times[-1]) / (times[0] - times[-1])
    odds = np.log(share / (1 - share))
    moved = times[-1] + (times[0] - times[-1]) / (1 + np.exp(-(shift + (1 + bend) * odds)))
    return np.concatenate([times[:1], moved, times[-1:]])
