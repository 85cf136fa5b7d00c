"""From measured errors to a plan: which block to compute at which step, at least error for a budget.

Calibration measures two things on the dense model: the *local* squared error of every cheaper action
(reuse of a delta k steps old, a narrower MLP, a skip) per branch, step and block, and the *gain* with
which a local error at that place reaches the final latents. Their product is taken as the cost of an
action; errors of different places are taken to add. Under that model the best plan for a price
`lam` of FLOPs is found exactly, block by block, by dynamic programming over steps with the age of the
block's cached delta as the state; the price is searched so that the plan lands on the budget.

Shapes: G CFG branches, S calibrated steps, T steps of a run, N blocks, K ages, P prices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .trace import FULL, REUSE, SKIP, Actions

Array = NDArray[np.float64]
MAX_AGE = 8
"""Oldest delta, in steps of the run, that a plan may reuse."""


@dataclass(frozen=True)
class ErrorTables:
    """What calibration measured, on the S steps it ran. All values are mean squared errors, > 0.

    reuse [G, S, N, K]: local error of reusing a delta 1..K calibrated steps old, at the bundle's order.
    width [G, S, N, 3]: local error of MLP widths 1/4, 1/2, 3/4. skip [G, S, N]: of adding nothing.
    gain [G, S, N]: squared error of the final latents per unit of local squared error.
    """

    branches: tuple[str, ...]
    reuse: Array
    width: Array
    skip: Array
    gain: Array

    def at(self, branch: str, num_steps: int, max_age: int = MAX_AGE) -> BranchErrors:
        """The tables of one branch for a run of `num_steps`, interpolated in step and (log-log) in age.

        An unknown branch name is served by the first branch's tables.
        """
        g = self.branches.index(branch) if branch in self.branches else 0
        steps, ages = self.reuse.shape[1], self.reuse.shape[3]
        x = np.linspace(0, steps - 1, num_steps) if num_steps > 1 else np.zeros(1)
        low = np.minimum(x.astype(int), steps - 1)
        high, part = np.minimum(low + 1, steps - 1), x - low

        def resample(table: Array) -> Array:
            weight = part.reshape(-1, *[1] * (table.ndim - 1))
            mixed: Array = np.exp((1 - weight) * np.log(table[low]) + weight * np.log(table[high]))
            return mixed

        reuse = np.log(resample(self.reuse[g]))  # [T, N, ages]
        wanted = np.log(np.arange(1, max_age + 1) * steps / num_steps)
        known = np.log(np.arange(1, ages + 1))
        at = np.clip(np.searchsorted(known, wanted) - 1, 0, max(ages - 2, 0))
        if ages > 1:  # beyond the measured ages the last slope goes on
            slope = (reuse[..., at + 1] - reuse[..., at]) / (known[at + 1] - known[at])
        else:
            slope = np.full((*reuse.shape[:2], max_age), 2.0)
        aged = np.exp(reuse[..., at] + np.maximum(slope, 0.0) * (wanted - known[at]))
        gain = resample(self.gain[g])[..., None]
        width, skip = resample(self.width[g]), resample(self.skip[g])
        return BranchErrors(gain * aged, gain * width, gain[..., 0] * skip)


@dataclass(frozen=True)
class BranchErrors:
    """Final squared error of each action: reuse [T, N, K] by age, width [T, N, 3], skip [T, N]."""

    reuse: Array
    width: Array
    skip: Array


@dataclass(frozen=True)
class BranchPlan:
    """The solved plan of one branch.

    value [T + 1, N, K + 1]: least error plus price of FLOPs from step t on, for a delta of age k at the
    step before (0: just computed). codes [T, N]: the actions of the plan. cumulative [T]: FLOPs of a
    row up to and including each step, what surrounds the blocks included. lam: price per FLOP.
    """

    errors: BranchErrors
    value: Array
    codes: Actions
    cumulative: Array
    lam: float


@dataclass(frozen=True)
class BranchCosts:
    """FLOPs of one row of a branch's calls: `blocks` [N, 4] at each width, routers included, `outside` around
    the blocks, and `dense`: the whole call without routers, what a budget is a ratio of.
    """

    blocks: Array
    outside: float
    dense: float


def solve(
    errors: dict[str, BranchErrors], costs: dict[str, BranchCosts], budget: float, first_dense: bool
) -> dict[str, BranchPlan]:
    """The best plan of every branch at one common price such that together they spend `budget`.

    budget: ratio of dense FLOPs. first_dense: step 0 has been computed in full. The cumulative targets
    are stretched so that the last ones add up to the budget exactly.
    """
    steps = next(iter(errors.values())).skip.shape[0]
    target = budget * steps * sum(costs[name].dense for name in errors)
    low, high = -80.0, 20.0  # log price relative to error per FLOP; outside any real table
    scale = float(np.median([np.median(e.reuse[..., 0]) / costs[n].dense for n, e in errors.items()]))
    for _ in range(3):
        grid = np.linspace(low, high, 17)
        prices = scale * np.exp(grid)
        spends = np.zeros(len(grid))
        for name, branch in errors.items():
            value = _value(branch, costs[name].blocks, prices)
            codes = _codes(branch, value, costs[name].blocks, prices, first_dense)
            spends += _spent(codes, costs[name]).sum(axis=0)
        under = np.flatnonzero(spends <= target)
        pick = int(under[0]) if len(under) else len(grid) - 1
        low, high = grid[max(pick - 1, 0)], grid[pick]
    return _finish(errors, costs, target, scale * float(np.exp(high)), first_dense)


def _value(errors: BranchErrors, costs: Array, lam: Array) -> Array:
    """Backward pass for all prices at once: [P, T + 1, N, K + 1]."""
    steps, blocks, ages = errors.reuse.shape
    value = np.zeros((len(lam), steps + 1, blocks, ages + 1))
    width = np.concatenate([errors.width, np.zeros((steps, blocks, 1))], axis=2)
    for t in range(steps - 1, -1, -1):
        after = value[:, t + 1]
        compute = (lam[:, None, None] * costs + width[t]).min(axis=2) + after[:, :, 0]
        older = np.concatenate([after[:, :, 1:], after[:, :, -1:]], axis=2)  # the age saturates
        aged = np.concatenate([errors.reuse[t], errors.reuse[t][:, -1:]], axis=1)
        cheap = np.minimum(aged, errors.skip[t][:, None]) + older
        value[:, t] = np.minimum(compute[:, :, None], cheap)
    return value


def _codes(errors: BranchErrors, value: Array, costs: Array, lam: Array, first_dense: bool) -> Actions:
    """Forward pass: action codes [P, T, N] from the values."""
    steps, blocks, ages = errors.reuse.shape
    prices, columns = np.arange(len(lam))[:, None], np.arange(blocks)[None]
    codes = np.full((len(lam), steps, blocks), FULL, np.int8)
    age = np.zeros((len(lam), blocks), int)
    width = np.concatenate([errors.width, np.zeros((steps, blocks, 1))], axis=2)
    for t in range(1 if first_dense else 0, steps):
        priced = lam[:, None, None] * costs + width[t]
        best = priced.argmin(axis=2)
        compute = priced.min(axis=2) + value[:, t + 1, :, 0]
        older = value[prices, t + 1, columns, np.minimum(age + 1, ages)]
        reuse = errors.reuse[t][columns, np.minimum(age, ages - 1)] + older
        skip = np.broadcast_to(errors.skip[t] + older, reuse.shape)
        if t == 0:
            reuse = np.full_like(reuse, np.inf)
        choice = np.where(compute <= np.minimum(reuse, skip), best, np.where(reuse <= skip, REUSE, SKIP))
        codes[:, t] = choice
        age = np.where(choice >= 0, 0, age + 1)
    return codes


def _spent(codes: Actions, costs: BranchCosts) -> Array:
    """FLOPs per step of plans [P, T, N] -> [T, P]."""
    blocks = np.arange(costs.blocks.shape[0])
    cost = np.where(codes >= 0, costs.blocks[blocks, np.maximum(codes, 0)], 0.0)
    per_step: Array = cost.sum(axis=2).T + costs.outside
    return per_step


def _finish(
    errors: dict[str, BranchErrors],
    costs: dict[str, BranchCosts],
    target: float,
    lam: float,
    first_dense: bool,
) -> dict[str, BranchPlan]:
    price = np.array([lam])
    values = {n: _value(branch, costs[n].blocks, price) for n, branch in errors.items()}
    codes = {n: _codes(e, values[n], costs[n].blocks, price, first_dense) for n, e in errors.items()}
    spent = {n: _spent(c, costs[n])[:, 0] for n, c in codes.items()}
    room = {n: costs[n].dense - s for n, s in spent.items()}
    total_room = sum(r.sum() for r in room.values())
    slack = target - sum(s.sum() for s in spent.values())
    # Prices are discrete: what the plan leaves over is spread where there is room to compute.
    share = slack / total_room if slack > 0 and total_room > 0 else 0.0
    return {
        n: BranchPlan(errors[n], values[n][0], codes[n][0], np.cumsum(spent[n] + share * room[n]), lam)
        for n in errors
    }
