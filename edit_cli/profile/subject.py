"""What is profiled: an open session, run round by round. A round makes every sample once, at one budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edit_cli.errors import RunError, bad_input
from edit_cli.generation.result import StageClock
from edit_cli.generation.routers import RouterSource
from edit_cli.generation.session import Batch, Session, at_budget
from edit_cli.profile.plan import ProfilePlan
from routers.elastic import Elastic
from routers.watch.planned import WatchedPlan

Call = Callable[[Callable[[], Batch]], Batch]
"""Wraps a pipeline call, to set up and read a timer."""


@dataclass
class Round:
    """What one round gave. results: in the order of the samples. traces: per pipeline call."""

    seconds: dict[str, float]
    results: list[Any] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)


class Subject:
    """A session with the samples to run in it. budgets: as served, None where the routers fix it."""

    def __init__(self, plan: ProfilePlan) -> None:
        clock = StageClock(plan.generation.medium.stages)
        with bad_input(), clock.stage("load"):
            source = RouterSource.read(plan.generation.routers)
            self.budgets = tuple(source.budget(budget) for budget in plan.budgets)
            self.session = Session.open(_at(plan, self.budgets[0]), source, clock)
        self.load_seconds = clock.seconds["load"]
        self.plan, self.steps = plan, plan.generation.jobs[0].denoising_steps

    @property
    def elastic(self) -> Elastic:
        """The attached transformer."""
        elastic = self.session.elastic
        assert elastic is not None, "the subject is attached while it is measured"
        return elastic.elastic if isinstance(elastic, WatchedPlan) else elastic  # type: ignore[no-any-return]

    def run(self, budget: float | None, call: Call = lambda run: run()) -> Round:
        """One round. Raises RunError for a sample that failed."""
        clock = StageClock(self.plan.generation.medium.stages)
        done = Round(clock.seconds)
        with self.session.timed_by(clock):
            for jobs, _ in _at(self.plan, budget).batches():
                batch = call(functools.partial(self.session.run, jobs))
                done.results += batch.results
                done.traces.append(batch.trace)
        for result in done.results:
            if isinstance(result, RunError):
                raise result
        return done

    def quality(self, results: Sequence[Any], dense: Sequence[Any]) -> dict[str, list[float]]:
        """Named measures per sample of how near results are to dense ones."""
        compare = self.plan.generation.medium.compare
        rows = [compare(made, reference) for made, reference in zip(results, dense, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}


def _at(plan: ProfilePlan, budget: float | None) -> Any:
    return replace(plan.generation, jobs=at_budget(plan.generation.jobs, budget))
