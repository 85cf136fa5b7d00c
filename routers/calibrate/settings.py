"""What a fit is asked for. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ..planned.spent import evaluations_for

EXACT = 4
"""Evaluations of the exact run, as a multiple of the dense run's: AB2's error is then far below any plan's."""
TRIES = 2
"""Candidates that are run for every number of evaluations."""


@dataclass(frozen=True)
class FitSettings:
    """budgets: that plans are made for; None: for every number of evaluations. targets: see
    `routers.attach`. tries: candidates per plan. seed: of the first sample's noise, for the record.
    """

    budgets: tuple[float, ...] | None = None
    targets: tuple[str, ...] = ("dense",)
    tries: int = TRIES
    seed: int = 0

    def evaluations(self, steps: int) -> list[int]:
        """Numbers of evaluations that get a plan, ascending; a run of all steps needs none."""
        if self.budgets is None:
            return list(range(1, steps))
        return sorted({evaluations_for(budget, steps) for budget in self.budgets} - {steps})

    def cost(self, steps: int) -> float:
        """What a fit costs, in dense generations of its samples."""
        plans = self.tries * sum(self.evaluations(steps)) / steps
        return 1 + len(self.targets) * plans + EXACT * ("exact" in self.targets)
