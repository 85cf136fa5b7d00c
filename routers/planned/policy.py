"""The budget policy: follows a solved plan, bends it per sample, and lands each sample on its budget.

A step of the plan computes the whole stack of blocks or predicts what it adds from its last passes; at one
step of a run, for budgets between two whole steps, only the first blocks are computed. Where CFG branches are
called one after the other, some steps compute the first branch alone. Where the routers
see that a sample's error is unusually large or small just now, it exchanges a computed step with the
next predicted one, which leaves what it spends unchanged.

Shapes: R rows, N blocks, U units of blocks that are computed and cached together, T steps, P passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..policy import CallInfo, RunInfo, Units
from ..trace import FULL, REUSE, Actions
from .plan import DEPTH, HALF, WHOLE, Levels, Moments, Planner, StepPlan

Mask = NDArray[np.bool_]
SWAP_LOG_RATIO = 0.7
"""How much larger (or smaller) than so far, as a log, a sample's error must be to exchange two steps."""


SLACK = 0.004
"""How far from the budget, as a ratio of dense FLOPs, a plan of whole steps alone may land."""


@dataclass
class _Rows:
    """What the rows of a run do: levels [R, T], 0, HALF or WHOLE; typical [R]: mean gate logit so far;
    calls: how many.
    """

    levels: NDArray[np.int8]
    typical: NDArray[np.float64]
    calls: int = 0
    step: int = 0


class PlannedPolicy:
    """Decisions for one budget from a bundle's moments.

    planners: by number of steps, shared between runs. levels [T]: a plan to follow whatever the budget.
    depth: passes a prediction is made from.
    per_sample: False ignores the routers (and reads nothing from the device). batch_mean: every row
    follows the batch's mean logits (the paper's way; for comparison).
    """

    immediate = reads_skipped = False
    order = 1
    stores: NDArray[np.int8] | None = None

    def __init__(
        self,
        moments: Moments,
        planners: dict[tuple[int, int], Planner] | None = None,
        *,
        levels: Levels | None = None,
        depth: int = DEPTH,
        per_sample: bool = True,
        batch_mean: bool = False,
    ) -> None:
        self.moments, self.planners, self.depth = moments, {} if planners is None else planners, depth
        self.levels = levels
        self.per_sample, self.batch_mean = per_sample, batch_mean
        self.cache_depth, self.reads_routers = depth, per_sample
        self.units: Units | None = None
        self.weights: NDArray[np.float32] | None = None
        self.peer: tuple[str, NDArray[np.float32]] | None = None
        self._run = RunInfo(0, 1, 1.0)
        self._plan: StepPlan | None = None
        self._rows: _Rows | None = None
        self._done: dict[str, Mask] = {}
        self._stale = slice(0)
        self._split: tuple[StepPlan, slice] | None = None

    def start(self, run: RunInfo) -> None:
        """Forget the last run's plan and passes."""
        self._run, self._plan, self._rows, self._done = run, None, None, {}
        self.units = self.weights = self.peer = self._split = None
        elastic = run.budget < 1.0 or self.levels is not None  # a dense run pays for no cache and no router
        self.cache_depth = self.depth if elastic else 0
        self.reads_routers = elastic and self.per_sample

    @property
    def plan(self) -> StepPlan | None:
        """What this run follows; None before its first decision, and in a dense run."""
        return self._plan

    def set_num_steps(self, num_steps: int) -> None:
        """The run turned out to have another number of steps: plan anew."""
        self._run, self._plan, self._rows = replace(self._run, num_steps=num_steps), None, None

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        """Action codes int8 [R, N] for a call; logits [R, N, 5] of the branch's previous call, or None."""
        blocks, self.weights, self.peer = len(call.costs), None, None
        if self._run.budget >= 1.0 and self.levels is None:
            return np.full((call.rows, blocks), FULL, np.int8)
        if self._plan is None:
            self._start_plan(call)
        if self._split is not None and call.step > 0:  # by now it shows whether there are two branches
            if len(call.branches) == len(self.moments.branches):
                self._plan, self._stale = self._split
            self._rows = self._split = None
        assert self.units is not None and self._plan is not None
        codes = np.full((call.rows, blocks), FULL, np.int8)
        if call.step < self._run.num_steps:
            levels = self._row_levels(call, logits)
            fresh = levels == WHOLE if self._follows(call) else levels >= HALF
            stale = self._stale if self._plan.partial == call.step else slice(blocks)
            codes[~fresh, stale] = REUSE
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
        return self._plan.half is not None and call.branch != self.moments.branches[0]

    def _solve(self, call: CallInfo, split: bool) -> tuple[StepPlan, Units, slice]:
        """The plan for this run's budget at this call's costs, its units, what the partial step predicts."""
        steps, blocks = self._run.num_steps, len(call.costs)
        if self.levels is not None:
            half = self.levels == HALF if split else None
            return (
                StepPlan(self.levels >= (WHOLE if split else HALF), None, 0.0, 0.0, half),
                self._run.segments,
                slice(0),
            )
        costs = np.array([cost.dense for cost in call.costs])
        stack = costs.sum() + blocks * call.overhead
        dense = call.outside + costs.sum()
        computed = steps * (self._run.budget * dense - call.outside) / stack
        grain = WHOLE if split else 1  # plans count whole steps, or halves
        solve = self.planner(steps).split_plan if split else self.planner(steps).plan
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
        if plan.half is not None and plan.partial is not None and plan.half[plan.partial]:
            # Only the second branch has blocks left to compute, so it computes twice as many.
            some = int(np.abs(price - WHOLE * (computed - count) * stack).argmin())
            if some in (0, blocks):
                return solve(count + (some == blocks) / WHOLE), self._run.segments, slice(0)
        return plan, _cut(self._run.segments, some), slice(some, blocks)

    # -- per sample ----------------------------------------------------------------------------

    def _row_levels(self, call: CallInfo, logits: NDArray[np.float32] | None) -> NDArray[np.int8]:
        """[R]: how many CFG branches compute the stack in this step, for each row."""
        assert self._plan is not None
        rows = self._rows
        if rows is None or rows.levels.shape[0] != call.rows:
            levels = WHOLE * self._plan.fresh.astype(np.int8)
            if self._plan.half is not None:
                levels[self._plan.half] = HALF
            shared = np.broadcast_to(levels, (call.rows, self._run.num_steps)).copy()
            rows = self._rows = _Rows(shared, np.zeros(call.rows))
        if logits is not None and (call.step > rows.step or rows.calls == 0):
            gate = logits[:, :, 0].astype(np.float64).mean(axis=1)
            shared = gate.reshape(call.parts, -1).mean(axis=0)
            self._exchange(rows, call.step, np.tile(shared, call.parts))
        rows.step = call.step
        chosen: NDArray[np.int8] = rows.levels[:, call.step]
        return chosen

    def _exchange(self, rows: _Rows, step: int, gate: NDArray[np.float64]) -> None:
        """Let rows whose error is out of the ordinary take the next step's decision now, gate [R] its log."""
        assert self._plan is not None
        if self.batch_mean:
            gate = np.full_like(gate, gate.mean())
        unusual = gate - rows.typical if rows.calls else np.zeros_like(gate)
        after = step + 1
        if after < rows.levels.shape[1] and self._plan.partial not in (step, after):
            now, then = rows.levels[:, step].copy(), rows.levels[:, after].copy()
            more, less = (then == WHOLE) & (now == 0), (now == WHOLE) & (then == 0)
            swap = (more & (unusual > SWAP_LOG_RATIO)) | (less & (unusual < -SWAP_LOG_RATIO))
            rows.levels[swap, step], rows.levels[swap, after] = then[swap], now[swap]
        rows.typical = (rows.typical * rows.calls + gate) / (rows.calls + 1)
        rows.calls += 1

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
        half = self._rows is not None and self._follows(call) and call.step < steps
        for unit, (first, last) in enumerate(self.units):
            for row in range(call.rows):
                if codes[row, first] != REUSE:
                    continue
                past = np.flatnonzero(done[row, unit, : call.step])[::-1]
                passes = tuple(past[: min(self.depth, int(call.available[row, first]))].tolist())
                if half and self._rows is not None and self._rows.levels[row, call.step] == HALF:
                    seen = np.flatnonzero(self._done[first_branch][row, unit, : call.step + 1])[::-1]
                    peers = tuple(seen[: self.depth].tolist())
                    own, other = planner.cross_weights(call.step, passes, peers)
                    weights[row, unit, : len(own)], crossed[row, unit, : len(other)] = own, other
                    continue
                weights[row, unit, : len(passes)] = planner.weights(branches[row], call.step, passes)
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
