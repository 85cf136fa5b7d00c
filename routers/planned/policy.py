"""The budget policy of a fitted bundle: follows a solved plan, which lands every sample on its budget.

A step of the plan computes the whole stack of blocks or predicts what it adds from its last passes; at one
step of a run, for budgets between two whole steps, only the first blocks are computed. Where CFG branches are
called one after the other, some steps compute the first branch alone.

Shapes: R rows, N blocks, U units of blocks that are computed and cached together, T steps, P passes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..policy import CallInfo, RunInfo, Units
from ..trace import FULL, REUSE, Actions
from .moments import HALF, WHOLE, Levels, Moments
from .plan import Planner, StepPlan
from .prediction import DEPTH

Mask = NDArray[np.bool_]
SLACK = 0.004
"""How far from the budget, as a ratio of dense FLOPs, a plan of whole steps alone may land."""


class PlannedPolicy:
    """Decisions for one budget from a bundle's moments.

    planners: by number of steps, shared between runs. levels [T]: a plan to follow whatever the budget.
    depth: passes a prediction is made from. It reads nothing from the device.
    """

    immediate = reads_skipped = reads_routers = False
    order = 1
    stores: NDArray[np.int8] | None = None

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
        self.cache_depth = depth
        self.units: Units | None = None
        self.weights: NDArray[np.float32] | None = None
        self.peer: tuple[str, NDArray[np.float32]] | None = None
        self._run = RunInfo(0, 1, 1.0)
        self._plan: StepPlan | None = None
        self._done: dict[str, Mask] = {}
        self._stale = slice(0)
        self._split: tuple[StepPlan, slice] | None = None

    def start(self, run: RunInfo) -> None:
        """Forget the last run's plan and passes."""
        self._run, self._plan, self._done = run, None, {}
        self.units = self.weights = self.peer = self._split = None
        elastic = run.budget < 1.0 or self.levels is not None  # a dense run pays for no cache
        self.cache_depth = self.depth if elastic else 0

    @property
    def plan(self) -> StepPlan | None:
        """What this run follows; None before its first decision, and in a dense run."""
        return self._plan

    def set_num_steps(self, num_steps: int) -> None:
        """The run turned out to have another number of steps: plan anew."""
        self._run, self._plan = replace(self._run, num_steps=num_steps), None

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        """Action codes int8 [R, N] for a call; logits are not looked at."""
        blocks, self.weights, self.peer = len(call.costs), None, None
        if self._run.budget >= 1.0 and self.levels is None:
            return np.full((call.rows, blocks), FULL, np.int8)
        if self._plan is None:
            self._start_plan(call)
        if self._split is not None and call.step > 0:  # by now it shows whether there are two branches
            if len(call.branches) == len(self.moments.branches):
                self._plan, self._stale = self._split
            self._split = None
        assert self.units is not None and self._plan is not None
        codes = np.full((call.rows, blocks), FULL, np.int8)
        if call.step < self._run.num_steps:
            level = self._plan.levels[call.step]
            if level < (WHOLE if self._follows(call) else HALF):
                codes[:, self._stale if self._plan.partial == call.step else slice(blocks)] = REUSE
            codes[(codes == REUSE) & (call.available == 0)] = FULL
        self.weights = self._weights(call, codes)
        return codes

    def decide_block(
        self, call: CallInfo, block: int, gate: NDArray[np.float32], widths: NDArray[np.float32]
    ) -> Actions:
        """Not an immediate policy."""
        raise AssertionError("PlannedPolicy decides before the blocks run")

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
        names = self.moments.branches
        if len(names) == 2 and call.parts == 1 and call.branch == names[0] and not self._run.skips:
            plan, _, stale = self._solve(call, split=True)
            units = _cut(units, stale.start or 0)
            self._split = plan, stale
        self.units = units

    def _follows(self, call: CallInfo) -> bool:
        """Whether a call is of the second of two CFG branches with calls of their own."""
        assert self._plan is not None
        return self._plan.split and call.branch != self.moments.branches[0]

    def _solve(self, call: CallInfo, split: bool) -> tuple[StepPlan, Units, slice]:
        """The plan for this run's budget at this call's costs, its units, what the partial step predicts."""
        steps, blocks = self._run.num_steps, len(call.costs)
        if self.levels is not None:
            levels = self.levels if split else WHOLE * (self.levels >= HALF).astype(np.int8)
            return StepPlan(levels, None, 0.0, 0.0, split), self._run.segments, slice(0)
        costs = np.array([cost.dense for cost in call.costs])
        stack = costs.sum() + blocks * call.overhead
        dense = call.outside + costs.sum()
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
        price = np.where(share > 0, share + blocks * call.overhead, 0.0)
        some = int(np.abs(price - (computed - count) * stack).argmin())
        if some in (0, blocks):
            return solve(count + (some == blocks)), self._run.segments, slice(0)
        plan = solve(count + float(share[some] / costs.sum()))
        if plan.partial is not None and plan.levels[plan.partial] == HALF:
            # Only the second branch has blocks left to compute, so it computes twice as many.
            some = int(np.abs(price - WHOLE * (computed - count) * stack).argmin())
            if some in (0, blocks):
                return solve(count + (some == blocks) / WHOLE), self._run.segments, slice(0)
        return plan, _cut(self._run.segments, some), slice(some, blocks)

    # -- what reuses are predicted from --------------------------------------------------------

    def _weights(self, call: CallInfo, codes: Actions) -> NDArray[np.float32]:
        """[R, U, P]: weights of the cached passes, newest first, for every unit that a row predicts."""
        assert self.units is not None
        steps = self._run.num_steps
        done = self._done.get(call.branch)
        if done is None or done.shape[0] != call.rows:
            done = self._done[call.branch] = np.zeros((call.rows, len(self.units), max(steps, 1)), bool)
        planner = self.planner(steps)
        branches = row_branches(call, self.moments)
        weights = np.zeros((call.rows, len(self.units), self.depth), np.float32)
        first_branch = self.moments.branches[0]
        crossed = np.zeros_like(weights)
        assert self._plan is not None
        half = call.step < steps and self._follows(call) and self._plan.levels[call.step] == HALF
        for unit, (first, last) in enumerate(self.units):
            for row in range(call.rows):
                if codes[row, first] != REUSE:
                    continue
                past = np.flatnonzero(done[row, unit, : call.step])[::-1]
                passes = tuple(past[: min(self.depth, int(call.available[row, first]))].tolist())
                peers: tuple[int, ...] = ()
                if half:
                    seen = np.flatnonzero(self._done[first_branch][row, unit, : call.step + 1])[::-1]
                    peers = tuple(seen[: self.depth].tolist())
                found = planner.weights(branches[row], call.step, passes, peers)
                weights[row, unit, : len(passes)] = found[: len(passes)]
                crossed[row, unit, : len(peers)] = found[len(passes) :]
            if call.step < steps:
                done[:, unit, call.step] = (codes[:, first : last + 1] >= 0).all(axis=1)
        self.peer = (first_branch, crossed) if crossed.any() else None
        return weights


def row_branches(call: CallInfo, moments: Moments) -> list[int]:
    """Number of the moments' branch that each row of a call [R] belongs to."""
    if call.parts == len(moments.branches):
        return [row * call.parts // call.rows for row in range(call.rows)]
    return [moments.index(call.branch)] * call.rows


def _cut(segments: Units, block: int) -> Units:
    """The segments, the one that `block` lies in cut before it."""
    cut: list[tuple[int, int]] = []
    for first, last in segments:
        cut += [(first, block - 1), (block, last)] if first < block <= last else [(first, last)]
    return tuple(cut)
