"""The budget policy of a fitted bundle: follows a solved plan, which lands every sample on its budget.

A step of the plan computes the whole stack of blocks or predicts what it adds from its last passes; at one
step of a run, for budgets between two whole steps, only the first blocks are computed. Where CFG branches are
called one after the other, some steps compute the first branch alone.

Shapes: R rows, N blocks, U units of blocks that are computed and cached together, T steps, P passes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..policy import CallInfo, Decision, RunInfo, Units
from ..trace import FULL, REUSE, Actions, feasible
from .plan import Planner, StepPlan
from .prediction import DEPTH, HALF, WHOLE, Levels, Moments

Mask = NDArray[np.bool_]
Weights = NDArray[np.float32]
SLACK = 0.004
"""How far from the budget, as a ratio of dense FLOPs, a plan of whole steps alone may land."""


class PlannedPolicy:
    """Decisions for one budget from a bundle's moments.

    planners: by number of steps and depth, shared between runs. levels [T]: a plan to follow whatever the
    budget. depth: passes a prediction is made from.
    """

    reads_routers = False

    def __init__(
        self,
        moments: Moments,
        planners: dict[tuple[int, int], Planner] | None = None,
        *,
        levels: Levels | None = None,
        depth: int = DEPTH,
    ) -> None:
        self.moments, self.planners, self.depth = moments, {} if planners is None else planners, depth
        self.levels = levels
        self.start(RunInfo(1, 1.0))

    def start(self, run: RunInfo) -> None:
        """Forget the last run's plan and passes."""
        self._run = run
        self._plan: StepPlan | None = None
        self._units: Units = ()
        self._stale = slice(0)
        self._split: tuple[StepPlan, slice] | None = None
        self._first = ""
        self._done: dict[str, Mask] = {}

    @property
    def plan(self) -> StepPlan | None:
        """What this run follows; None before its first decision, and in a dense run."""
        return self._plan

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """What the plan says for this step; see `Policy.decide`."""
        blocks = len(call.costs)
        actions = np.full((call.rows, blocks), FULL, np.int8)
        if self._run.budget >= 1.0 and self.levels is None:
            return Decision(actions)  # a dense run pays for no cache
        if self._plan is None:
            self._start_plan(call)
        if self._split is not None and call.step > 0:  # by now it shows whether there are two branches
            if len(call.branches) == len(self.moments.branches):
                self._plan, self._stale = self._split
            self._split = None
        assert self._plan is not None
        if call.step < self._run.num_steps:
            level = self._plan.levels[call.step]
            if level < (WHOLE if self._follows(call) else HALF):
                actions[:, self._stale if self._plan.partial == call.step else slice(blocks)] = REUSE
            actions = feasible(actions, call.available)
        weights, peer = self._weights(call, actions)
        return Decision(actions, self._units, self.depth, weights, peer=peer)

    # -- the plan ------------------------------------------------------------------------------

    def planner(self, num_steps: int) -> Planner:
        """The planner for runs of `num_steps`, made once."""
        key = num_steps, self.depth
        if key not in self.planners:
            self.planners[key] = Planner(self.moments.at(num_steps), self.depth)
        return self.planners[key]

    def _start_plan(self, call: CallInfo) -> None:
        """Solve the run's plan; a second one, with half steps, if a second CFG branch may call by itself.

        Units are fixed now, before that shows, so they are cut for both. The first step is whole in both.
        """
        self._plan, units, self._stale = self._solve(call, split=False)
        first = branch_number(call, self.moments) == 0
        if len(self.moments.branches) == 2 and call.parts == 1 and first and not self._run.skips:
            self._first = call.branch
            plan, _, stale = self._solve(call, split=True)
            units = _cut(units, stale.start or 0)
            self._split = plan, stale
        self._units = units

    def _follows(self, call: CallInfo) -> bool:
        """Whether a call is of the second of two CFG branches with calls of their own."""
        assert self._plan is not None
        return self._plan.split and call.branch != self._first

    def _solve(self, call: CallInfo, split: bool) -> tuple[StepPlan, Units, slice]:
        """The plan for this run's budget at this call's costs, its units, what the partial step predicts."""
        steps, blocks = self._run.num_steps, len(call.costs)
        if self.levels is not None:
            levels = self.levels if split else WHOLE * (self.levels >= HALF).astype(np.int8)
            return StepPlan(levels, None, 0.0, 0.0, split), self._run.segments, slice(0)
        costs = np.array([cost.dense for cost in call.costs])
        stack = costs.sum()
        dense = call.outside + stack
        computed = steps * (self._run.budget * dense - call.outside) / stack
        grain = WHOLE if split else 1  # plans count whole steps, or halves
        solve = partial(self.planner(steps).plan, split=split)
        nearest = min(max(round(computed * grain) / grain, 1), steps)
        if abs(nearest - computed) * stack <= SLACK * steps * dense:
            return solve(nearest), self._run.segments, slice(0)
        count = min(max(int(computed * grain + 1e-9) / grain, 1), steps)
        # A partial step computes the first blocks: as many as come nearest to the budget. They see a true
        # input. The last blocks, fed by a prediction, are better early in a run, but cost several dB late.
        share = np.concatenate([[0.0], np.cumsum(costs)])
        some = int(np.abs(share - (computed - count) * stack).argmin())
        if some in (0, blocks):
            return solve(count + (some == blocks)), self._run.segments, slice(0)
        plan = solve(count + float(share[some] / stack))
        if plan.partial is not None and plan.levels[plan.partial] == HALF:
            # Only the second branch has blocks left to compute, so it computes twice as many.
            some = int(np.abs(share - WHOLE * (computed - count) * stack).argmin())
            if some in (0, blocks):
                return solve(count + (some == blocks) / WHOLE), self._run.segments, slice(0)
        return plan, _cut(self._run.segments, some), slice(some, blocks)

    # -- what reuses are predicted from --------------------------------------------------------

    def _weights(self, call: CallInfo, actions: Actions) -> tuple[Weights, tuple[str, Weights] | None]:
        """[R, U, P]: weights of the cached passes, newest first, for every unit that is predicted; and those
        of the first branch's passes, where a half step looks at them.
        """
        steps, plan, units = self._run.num_steps, self._plan, len(self._units)
        done = self._done.setdefault(call.branch, np.zeros((units, max(steps, 1)), bool))
        planner = self.planner(steps)
        branches = row_branches(call, self.moments)
        weights = np.zeros((call.rows, units, self.depth), np.float32)
        crossed = np.zeros_like(weights)
        assert plan is not None
        half = call.step < steps and self._follows(call) and plan.levels[call.step] == HALF
        for unit, (first, last) in enumerate(self._units):
            if actions[0, first] == REUSE:
                past = _newest(done[unit, : call.step], min(self.depth, int(call.available[0, first])))
                peers = _newest(self._done[self._first][unit, : call.step + 1], self.depth) if half else ()
                for row in range(call.rows):
                    both = planner.weights(branches[row], call.step, past, peers)
                    weights[row, unit, : len(past)] = both[: len(past)]
                    crossed[row, unit, : len(peers)] = both[len(past) :]
            if call.step < steps:
                done[unit, call.step] = (actions[0, first : last + 1] >= 0).all()
        return weights, (self._first, crossed) if crossed.any() else None


def _newest(done: Mask, count: int) -> tuple[int, ...]:
    """The last `count` steps that were computed, newest first."""
    return tuple(np.flatnonzero(done)[::-1][:count].tolist())


def row_branches(call: CallInfo, moments: Moments) -> list[int]:
    """Number of the moments' branch that each row of a call [R] belongs to."""
    if call.parts == len(moments.branches):
        return [row * call.parts // call.rows for row in range(call.rows)]
    return [branch_number(call, moments)] * call.rows


def branch_number(call: CallInfo, moments: Moments) -> int:
    """Which of the moments' branches a call is of: by its name, or by the order in which branches came."""
    names = moments.branches
    number = (names if call.branch in names else call.branches).index(call.branch)
    return number if number < len(names) else 0


def _cut(segments: Units, block: int) -> Units:
    """The segments, the one that `block` lies in cut before it."""
    cut: list[tuple[int, int]] = []
    for first, last in segments:
        cut += [(first, block - 1), (block, last)] if first < block <= last else [(first, last)]
    return tuple(cut)
