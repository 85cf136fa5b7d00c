"""Decisions of trained routers, made to land on the asked budget.

The routers were trained to be told the budget and to spend it over a whole run. What is left to do at run
time is small: in every call each row is given its share of what is left, as the routers want to spread it
over the steps, and opens the blocks in the order of their gate logits until the share is spent; widths take
up the rest. What the first CFG branch of a step decides holds for the others. The first call of a run has
no logits yet: it follows those of the profile, or computes everything where that has none. A closed block
adds what its last passes say that it would add: d_0 + trend r (d_0 - d_1), where r is how far the run has
gone on, in distances between the two passes.

Shapes: R rows, N blocks, S steps, K known budgets, W widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..policy import CallInfo, Decision, RunInfo
from ..spec import WIDTHS
from ..trace import FULL, REUSE, SKIP, Actions

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """What trained routers spend at each step of a run: budgets [K] ascending, spend [K, S] (ratios). first
    [K, N, 5]: logits for the first call, None where it computes everything.

    Raises ValueError for arrays that make no profile.
    """

    budgets: Array
    spend: Array
    first: Array | None = None

    def __post_init__(self) -> None:
        budgets, spend = self.budgets, self.spend
        if budgets.ndim != 1 or spend.ndim != 2 or not spend.size or len(budgets) != len(spend):
            raise ValueError(f"profile: budgets {budgets.shape} and spend {spend.shape} are not [K], [K, S]")
        if not (np.diff(budgets) > 0).all() or not 0 <= budgets[0] <= budgets[-1] <= 1:
            raise ValueError(f"profile: budgets {budgets.round(4).tolist()} do not ascend to at most 1")
        if not ((spend >= 0) & (spend <= 2)).all():
            raise ValueError("profile: spend holds ratios outside 0 to 2")
        first = self.first
        if first is not None and (first.ndim != 3 or first.shape[::2] != (len(budgets), 1 + len(WIDTHS))):
            raise ValueError(f"profile: first {first.shape} is not [{len(budgets)}, N, {1 + len(WIDTHS)}]")

    def first_logits(self, budget: float, rows: int) -> NDArray[np.float32] | None:
        """[rows, N, 5] for the first call of a run, interpolated; None where it computes everything."""
        if self.first is None:
            return None
        flat = self.first.reshape(len(self.first), -1)
        logits = np.array([np.interp(budget, self.budgets, column) for column in flat.T], np.float32)
        return np.repeat(logits.reshape(1, *self.first.shape[1:]), rows, axis=0)

    def at(self, budget: float, num_steps: int) -> Array:
        """[num_steps] for any budget and step count, interpolated; without `first` the first is dense."""
        rows = np.stack([np.interp(budget, self.budgets, column) for column in self.spend.T])
        known = np.linspace(0, 1, max(len(rows) - 1, 1))
        later = np.interp(
            np.linspace(0, 1, max(num_steps - 1, 1)), known, rows[1:] if len(rows) > 1 else rows
        )
        return np.concatenate([[1.0] if self.first is None else rows[:1], later])[:num_steps]


class TrainedPolicy:
    """A budget policy on trained routers. trend [N]: of closed blocks, None where they add nothing.
    batch_mean: all rows follow the batch's mean logits. within: number of evaluations of a plan that the run
    follows, and the budget of each; None: the run's own.

    told: the budget that routers hear of. Raises ValueError in `decide` where a budget cannot be reached in
    so few steps.
    """

    reads_routers = True

    def __init__(
        self, profile: Profile, trend: Array | None = None, *, batch_mean: bool = False,
        within: tuple[int, float] | None = None,
    ) -> None:  # fmt: skip
        self.profile, self.trend, self.batch_mean, self.within = profile, trend, batch_mean, within
        self._passes: dict[str, NDArray[np.int64]] = {}
        self._calls: dict[str, int] = {}
        self._run, self.told = RunInfo(1, 1.0), 1.0
        self._decided: tuple[str, int, Actions] | None = None

    def start(self, run: RunInfo) -> None:
        """A new run begins."""
        if self.within is not None:
            run = replace(run, num_steps=self.within[0], budget=self.within[1])
        self._run, self.told = run, run.budget
        self._decided, self._passes, self._calls = None, {}, {}
        self.reads_routers = run.budget < 1.0

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Blocks and widths for every row; see `Policy.decide`."""
        if self.within is not None:  # evaluations are numbered as the plan makes them
            call = replace(call, step=self._calls.get(call.branch, 0))
            self._calls[call.branch] = call.step + 1
        actions = self._actions(call, logits)
        if self.trend is None or self._run.budget >= 1.0:
            return Decision(actions)
        return self._with_fallback(call, actions, self.trend)

    def _with_fallback(self, call: CallInfo, actions: Actions, trend: Array) -> Decision:
        """Closed blocks reuse what they remember; those that remember nothing add nothing."""
        last, before = self._passes.setdefault(call.branch, np.zeros((2, *actions.shape), np.int64))
        share = trend * (call.step - last) / np.maximum(last - before, 1)
        share = np.where(call.available > 1, share, 0.0)
        weights = np.stack([1 + share, -share], axis=-1).astype(np.float32)
        computed = actions >= 0
        self._passes[call.branch] = np.stack(
            [np.where(computed, call.step, last), np.where(computed, last, before)]
        )
        actions = np.where(~computed & (call.available > 0), REUSE, actions)
        return Decision(actions.astype(np.int8), depth=2, weights=weights)

    def _actions(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        codes = np.full((call.rows, len(call.costs)), FULL, np.int8)
        if logits is None and call.step == 0:
            logits = self.profile.first_logits(self._run.budget, call.rows)
        if logits is None or self._run.budget >= 1.0 or call.step >= self._run.num_steps:
            return codes
        decided, samples = self._decided, call.rows // call.parts
        if decided and decided[0] != call.branch and decided[1] == call.step and len(decided[2]) == call.rows:
            return decided[2].copy()
        logits = logits[:samples]
        if self.batch_mean:
            logits = np.broadcast_to(logits.mean(axis=0), logits.shape)
        table = cost_table(call)
        around = call.outside + len(call.costs) * call.overhead
        dense = call.outside + float(table[:, -1].sum())
        steps = self._run.num_steps
        total = self._run.budget * steps * dense
        later = self.profile.at(self._run.budget, steps)[call.step + 1 :] * dense
        for row in range(samples):
            wanted = around + expected_cost(logits[row], table)
            left = total - call.spent[row]
            share = left * wanted / (wanted + later.sum())
            # never more than dense, nor so little (so much) that the rest of the run cannot make up for it
            most = left - len(later) * around
            share = min(max(share, left - len(later) * (around + table[:, -1].sum())), most)
            codes[row::samples] = allocate(logits[row], table, share - around)
        self._decided = call.branch, call.step, codes.copy()
        return codes


def cost_table(call: CallInfo) -> Array:
    """FLOPs of each block at each width [N, W]."""
    return np.array([[cost.at(width) for width in WIDTHS] for cost in call.costs])


def expected_cost(logits: NDArray[np.float32], table: Array) -> float:
    """FLOPs that the blocks of a call cost when gates and widths are drawn from logits [N, 5]."""
    gate = 1 / (1 + np.exp(-np.clip(logits[:, 0].astype(np.float64), -30, 30)))
    width = np.exp(logits[:, 1:].astype(np.float64) - logits[:, 1:].max(axis=1, keepdims=True))
    width /= width.sum(axis=1, keepdims=True)
    return float((gate * (width * table).sum(axis=1)).sum())


def allocate(logits: NDArray[np.float32], table: Array, target: float) -> Actions:
    """Codes [N] that cost as near to `target` FLOPs as it gets, following logits [N, 5].

    Blocks open at their most probable width, in the order of their gates, while that brings the cost nearer
    to the target. What then is missing widens the most open blocks, what is too much narrows the least open.
    """
    order = np.argsort(-logits[:, 0], kind="stable")
    width = logits[:, 1:].argmax(axis=1)
    codes = np.full(len(table), SKIP, np.int8)
    spent = 0.0
    for block in order:
        price = table[block, width[block]]
        if abs(spent + price - target) > abs(spent - target):
            break
        codes[block], spent = width[block], spent + price
    opened = order[codes[order] >= 0]
    for block in opened if spent < target else opened[::-1]:
        own = table[block] - table[block, codes[block]]
        best = int(np.abs(spent + own - target).argmin())
        if abs(spent + own[best] - target) < abs(spent - target):
            spent += float(own[best])
            codes[block] = best
    return codes
