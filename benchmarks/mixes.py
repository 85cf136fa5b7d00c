"""Forced decision mixes: plans that spend a given budget by one kind of saving, for FixedPolicy.

A mix lowers (step, block) cells one after another, spread evenly over the run, until the FLOPs pass the
budget; then single cells change for as long as that brings the FLOPs nearer to it.

Shapes: T steps, R rows, N blocks.
"""

from __future__ import annotations

from itertools import chain, cycle, product

import numpy as np
from numpy.typing import NDArray

from routers.policy import CallInfo, Decision, OpenPolicy
from routers.trace import FULL, REUSE, SKIP, Actions
from routers.trained.policy import cost_table

FAMILIES: dict[str, tuple[tuple[int, ...], ...]] = {
    "skip": ((SKIP,),),
    "reuse": ((REUSE,),),
    # as narrow as it takes; what widths cannot save (attention, text) is then saved by skips
    "width": ((2,), (1,), (0,), (SKIP,)),
    "skip + width": ((SKIP, 0, SKIP, 1, SKIP, 2),),
}
"""Name -> passes over all cells, one after another; the cells of a pass are lowered to its codes in turn."""


class CostReader(OpenPolicy):
    """Skips every block of one call and keeps what the call would cost."""

    def __init__(self) -> None:
        self.call: CallInfo | None = None

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Remember the call's costs."""
        self.call = call
        return Decision(np.full((call.rows, len(call.costs)), SKIP, np.int8))


def forced_mix(family: str, call: CallInfo, budget: float, steps: int) -> Actions:
    """A plan [T, N] of one family near `budget`. call: any call of the run, for its costs."""
    first = 1 if family == "reuse" else 0  # something must be cached before it can be reused
    return _lower(FAMILIES[family], call, budget, steps, first, seed=0)


def mixed_rows(call: CallInfo, budget: float, steps: int, rows: int, deviation: float) -> Actions:
    """A plan [T, R, N]: each row decides for itself; a dense first step, then reuse, widths and skips.

    deviation: how far rows stray from a common order of cells, 0 (all alike) to 1 (independent).
    """
    shape = steps - 1, len(call.costs)
    common, plans = np.random.default_rng(rows), []
    order, kind = common.random(shape), common.integers(len(KINDS), size=shape)
    for row in range(rows):
        own = np.random.default_rng(row)
        mixed = (1 - deviation) * order + deviation * own.random(shape)
        kinds = np.where(own.random(shape) < deviation, own.integers(len(KINDS), size=shape), kind)
        plans.append(_row_mix(call, budget, mixed, np.asarray(KINDS)[kinds]))
    return np.stack(plans, axis=1)


def whole_steps(call: CallInfo, budget: float, steps: int) -> Actions:
    """A plan [T, N] that reuses every block on evenly spread steps, never on the first two."""
    inside = sum(cost.dense for cost in call.costs)
    reused = round((1 - budget) * steps * (inside + call.outside) / inside)
    plan = np.full((steps, len(call.costs)), FULL, np.int8)
    plan[np.linspace(2, steps - 1, min(reused, steps - 2)).round().astype(int)] = REUSE
    return plan


KINDS = (REUSE, REUSE, REUSE, REUSE, REUSE, REUSE, REUSE, SKIP, 1, 0)
"""What cheap cells of a row mix do, each as likely."""


def _row_mix(call: CallInfo, budget: float, order: NDArray[np.float64], codes: Actions) -> Actions:
    """One row [T, N]: cells of steps 1.. take their `codes` in rising `order` until the budget is met."""
    plan = np.full((order.shape[0] + 1, order.shape[1]), FULL, np.int8)
    for cell in order.ravel().argsort():
        if plan_cost(plan, call) <= budget:
            break
        plan[1:].flat[cell] = codes.flat[cell]
    return plan


def _lower(
    passes: tuple[tuple[int, ...], ...], call: CallInfo, budget: float, steps: int, first: int, seed: int
) -> Actions:
    plan = np.full((steps, len(call.costs)), FULL, np.int8)
    best, gap = plan.copy(), abs(plan_cost(plan, call) - budget)
    for reached, codes in enumerate(passes, 1):
        for cell, code in zip(_spread(steps, len(call.costs), first, seed), cycle(codes), strict=False):
            plan[cell] = code
            here = abs(plan_cost(plan, call) - budget)
            if here >= gap:
                return _nearer(best, call, budget, first, {FULL, *chain(*passes[:reached])})
            best, gap = plan.copy(), here
    return best


def _nearer(plan: Actions, call: CallInfo, budget: float, first: int, codes: set[int]) -> Actions:
    """The plan after changing single cells of steps `first`.. to other codes for as long as one helps."""
    gap = abs(plan_cost(plan, call) - budget)
    while True:
        best, before = plan, gap
        for t, b, code in product(range(first, len(plan)), range(plan.shape[1]), sorted(codes)):
            changed = plan.copy()
            changed[t, b] = code
            here = abs(plan_cost(changed, call) - budget)
            if here < gap - 1e-9:
                best, gap = changed, here
        if gap == before:
            return plan
        plan = best


def _spread(steps: int, blocks: int, first: int, seed: int) -> list[tuple[int, int]]:
    """All cells from step `first` on, in a fixed random order."""
    cells = [(t, b) for t in range(first, steps) for b in range(blocks)]
    return [cells[i] for i in np.random.default_rng(seed).permutation(len(cells))]


def plan_cost(plan: Actions, call: CallInfo) -> float:
    """FLOPs ratio of a plan to dense."""
    table = cost_table(call)
    cells = np.where(plan >= 0, table[np.arange(len(call.costs)), np.maximum(plan, 0)], 0.0)
    dense = call.outside + table[:, FULL].sum()
    return float((call.outside + cells.sum(axis=1)).mean() / dense)
