"""What a fit is asked for. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ..planned.spent import EXACT_SHARE, evaluations_for
from ..spec import WIDTHS

NARROW_BELOW = 0.15
"""Budgets from which on down narrow evaluations are tried, unless one budget alone is calibrated."""
NARROW, NARROW_SHARE = 4, 0.2
"""Evaluations of a plan with narrow ones, and as a share of the steps, at most: beyond, fewer whole ones were
always better."""
FEW = 4
"""Steps of a model that has nothing to leave out, at most: any number of evaluations is tried narrow."""
ROUTED = 8
"""Evaluations of a plan that leaves them to routers, at most."""
BUDGETS = 19
"""Plans at most: from 0.05 to 0.95."""
LEADING = 0.35
"""Budget whose plan to the exact solution is refined; the others are bent alike."""
WARPS_TRIED, RUNS_A_ROUND = 5, 13
"""Runs of that plan: with other times, and for each round of refinement, at most."""
MANY, ALL = 6, 6
"""From so many plans on the first one has all candidates, which are so many."""


@dataclass(frozen=True)
class FitSettings:
    """budgets: that plans are made for; None: `BUDGETS` of them. targets: see `routers.attach`. tries:
    candidates per plan; None: as many as 20 dense generations allow for all plans, 2 for one. rounds: of
    refinement to the exact solution. seed: of the first sample's noise, for the record.
    """

    budgets: tuple[float, ...] | None = None
    targets: tuple[str, ...] = ("dense",)
    tries: int | None = None
    rounds: int = 2
    seed: int = 0

    def evaluations(self, steps: int) -> list[int]:
        """Numbers of evaluations that get a plan, ascending; a run of all steps needs none."""
        budgets = self.budgets or [i / (BUDGETS + 1) for i in range(1, BUDGETS + 1)]
        return sorted({evaluations_for(budget, steps) for budget in budgets} - {steps})

    def leading(self, steps: int) -> int:
        """How many evaluations the plan to the exact solution makes that the others are bent like."""
        return min(evaluations_for(LEADING, steps), max(self.evaluations(steps)))

    def tries_for(self, evaluations: int, steps: int, first: bool) -> int:
        """How many candidates a plan has: all, if it is the first of many and tells which are good; one, if
        it is long.
        """
        if self.tries is not None:
            return self.tries
        if len(self.evaluations(steps)) < MANY:
            return max(1, min(ALL, steps // evaluations))
        return ALL if first else 3 if evaluations <= steps / 2 else 1

    def narrow(self, steps: int, routed: bool = False) -> list[int]:
        """Numbers of evaluations that are tried narrow, at each width below the whole one. routed: whether
        routers may decide over them too.
        """
        few, several = steps <= FEW, self.budgets is None or len(self.budgets) > 1
        if routed or (few and several):
            return list(range(1, min(steps, ROUTED) + 1))
        asked = self.budgets is None or (several and self.budgets[0] < NARROW_BELOW)
        return list(range(1, max(1, min(NARROW, int(NARROW_SHARE * steps))) + 1)) if asked else []

    def runs(self, steps: int) -> list[int]:
        """Evaluations of each run of the samples that a fit makes, at most."""
        numbers, narrow = self.evaluations(steps), self.narrow(steps)
        middle = numbers[len(numbers) // 2]
        made = []
        if "dense" in self.targets:
            made.append(steps)
            made += [n for n in numbers for _ in range(self.tries_for(n, steps, first=n == middle))]
        if "exact" in self.targets:
            runs = (self.tries or WARPS_TRIED) + 1 + self.rounds * RUNS_A_ROUND
            made += [EXACT_SHARE * steps, *[self.leading(steps)] * runs]
        # whole ones too, measured beside the narrow ones
        few = [n for n in numbers if n <= max(narrow, default=0)]
        return made + len(self.targets) * (few + (len(WIDTHS) - 1) * narrow)

    def cost(self, steps: int) -> float:
        """What a fit costs at most, in dense generations of its samples."""
        return sum(self.runs(steps)) / steps
