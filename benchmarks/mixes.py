"""Forced decision mixes: plans that spend a given budget by one kind of saving, for FixedPolicy.

A mix lowers (step, block) cells one after another, spread evenly over the run, until the FLOPs come as
near to the budget as whole cells allow.

Shapes: T steps, R rows, N blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from routers.policy import CallInfo, OpenPolicy
from routers.spec import WIDTHS
from routers.trace import FULL, REUSE, SKIP, Actions

FAMILIES: dict[str, tuple[int, ...]] = {
    "skip": (SKIP,),
    "reuse": (REUSE,),
    # as narrow as it takes; what widths cannot save (attention, text) is then saved by skips
    "width": (2, 1, 0, SKIP),
}
"""Name -> the codes a cell is lowered to, one pass over all cells after another."""


class CostReader(OpenPolicy):
    """Skips every block of one call and keeps what the call would cost."""

    def __init__(self) -> None:
        self.call: CallInfo | None = None

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        """Remember the call's costs."""
        self.call = call
        return np.full((call.rows, len(call.costs)), SKIP, np.int8)


def forced_mix(family: str, call: CallInfo, budget: float, steps: int) -> Actions:
    """A plan [T, N] of one family near `budget`. call: any call of the run, for its costs."""
    first = 1 if family == "reuse" else 0  # something must be cached before it can be reused
    return _lower(FAMILIES[family], call, budget, steps, first, seed=0)


def mixed_rows(call: CallInfo, budget: float, steps: int, rows: int) -> Actions:
    """A plan [T, R, N]: every row decides on its own; a dense first step, then reuse, widths and skips."""
    plans = [_row_mix(call, budget, steps, seed) for seed in range(rows)]
    return np.stack(plans, axis=1)


def _row_mix(call: CallInfo, budget: float, steps: int, seed: int) -> Actions:
    """One row: of 10 cheap cells 7 reuse, 2 narrow, 1 skips."""
    order = _spread(steps, len(call.costs), 1, seed)
    plan = np.full((steps, len(call.costs)), FULL, np.int8)
    for i, cell in enumerate(order):
        if plan_cost(plan, call) <= budget:
            break
        plan[cell] = (REUSE, REUSE, REUSE, 1, REUSE, REUSE, SKIP, REUSE, REUSE, 0)[i % 10]
    return plan


def _lower(
    codes: tuple[int, ...], call: CallInfo, budget: float, steps: int, first: int, seed: int
) -> Actions:
    plan = np.full((steps, len(call.costs)), FULL, np.int8)
    best, gap = plan.copy(), abs(plan_cost(plan, call) - budget)
    for code in codes:
        for cell in _spread(steps, len(call.costs), first, seed):
            plan[cell] = code
            here = abs(plan_cost(plan, call) - budget)
            if here >= gap:
                return best
            best, gap = plan.copy(), here
    return best


def _spread(steps: int, blocks: int, first: int, seed: int) -> list[tuple[int, int]]:
    """All cells from step `first` on, in a fixed random order."""
    cells = [(t, b) for t in range(first, steps) for b in range(blocks)]
    return [cells[i] for i in np.random.default_rng(seed).permutation(len(cells))]


def plan_cost(plan: Actions, call: CallInfo) -> float:
    """FLOPs ratio of a plan to dense."""
    table = np.array([[cost.at(width) for width in WIDTHS] for cost in call.costs])
    cells = np.where(plan >= 0, table[np.arange(len(call.costs)), np.maximum(plan, 0)], 0.0)
    dense = call.outside + table[:, FULL].sum()
    return float((call.outside + cells.sum(axis=1)).mean() / dense)
