"""What is left of a budget beyond whole evaluations: one more evaluation, of the first blocks only.

It is the last one of a plan with one evaluation more: the first blocks see their true input, the others add what
they added in the evaluations before, continued in time. Late in a run that is nearly as good as the whole evaluation;
early it is worse than none (docs/notes/solver-plan.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..policy import CallInfo, Decision, OpenPolicy, RunInfo, Units
from ..trace import REUSE

PASSES = 2
"""What the last blocks added in so many evaluations is continued."""


class PartialPolicy(OpenPolicy):
    """Everything is computed but in one call of each branch: there the first blocks, as many as come nearest
    to a share of the call's FLOPs.

    at: the number of that evaluation. share: of it that is to be computed.
    """

    def __init__(self, at: int, share: float) -> None:
        self.at, self.share = at, share

    def start(self, run: RunInfo) -> None:
        """Units are cut in the first call, which tells what blocks cost."""
        self._units: Units | None = None
        self._segments, self._whole = run.segments, run.skips

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Full, but for the last blocks of the partial evaluation."""
        costs = np.array([cost.dense for cost in call.costs])
        spent = call.outside + np.concatenate([[0.0], np.cumsum(costs)])
        kept = len(costs) if self._whole else int(np.abs(spent - self.share * spent[-1]).argmin())
        if self._units is None:
            self._units = cut(self._segments, kept)
        actions = super().decide(call, logits).actions
        if call.step == self.at:
            actions[:, kept:] = np.where(call.available[:, kept:] > 0, REUSE, actions[:, kept:])
        return Decision(actions, self._units, PASSES if call.step <= self.at else 0, order=1)


def cut(segments: Units, block: int) -> Units:
    """The segments, the one that `block` lies in cut before it."""
    parts: list[tuple[int, int]] = []
    for first, last in segments:
        parts += [(first, block - 1), (block, last)] if first < block <= last else [(first, last)]
    return tuple(parts)
