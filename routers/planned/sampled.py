"""A pipeline whose sampler follows a plan in time: what `routers.attach` makes of a pipeline and a budget.

The scheduler is replaced (`scheduler.py`), the transformer is left alone: what a plan leaves out is never
called. So anything that works on the transformer works as before: compiled, quantised, offloaded, sharded.
Where a plan's evaluations are narrow its blocks are under the engine for that run (`narrow.py`).
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..bundle import Bundle
from ..patching import check_whole
from ..trace import Trace
from .apart import RowPlans, left_out
from .course import Course, Turn
from .follow import Planner, Steps
from .narrow import Narrowing, NarrowPlan, NarrowPlans
from .observed import Observation
from .ode import ElasticOdeScheduler
from .scheduler import elastic_scheduler
from .seconds import Pace, fitting
from .spent import PlanTrace, evaluations_for
from .timeplan import Array, TimePlan, euler, moving
from .universal import Warp, check_wishes

PlannerFor = Callable[[float, str, Warp | None], Planner]
"""From a budget, a target and a scheduler's warp of its times: `universal_planner`, or a bundle's."""
BUNDLE = "routers"
"""Folder of a model folder that holds its bundle."""
Budget = float | Sequence[float]
"""Of a whole batch, or of each of its rows."""


def each_of(budget: Budget) -> list[float]:
    """All of them."""
    return [*budget] if isinstance(budget, Sequence) else [budget]


BEGINS, ENDS = ("check_inputs", "prepare"), ("maybe_free_model_hooks", "clean")
"""What a pipeline's call begins and ends with, diffusers' and the mesh pipeline's."""


class Sampled:
    """Made by `routers.attach`. budget: ratio of dense FLOPs, of all or of each row. target: "dense" or
    "exact" (`universal.py`). narrow: a bundle's plans with narrow evaluations. seconds: for a
    whole call of the pipeline, None for as many as it takes.

    trace: of the last run, None before the first. Raises ValueError for a scheduler that a plan cannot stand
    in for, and for a transformer with a cache of its own.
    """

    def __init__(
        self,
        pipe: Any,
        planner_for: PlannerFor,
        budget: Budget,
        target: str,
        narrow: NarrowPlans | None = None,
        seconds: float | None = None,
    ) -> None:
        _check_wishes(budget, target, seconds)
        if "_edit_elastic" in pipe.transformer.__dict__:
            raise ValueError("routers are already attached to this transformer: detach them first")
        check_whole(pipe.transformer)
        self.pipe, self.planner_for, self.budget, self.target = pipe, planner_for, budget, target
        self.narrow, self.seconds = narrow, seconds
        self.pace = Pace(lambda: _device_of(pipe))
        self._now: PlanTrace | None = None
        self._before: PlanTrace | None = None
        self._course: Course | None = None
        self._given: dict[int, int] = {}
        self._decided: tuple[int, Steps | None] = (0, None)
        self._scope: PlanTrace | None = None
        self._scoped: dict[str, Any] = {}
        self._apart = ExitStack()
        self._narrowing = None if narrow is None else Narrowing(pipe, narrow.spec, narrow.trained)
        self._undo = ExitStack()
        self._own = pipe.scheduler
        self.scheduler = self._undo.enter_context(elastic_scheduler(pipe, self._plan, self._count))
        if seconds is not None:
            self._time_calls()
        if hasattr(pipe, "save_pretrained"):
            pipe.__dict__["save_pretrained"] = functools.partial(self._save, pipe.save_pretrained)
            self._undo.callback(pipe.__dict__.pop, "save_pretrained", None)

    @contextmanager
    def scope(
        self,
        *,
        budget: Budget | None = None,
        target: str | None = None,
        samples: int = 1,
        planner_for: PlannerFor | None = None,
        seconds: float | None = None,
        size: Hashable = None,
        turns: Sequence[Turn] = (),
        seen: Observation | None = None,
    ) -> Iterator[PlanTrace]:
        """A run with wishes of its own: its trace. samples: pictures that it makes. planner_for: instead of
        the bundle's or the universal plan. seconds: from here to the end of the scope. size: runs of equal
        size take equal seconds; default: of equal steps and samples. turns: of an earlier run's trace, to go
        the same way again. seen: what watches a run of all steps. Raises RuntimeError if a scope is
        open, ValueError as `attach`.
        """
        if self._scope is not None:
            raise RuntimeError("a scope is already open on this pipeline; scopes do not nest")
        seconds = self.seconds if seconds is None else seconds
        _check_wishes(self.budget if budget is None else budget, target or self.target, seconds)
        trace = self._trace(budget, target, samples)
        trace.seconds, trace.turns = seconds, [*turns]
        self._scope, self._scoped = trace, {"planner_for": planner_for, "size": size, "turns": turns}
        self._scoped["seen"], self.scheduler.watch = seen, None if seen is None else seen.see
        self.pace.start()
        try:
            yield trace
            trace.took = self.pace.finish()
        finally:
            self._end()
            self.pace.drop()
            self._scope, self._scoped, self._now, self.scheduler.watch = None, {}, trace, None
            if not trace.made and self._before is not None:
                vars(trace).update(vars(self._before))

    def observation(self) -> Observation:
        """What watches runs of all steps. Raises ValueError for a sampler that follows no flow."""
        if isinstance(self.scheduler, ElasticOdeScheduler):
            raise ValueError("runs of this sampler teach nothing by themselves; use: edit calibrate")
        return Observation(self.pipe)

    @contextmanager
    def observe(self) -> Iterator[Observation]:
        """Inside, runs make all steps and are watched: `Observation.bundle` is what they teach, for any
        budget. Raises ValueError as `observation`.
        """
        with self.scope(budget=1.0, target="dense", seen=self.observation()) as trace:
            trace.seconds = None
            yield self._scoped["seen"]

    def evaluations(self, steps: int, budget: Budget | None = None, target: str | None = None) -> int:
        """How many evaluations a run of so many steps makes, at most: with a budget for each row, for any."""
        budget = self.budget if budget is None else budget
        if isinstance(budget, Sequence):
            each = sum(self.evaluations(steps, one, target) for one in set(budget))
            return min(each, steps) if (target or self.target) == "dense" else each
        found = None if self.narrow is None else self.narrow.at(budget, target or self.target, steps)
        return evaluations_for(budget, steps) if found is None else found.plan.evaluations

    @property
    def trace(self) -> PlanTrace | None:
        """Of the last run."""
        return self._now if self._before is None or (self._now and self._now.made) else self._before

    def summary(self) -> str:
        """One paragraph on the last run."""
        return "no run yet" if self.trace is None else self.trace.summary()

    def detach(self) -> None:
        """Give the pipeline its own scheduler back. Safe to call twice."""
        self._end()
        self._undo.close()

    def _trace(self, budget: Budget | None, target: str | None, samples: int) -> PlanTrace:
        budget, target = self.budget if budget is None else budget, target or self.target
        if not isinstance(budget, Sequence):
            return PlanTrace(budget, target, samples, seconds=self.seconds)
        mean = sum(budget) / len(budget)
        return PlanTrace(mean, target, len(budget), rows=[PlanTrace(each, target) for each in budget])

    def _plan(self, grid: Array) -> Any:
        """A run begins. grid: the times that the pipeline would have taken."""
        self._end()  # an interrupted run's
        check_whole(self.pipe.transformer)
        # some pipelines set timesteps once more when all is made: then nothing is made of them
        before = self._now if self._scope is None or self._now is self._scope else None
        self._before = copy.copy(before) if before is not None and before.made else None
        trace = self._now = self._scope or self._trace(None, None, 1)
        steps, size = len(grid) - 1, self._scoped.get("size")
        self._given = dict(self._scoped.get("turns", ()))
        timed, turning = trace.seconds is not None, trace.seconds is not None or bool(self._given)
        least = min([row.requested for row in trace.rows], default=trace.requested)
        self._most = evaluations_for(least, steps)
        if getattr(self.scheduler, "higher_order", False) and (turning or self._most < steps):
            trace.target = "exact"  # its dense run is as good as exact
        if self._scoped.get("seen") is not None:
            self._scoped["seen"].begin(grid)
        trace.steps = trace.of = steps
        trace.made, self._course, self._decided = 0, None, (0, None)
        over = self._scope is not None and self._before is not None
        if (timed or size is not None) and not over:
            self.pace.begin(size or (steps, trace.samples), trace.seconds or float("inf"))
        self.scheduler.live = turning
        trace.widths, trace.ratio, trace.blocks, trace.remarks = (), 1.0, None, []
        plan: Steps | None
        if trace.rows:
            plan = self._begin_apart(grid, trace)
        elif turning:
            plan = self._course_of(grid, trace)
        else:
            plan = self._narrow_plan(trace, grid) or self._planner(trace.requested, trace)(grid)
        trace.planned = steps if plan is None else len(plan.times) - 1
        if plan is not None and not self._scoped.get("planner_for"):
            unfitted = getattr(getattr(self.planner_for, "__self__", None), "unfitted", lambda _: "")
            trace.remarks += [reason] if (reason := unfitted(grid)) else []
        return plan

    def _begin_apart(self, grid: Array, trace: PlanTrace) -> RowPlans:
        """Plans of rows with budgets of their own, and the transformer called for those that are computed."""
        plans: dict[float, Any] = {}
        for row in trace.rows:
            row.steps = row.of = len(grid) - 1
            row.made, row.target, budget = 0, trace.target, row.requested
            if self.narrow is not None and self.narrow.for_times(budget, trace.target, grid) is not None:
                raise ValueError(f"at budget {budget:g} evaluations are narrow here: give one budget for all")
            if getattr(self.scheduler, "higher_order", False) and evaluations_for(budget, row.of) == row.of:
                raise ValueError(
                    "budget 1 is this solver's own run, which other rows cannot share: give less"
                )
            plans[budget] = plans.get(budget) or self._planner(budget, trace)(grid) or euler(moving(grid))
            row.planned = plans[budget].evaluations
        together = RowPlans([plans[row.requested] for row in trace.rows])
        named = vars(self.pipe).items()
        transformers = [
            part for name, part in named if name.startswith("transformer") and isinstance(part, nn.Module)
        ]
        self._apart.enter_context(left_out(transformers, together, lambda: trace.made))
        return together

    def _narrow_plan(self, trace: PlanTrace, grid: Array) -> TimePlan | None:
        """The plan whose evaluations are narrow, its run begun; None where they are whole."""
        if self.narrow is None or self._scoped.get("planner_for") is not None:
            return None
        found = self.narrow.for_times(trace.requested, trace.target, grid)
        if found is None:
            return None
        try:
            trace.blocks = self._begin(found, trace)
        except ValueError as error:
            trace.remarks = [f"evaluations are whole: {error}"]
            return None
        trace.widths = tuple(found.plan.widths.tolist()) if found.plan.narrows else ()
        trace.ratio = found.ratio
        return found.plan

    def _begin(self, found: NarrowPlan, trace: PlanTrace) -> Trace:
        assert self._narrowing is not None
        return self._narrowing.begin(found, trace.samples)

    def _end(self) -> None:
        self._apart.close()
        if self._narrowing is not None:
            self._narrowing.end()

    def _course_of(self, grid: Array, trace: PlanTrace) -> Any:
        """The first plan of a run that may turn to others."""
        steps = len(grid) - 1
        if self._given:
            first = next(iter(self._given.values()))
        else:
            first = max(1, fitting(self.pace.room(0), self._most, self._most))

        def plan_of(evaluations: int) -> Any:
            return self._planner(evaluations / steps, trace)(grid)

        self._course = Course(grid, trace.target, plan_of, first)
        if not self._given:
            trace.turns = self._course.turns
        return self._course.plan

    def _planner(self, budget: float, trace: PlanTrace) -> Planner:
        """A scheduler may know which warps of its times serve where nothing was measured."""
        planner_for = self._scoped.get("planner_for") or self.planner_for
        known: dict[str, Warp] = getattr(self.scheduler, "warps", {})
        return planner_for(budget, trace.target, known.get(trace.target))

    def _count(self, number: int) -> Steps | None:
        """An evaluation was made: copies of a scheduler, one for every frame, make it together."""
        assert self._now is not None
        if number <= self._now.made:
            return self._decided[1] if self._decided[0] == number else None
        self._now.made = number
        if isinstance(plan := getattr(self.scheduler, "plan", None), RowPlans):
            for row in plan.computed(number - 1):
                self._now.rows[row].made += 1
        if self.pace.running:
            self.pace.evaluated()
        self._decided = number, None if self._course is None else self._turn(number, self._course)
        if number == self._now.planned:
            self._end()
        return self._decided[1]

    def _turn(self, made: int, course: Course) -> Steps | None:
        """What is followed from here, where that changes."""
        assert self._now is not None
        chosen = self._given.get(made) if self._given else self._chosen(made, course)
        if chosen is None:
            return None
        plan = course.turn(made, chosen)
        self._now.planned = plan.evaluations
        if not self._given:
            self._now.turns = course.turns
        return plan

    def _chosen(self, made: int, course: Course) -> int | None:
        """The number of evaluations of the plan that ends in time from here, None for the present one.

        A loop that took all its times at once cannot be given others.
        """
        left, most = course.left(made), max(self._most - made, 0)
        fits = fitting(self.pace.room(made), left, most)
        if fits == left or self.scheduler.read != made:
            return None
        number = course.plan_with(made, fits)
        return None if course.ahead(made, number) == left else number

    def _save(self, save: Any, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """The pipeline with its own scheduler, and its bundle beside it in `routers/`."""
        self.pipe.scheduler = self._own
        try:
            save(folder, *args, **kwargs)
        finally:
            self.pipe.scheduler = self.scheduler
        bundle = getattr(self.planner_for, "__self__", None)
        if isinstance(bundle, Bundle):
            bundle.save(os.path.join(folder, BUNDLE))

    def _time_calls(self) -> None:
        """Know where each call of the pipeline begins and ends."""

        def begins(function: Any, *args: Any, **kwargs: Any) -> Any:
            if self._scope is None:
                self.pace.start()
            return function(*args, **kwargs)

        def ends(function: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if self._scope is None and self.pace.running and self._now is not None:
                self._now.took = self.pace.finish()
            return result

        for names, around in ((BEGINS, begins), (ENDS, ends)):
            for name in names:
                if hasattr(self.pipe, name):
                    self.pipe.__dict__[name] = functools.partial(around, getattr(self.pipe, name))
                    self._undo.callback(self.pipe.__dict__.pop, name, None)


def _device_of(pipe: Any) -> str:
    device: Any = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", "cpu")
    return torch.device(device).type


def _check_wishes(budget: Budget, target: str, seconds: float | None) -> None:
    for one in each_of(budget):
        check_wishes(one, target)
    if not each_of(budget):
        raise ValueError("no budget for any row; give one for each, or one for all")
    if seconds is not None and isinstance(budget, Sequence):
        raise ValueError("seconds are of a whole batch: give them with one budget, or budgets without them")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"{seconds:g} seconds are no time to make anything in")
