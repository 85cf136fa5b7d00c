"""A pipeline whose sampler follows a plan in time: what `routers.attach` makes of a pipeline and a budget.

The scheduler is replaced (`scheduler.py`), the transformer is left alone: what a plan leaves out is never
called. So anything that works on the transformer works as before: compiled, quantised, offloaded, sharded.
Where a plan's evaluations are narrow its blocks are under the engine for that run (`narrow.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..patching import check_whole
from ..trace import Trace
from .follow import Planner
from .narrow import Narrowing, NarrowPlans
from .scheduler import elastic_scheduler
from .spent import PlanTrace, evaluations_for
from .timeplan import Array, TimePlan
from .universal import Warp, check_wishes, universal_planner

PlannerFor = Callable[[float, str], Planner]
"""From a budget and a target to a planner: `universal_planner`, or a bundle's."""


class Sampled:
    """Made by `routers.attach`. budget: ratio of dense FLOPs. target: "dense" or "exact" (`universal.py`).
    narrow: a bundle's plans with narrow evaluations.

    trace: of the last run, None before the first. Raises ValueError for a scheduler that a plan cannot stand
    in for, and for a transformer with a cache of its own.
    """

    def __init__(
        self,
        pipe: Any,
        planner_for: PlannerFor,
        budget: float,
        target: str,
        narrow: NarrowPlans | None = None,
    ) -> None:
        check_wishes(budget, target)
        if "_edit_elastic" in pipe.transformer.__dict__:
            raise ValueError("routers are already attached to this transformer: detach them first")
        check_whole(pipe.transformer)
        self.pipe, self.planner_for, self.budget, self.target = pipe, planner_for, budget, target
        self.narrow = narrow
        self.trace: PlanTrace | None = None
        self._planner: Planner | None = None
        self._scope: PlanTrace | None = None
        self._narrowing = None if narrow is None else Narrowing(pipe, narrow.spec)
        self._undo = ExitStack()
        self.scheduler = self._undo.enter_context(elastic_scheduler(pipe, self._plan, self._count))

    @contextmanager
    def scope(
        self,
        *,
        budget: float | None = None,
        target: str | None = None,
        samples: int = 1,
        planner: Planner | None = None,
    ) -> Iterator[PlanTrace]:
        """A run with wishes of its own: its trace. samples: pictures that it makes. planner: instead of the
        bundle's or the universal one. Raises RuntimeError if a scope is open, ValueError as `attach`.
        """
        if self._scope is not None:
            raise RuntimeError("a scope is already open on this pipeline; scopes do not nest")
        trace = self._trace(budget, target, samples)
        check_wishes(trace.requested, trace.target)
        self._scope, self._planner = trace, planner
        try:
            yield trace
        finally:
            self._end()
            self._scope = self._planner = None
            self.trace = trace

    def evaluations(self, steps: int, budget: float | None = None, target: str | None = None) -> int:
        """How many evaluations a run of so many steps makes."""
        budget = self.budget if budget is None else budget
        found = None if self.narrow is None else self.narrow.at(budget, target or self.target, steps)
        return evaluations_for(budget, steps) if found is None else found.plan.evaluations

    def summary(self) -> str:
        """One paragraph on the last run."""
        return "no run yet" if self.trace is None else self.trace.summary()

    def detach(self) -> None:
        """Give the pipeline its own scheduler back. Safe to call twice."""
        self._end()
        self._undo.close()

    def _trace(self, budget: float | None, target: str | None, samples: int) -> PlanTrace:
        return PlanTrace(self.budget if budget is None else budget, target or self.target, samples)

    def _plan(self, grid: Array) -> Any:
        """A run begins. grid: the times that the pipeline would have taken."""
        self._end()  # an interrupted run's
        check_whole(self.pipe.transformer)
        trace = self.trace = self._scope or self._trace(None, None, 1)
        steps = len(grid) - 1
        all_of_them = self.evaluations(steps, trace.requested) == steps
        if getattr(self.scheduler, "higher_order", False) and not all_of_them:
            trace.target = "exact"  # its dense run is as good as exact
        plan = self._narrow_plan(trace, grid) or (self._planner or self._planner_for(trace))(grid)
        trace.steps = trace.of = steps
        trace.planned, trace.made = (steps if plan is None else len(plan.times) - 1), 0
        return plan

    def _narrow_plan(self, trace: PlanTrace, grid: Array) -> TimePlan | None:
        """The plan whose evaluations are narrow, its run begun; None where they are whole."""
        trace.widths, trace.blocks = (), None
        if self.narrow is None or self._planner is not None:
            return None
        found = self.narrow.for_times(trace.requested, trace.target, grid)
        if found is None:
            return None
        try:
            trace.blocks = self._begin(found.plan, trace)
        except ValueError as error:
            trace.remarks = [f"evaluations are whole: {error}"]
            return None
        trace.widths = tuple(found.plan.widths.tolist())
        return found.plan

    def _begin(self, plan: TimePlan, trace: PlanTrace) -> Trace:
        assert self._narrowing is not None
        return self._narrowing.begin(plan, trace.samples)

    def _end(self) -> None:
        if self._narrowing is not None:
            self._narrowing.end()

    def _planner_for(self, trace: PlanTrace) -> Planner:
        """A scheduler may know which warps of its times serve where nothing was measured."""
        known: dict[str, Warp] = getattr(self.scheduler, "warps", {})
        if self.planner_for is universal_planner:
            return universal_planner(trace.requested, trace.target, known.get(trace.target))
        return self.planner_for(trace.requested, trace.target)

    def _count(self, number: int) -> None:
        """An evaluation was made: copies of a scheduler, one for every frame, make it together."""
        assert self.trace is not None
        self.trace.made = max(self.trace.made, number)
        if number == self.trace.planned:
            self._end()
