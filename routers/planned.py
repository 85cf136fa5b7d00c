"""The budget policy: follows a solved plan, bends it per sample, and lands each sample on its budget.

Per row it asks for every block whether computing is worth its price: the plan's error of the cheaper
action, scaled by what the router says of this sample (the gate logit is the log of this sample's error
over the average), against the price of the FLOPs. What a row may spend at a step is bounded around the
plan's own spending, closer and closer towards the last step, so that every row ends on its budget.

Shapes: R rows, N blocks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .plan import BranchCosts, BranchPlan, ErrorTables, solve
from .policy import CallInfo, RunInfo
from .spec import WIDTHS
from .trace import FULL, REUSE, SKIP, Actions

FREEDOM = 0.04
"""How far a row may run ahead of or behind the plan's cumulative spending, ratio of its dense run."""
MAX_LOG_RATIO = 2.0
"""Routers may scale an error by e^-2..e^2 at most, so that one outlier cannot empty a budget."""


class PlannedPolicy:
    """Decisions for one budget from a bundle's error tables.

    order: extrapolation order of reuses, 0 or 1. per_sample: False ignores the routers (and reads nothing
    from the device). batch_mean: every row follows the batch's mean logits (the paper's way; for comparison).
    """

    immediate = False
    stores: NDArray[np.int8] | None = None

    def __init__(
        self, tables: ErrorTables, order: int = 1, *, per_sample: bool = True, batch_mean: bool = False
    ) -> None:
        self.tables, self.order = tables, order
        self.per_sample, self.batch_mean = per_sample, batch_mean
        self.cache_depth, self.reads_routers = order + 1, per_sample
        self._run = RunInfo(0, 1, 1.0)
        self._plans: dict[str, BranchPlan] = {}
        self._costs: dict[str, BranchCosts] = {}
        self._ages: dict[str, NDArray[np.int64]] = {}

    def start(self, run: RunInfo) -> None:
        """Forget the last run's plan and ages."""
        self._run, self._plans, self._ages, self._costs = run, {}, {}, {}
        elastic = run.budget < 1.0  # a dense run pays for no cache and no router
        self.cache_depth = self.order + 1 if elastic else 0
        self.reads_routers = elastic and self.per_sample

    def set_num_steps(self, num_steps: int) -> None:
        """The run turned out to have another number of steps; nothing was planned yet."""
        self._run, self._plans = replace(self._run, num_steps=num_steps), {}

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        """Action codes int8 [R, N] for a call; logits [R, N, 5] of the branch's previous call, or None."""
        blocks, run = len(call.costs), self._run
        self._costs[call.branch] = self._branch_costs(call)
        dense_first = run.budget * run.num_steps >= 1.5
        if run.budget >= 1.0 or call.step >= run.num_steps or (call.step == 0 and dense_first):
            codes = np.full((call.rows, blocks), FULL, np.int8)
        else:
            codes = self._choose(call, self._plan(call, dense_first), logits)
        ages = self._ages.setdefault(call.branch, np.zeros((call.rows, blocks), np.int64))
        if ages.shape[0] != call.rows:
            ages = np.zeros((call.rows, blocks), np.int64)
        self._ages[call.branch] = np.where(codes >= 0, 0, ages + 1)
        return codes

    def decide_block(
        self, call: CallInfo, block: int, gate: NDArray[np.float32], widths: NDArray[np.float32]
    ) -> Actions:
        """Not an immediate policy."""
        raise AssertionError("PlannedPolicy decides before the blocks run")

    def _branch_costs(self, call: CallInfo) -> BranchCosts:
        blocks = np.array([[cost.at(w) + call.overhead for w in WIDTHS] for cost in call.costs])
        dense = call.outside + sum(cost.dense for cost in call.costs)
        return BranchCosts(blocks, call.outside, dense)

    def _plan(self, call: CallInfo, dense_first: bool) -> BranchPlan:
        """Solved once per run, when step 0 has shown which CFG branches there are and what they cost."""
        if call.branch not in self._plans:
            names = call.branches if dense_first and not self._plans else (call.branch,)
            errors = {name: self.tables.at(name, self._run.num_steps) for name in names}
            self._plans |= solve(errors, self._costs, self._run.budget, dense_first)
        return self._plans[call.branch]

    def _choose(self, call: CallInfo, plan: BranchPlan, logits: NDArray[np.float32] | None) -> Actions:
        t, rows, blocks = call.step, call.rows, len(call.costs)
        ages = self._ages.get(call.branch)
        if ages is None or ages.shape[0] != rows:
            ages = np.zeros((rows, blocks), np.int64)
        ratio = self._ratios(logits, rows, blocks)
        costs = self._costs[call.branch].blocks
        errors, columns, oldest = plan.errors, np.arange(blocks)[None], plan.errors.reuse.shape[2]
        width = np.concatenate([errors.width[t], np.zeros((blocks, 1))], axis=1)
        priced = plan.lam * costs + ratio[:, :, 1:] * width
        code = priced.argmin(axis=2)
        compute = priced.min(axis=2) + plan.value[t + 1, :, 0]
        later = plan.value[t + 1][columns, np.minimum(ages + 1, oldest)]
        reuse = ratio[:, :, 0] * errors.reuse[t][columns, np.minimum(ages, oldest - 1)]
        reuse = np.where(call.available > 0, reuse, np.inf)
        skip = np.broadcast_to(errors.skip[t], reuse.shape)
        worth = np.minimum(reuse, skip) + later - compute
        cheap = np.where(reuse <= skip, REUSE, SKIP)
        spend = costs[columns, code]
        chosen = self._within_budget(call, plan, worth, spend)
        return np.where(chosen, code, cheap).astype(np.int8)

    def _ratios(self, logits: NDArray[np.float32] | None, rows: int, blocks: int) -> NDArray[np.float64]:
        """This sample's errors over the average ones, [R, N, 5]: of a reuse (gate), of the four widths."""
        if logits is None:
            return np.ones((rows, blocks, 1 + len(WIDTHS)))
        bounded = np.clip(logits.astype(np.float64), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        if self.batch_mean:
            bounded = np.broadcast_to(bounded.mean(axis=0, keepdims=True), bounded.shape)
        return np.exp(bounded)

    def _within_budget(
        self, call: CallInfo, plan: BranchPlan, worth: NDArray[np.float64], spend: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Which blocks each row computes: the worthiest per FLOP, as many as its allowance lets it."""
        steps = len(plan.cumulative)
        dense = self._costs[call.branch].dense
        remaining = steps - 1 - call.step
        planned = plan.cumulative[-1] - plan.cumulative[call.step] - remaining * call.outside
        room = remaining * (dense - call.outside) - planned
        freedom = FREEDOM * steps * dense if self.reads_routers else 0.0
        # Only what the remaining steps can still save (or spend) may be borrowed (or left) now.
        ahead, behind = min(freedom, planned / 2), min(freedom, room / 2)
        allowance = plan.cumulative[call.step] - call.spent - call.outside
        order = np.argsort(-worth / spend, axis=1, kind="stable")
        sorted_worth = np.take_along_axis(worth, order, axis=1)
        cumulative = np.concatenate(
            [np.zeros((call.rows, 1)), np.cumsum(np.take_along_axis(spend, order, axis=1), axis=1)], axis=1
        )
        wanted = (sorted_worth > 0).sum(axis=1)
        half = spend.mean(axis=1) / 2  # counts are whole blocks: round to the nearest
        most = (cumulative <= (allowance + ahead + half)[:, None]).sum(axis=1) - 1
        least = (cumulative < (allowance - behind - half)[:, None]).sum(axis=1)
        count = np.minimum(np.maximum(wanted, least), np.maximum(most, 0))
        chosen = np.zeros_like(worth, dtype=bool)
        rank = np.arange(worth.shape[1])[None] < count[:, None]
        np.put_along_axis(chosen, order, rank, axis=1)
        return chosen
