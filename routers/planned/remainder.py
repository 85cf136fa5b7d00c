"""What is left of a budget beyond whole evaluations: one more, of the first blocks only.

Its output is true to the share of the blocks that ran; the other blocks add what they added before, continued
in time. So the plan trusts it by that share: it takes the middle of the plan's longest step, and the second
half of that step goes along a mixture of what the plan says without it and what Adams-Bashforth says with it.
With nothing left the plan is as it was; with a whole evaluation left it is one more of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..policy import CallInfo, Decision, OpenPolicy, RunInfo, Units
from ..trace import REUSE
from .timeplan import Array, TimePlan, adams_bashforth, moving

LEAST = 0.04
"""Less than this of an evaluation is not worth a step."""


@dataclass(frozen=True)
class Remainder:
    """plan: with the partial evaluation in it. at: its number. share: of it that is to be computed."""

    plan: TimePlan
    at: int
    share: float


def with_remainder(plan: TimePlan, grid: Array, share: float) -> Remainder | None:
    """A plan with a share of an evaluation more; None if there is too little left, or no room for it.

    grid [N + 1]: the run's own times: a time of a plan that keeps to them is one of them.
    """
    grid, times = moving(grid), plan.times
    if not LEAST <= share < 1 or plan.evaluations < 2:
        return None
    inside = [grid[(grid < a) & (grid > b)] for a, b in pairwise(times[1:])]
    steps = [i + 1 for i, free in enumerate(inside) if len(free)]  # not the first: it has no past
    if not steps:
        return None
    step = max(steps, key=lambda i: len(inside[i - 1]))
    free = inside[step - 1]
    middle = float(free[np.abs(free - (times[step] + times[step + 1]) / 2).argmin()])
    return Remainder(_inserted(plan, step, middle, share), step + 1, share)


def _inserted(plan: TimePlan, step: int, time: float, share: float) -> TimePlan:
    """The plan with an evaluation within a step, trusted by a share."""
    count, passes = plan.evaluations, plan.passes + 1
    times = np.insert(plan.times, step + 1, time)
    weights, state = np.zeros((count + 1, passes)), np.insert(plan.state, step + 1, plan.state[step])
    weights[: step + 1, :-1] = plan.weights[: step + 1]
    consistent = adams_bashforth(times, 2).weights[step + 1]
    weights[step + 1, 1:] = (1 - share) * plan.weights[step]
    weights[step + 1, : len(consistent)] += share * consistent
    state[step + 1] *= 1 - share
    for later in range(step + 1, count):  # their outputs are counted without the inserted one
        back = later - step  # outputs since it
        weights[later + 1, :back] = plan.weights[later, :back][: passes - 1]
        weights[later + 1, back + 1 :] = plan.weights[later, back:]
    return TimePlan(times, weights, state)


class PartialPolicy(OpenPolicy):
    """Everything is computed but in one call of each branch: there the first blocks, as many as come nearest
    to a share of the call's FLOPs, and the rest adds what it added before, continued in time.
    """

    def __init__(self, remainder: Remainder) -> None:
        self.at, self.share = remainder.at, remainder.share
        self._units: Units | None = None

    def start(self, run: RunInfo) -> None:
        """Units are cut at the first call, which tells what blocks cost."""
        self._units, self._segments = None, run.segments

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Full, but for the last blocks in the partial call."""
        costs = np.array([cost.dense for cost in call.costs])
        spent = call.outside + np.concatenate([[0.0], np.cumsum(costs)])
        kept = int(np.abs(spent - self.share * spent[-1]).argmin())
        if self._units is None:
            self._units = cut(self._segments, kept)
        actions = super().decide(call, logits).actions
        if call.step == self.at:
            actions[:, kept:] = np.where(call.available[:, kept:] > 0, REUSE, actions[:, kept:])
        depth = 2 if call.step <= self.at else 0
        return Decision(actions, self._units, depth, order=1)


def cut(segments: Units, block: int) -> Units:
    """The segments, the one that `block` lies in cut before it."""
    parts: list[tuple[int, int]] = []
    for first, last in segments:
        parts += [(first, block - 1), (block, last)] if first < block <= last else [(first, last)]
    return tuple(parts)
