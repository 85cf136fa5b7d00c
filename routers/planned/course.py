"""A plan that is chosen again while it is followed: the way is as long as there is time for.

Plans of a family, one for each number of evaluations, take different times. Whoever leaves one for another
goes from where he is to the first time of the other that lies ahead. A row of weights holds where the times
that it was made for were the ones taken; elsewhere Adams-Bashforth's stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .timeplan import PASSES, STILL, Array, TimePlan, adams_bashforth, euler, moving

Turn = tuple[int, int]
"""After so many evaluations a run went on as the plan of this many does."""


class Course:
    """One run's plan. grid [N + 1]: the run's own times. plan_of: the family, None for the own steps.

    plan: what is followed. turns: how it came about; enough to go the same way again.
    """

    def __init__(
        self, grid: Array, target: str, plan_of: Callable[[int], TimePlan | None], first: int
    ) -> None:
        self.grid, self.target, self._plan_of = grid, target, plan_of
        self.plan = joined(self.grid[:1], self._of(first), self._near)
        self.turns: list[Turn] = [(0, first)]

    def left(self, made: int) -> int:
        """Evaluations that are still to come after so many."""
        return self.plan.evaluations - made

    def turn(self, made: int, evaluations: int) -> TimePlan:
        """After so many evaluations, at least one, go on as the plan of `evaluations` does."""
        if made == 1:  # no step has been taken
            self.turns = []
        self.turns.append((made, evaluations))
        self.plan = joined(self.plan.times[:made], self._of(evaluations), self._near)
        return self.plan

    def plan_with(self, made: int, left: int) -> int:
        """The number of evaluations of the plan that has so many still to come: else of one with fewer."""
        best, steps = (-1, 1), len(self.grid) - 1
        for number in sorted(range(1, steps + 1), key=lambda n: abs(n - made - left)):
            ahead = self.ahead(made, number)
            if ahead == left:
                return number
            if best[0] < ahead < left:
                best = ahead, number
        return best[1]

    def ahead(self, made: int, evaluations: int) -> int:
        """Evaluations that the plan of so many makes after the present one, the `made`-th."""
        now = self.plan.times[made - 1]
        return int((self._of(evaluations).times[:-1] < now - STILL).sum())

    def _of(self, evaluations: int) -> TimePlan:
        return self._plan_of(evaluations) or euler(moving(self.grid))

    def _near(self, times: Array) -> TimePlan:
        return adams_bashforth(times, 2, moving(self.grid) if self.target == "dense" else None)


def joined(done: Sequence[float] | Array, plan: TimePlan, near: Callable[[Array], TimePlan]) -> TimePlan:
    """The times that were taken, the last of them the present one, then those of a plan that lie ahead.

    near: makes the plan whose weights stand in. At least `PASSES` outputs are kept, whatever comes next.
    """
    done = np.asarray(done, float)
    ahead = plan.times[plan.times < done[-1] - STILL]
    times = np.concatenate([done, ahead])
    stands_in = near(times)
    passes = max(plan.passes, stands_in.passes, PASSES)
    weights, state = np.zeros((len(times) - 1, passes)), np.zeros(len(times) - 1)
    for step in range(len(weights)):
        there = plan.evaluations - (len(weights) - step)
        used = min(step + 1, plan.passes)
        if there >= used - 1 and np.array_equal(
            plan.times[there - used + 1 : there + 2], times[step - used + 1 : step + 2]
        ):
            row = plan.weights[there]
            state[step] = plan.state[there]
        else:
            row = stands_in.weights[step]
        weights[step, : len(row)] = row
    return TimePlan(times, weights, state)
