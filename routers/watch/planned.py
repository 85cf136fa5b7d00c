"""A plan's run with its blocks in sight: what `edit profile` measures where no router decides.

Steps are counted as the dense run counts them: an evaluation is at the step of the dense run whose time is
nearest, and a step that the plan leaves out shows as one that reuses what was computed before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..elastic import Elastic
from ..planned.narrow import NarrowPlan, NarrowPlans, made_routers
from ..planned.sampled import PlannerFor, Sampled
from ..planned.spent import PlanTrace
from ..planned.timeplan import Array, TimePlan
from ..policy import CallInfo, Decision, OpenPolicy, Policy, RunInfo, WidthPolicy
from ..spec import TransformerSpec
from ..trace import REUSE, CallRecord, Trace


class Chosen(OpenPolicy):
    """Decides as the policy that a run's plan chose when it began. told: the budget that routers hear of."""

    told = 1.0

    def __init__(self) -> None:
        self.chosen: Policy = OpenPolicy()

    def start(self, run: RunInfo) -> None:
        """A new run begins."""
        self.chosen.start(run)
        self.reads_routers, self.told = self.chosen.reads_routers, getattr(self.chosen, "told", 1.0)

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """As the chosen one."""
        return self.chosen.decide(call, logits)


class WatchedPlan(Sampled):
    """`Sampled` with all blocks under an `Elastic`, whose trace and observers see the run: open, at a plan's
    widths, or under its routers.
    """

    def __init__(
        self, pipe: Any, planner_for: PlannerFor, budget: float, target: str, spec: TransformerSpec,
        narrow: NarrowPlans | None = None,
    ) -> None:  # fmt: skip
        super().__init__(pipe, planner_for, budget, target, narrow)
        self._steps: list[int] = []
        self._policy = Chosen()
        routers = None if narrow is None else made_routers(narrow.trained)
        self.elastic = Elastic(pipe.transformer, spec, lambda: self._policy, routers, pipe=pipe)
        self.elastic.step_of = lambda call: self._steps[call] if call < len(self._steps) else call

    @contextmanager
    def scope(self, *, samples: int = 1, **wishes: Any) -> Iterator[Any]:
        """As `Sampled.scope`; the trace is the engine's, complete when the scope ends."""
        with super().scope(samples=samples, **wishes) as spent, self.elastic.scope(samples=samples) as trace:
            yield trace
        _add_left_out(trace, spent.steps)

    def detach(self) -> None:
        """As `Sampled.detach`."""
        self.elastic.detach()
        super().detach()

    def _plan(self, grid: Array) -> Any:
        self._policy.chosen = WidthPolicy()
        plan = super()._plan(grid)
        times = grid[:-1] if plan is None else plan.times[:-1]
        self._steps = _nearest_steps(grid[:-1], times)
        widths = [1.0] * (len(grid) - 1)
        if isinstance(plan, TimePlan):
            for step, width in zip(self._steps, plan.widths.tolist(), strict=True):
                widths[step] = width
        if isinstance(self._policy.chosen, WidthPolicy):
            self._policy.chosen = WidthPolicy(widths)
        return plan

    def _begin(self, found: NarrowPlan, trace: PlanTrace) -> Trace:
        """Its blocks are in sight already, and their trace is the one that a scope yields."""
        assert self.narrow is not None
        self._policy.chosen = found.policy(self.narrow.trained)
        return Trace()


def _nearest_steps(grid: Array, times: Array) -> list[int]:
    """For every evaluation a step of its own, in order, with a time near by."""
    steps: list[int] = []
    for i, time in enumerate(times):
        nearest = int(np.abs(grid - time).argmin())
        low, high = (steps[-1] + 1 if steps else 0), len(grid) - (len(times) - i)
        steps.append(min(max(nearest, low), high))
    return steps


def _add_left_out(trace: Trace, steps: int) -> None:
    made = {(call.branch, call.step) for call in trace.calls}
    for branch in dict.fromkeys(call.branch for call in trace.calls):
        like = next(call for call in trace.calls if call.branch == branch)
        for step in range(steps):
            if (branch, step) not in made:
                actions, flops = np.full_like(like.actions, REUSE), np.zeros_like(like.flops)
                trace.calls.append(CallRecord(step, branch, actions, flops, like.dense_flops))
