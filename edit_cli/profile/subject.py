"""What is profiled: a loaded pipeline, run round by round.

A round generates every sample of the request once, at one budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from edit_cli.errors import RunError, bad_input
from edit_cli.generate.plan import Plan
from edit_cli.generate.result import StageClock
from edit_cli.generate.routers import settle
from edit_cli.generate.session import Session, at_budget
from routers.elastic import Elastic


@dataclass
class Round:
    """What one round gave. results: in sample order. traces: per pipeline call."""

    seconds: dict[str, float]
    results: list[Any] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)


class Subject:
    """A session with the plan of a generation to run on it. Raises EditError for bad input."""

    def __init__(self, plan: Plan, budgets: Sequence[float | None]) -> None:
        self.medium, self.stages = plan.medium, tuple(plan.medium.stages)
        clock = StageClock(self.stages)
        with bad_input(), clock.stage("load"):
            self.plan, source = settle(plan)
            self.budgets = tuple(source.budget(budget) for budget in budgets)
            self._session = Session.open(self.plan, source, clock)
        self.load_seconds = clock.seconds["load"]
        self.steps, self.guidance = plan.jobs[0].denoising_steps, plan.jobs[0].guidance
        self.bundle, self.released = source.bundle, source.release is not None
        self.notes = self._session.notes

    @property
    def elastic(self) -> Elastic | None:
        """The attached transformer; None while detached."""
        elastic: Elastic | None = self._session.elastic
        return elastic

    @property
    def pipe(self) -> Any:
        """The pipeline, with a `transformer`."""
        return self._session.pipe

    @property
    def device(self) -> torch.device:
        """Where the transformer runs, also where its weights lie elsewhere between calls (offloading)."""
        return torch.device(self._session.device)

    def attach(self) -> None:
        """Put the blocks under control of the routers."""
        self._session.attach()

    def detach(self) -> None:
        """Leave a clean model."""
        self._session.detach()

    def run(
        self, budget: float | None, call: Callable[[Callable[[], Any]], Any] = lambda run: run()
    ) -> Round:
        """One round of all batches. call: wraps every pipeline call (to set up and read a timer)."""
        clock = self._session.clock = StageClock(self.stages)
        done = Round(clock.seconds)
        for jobs, _ in replace(self.plan, jobs=at_budget(self.plan.jobs, budget)).batches():
            batch = call(lambda jobs=jobs: self._session.run(jobs))  # type: ignore[misc]
            for result in batch.results:
                if isinstance(result, RunError):
                    raise result
            done.results += batch.results
            done.traces.append(batch.trace)
        return done

    def picture(self, result: Any) -> Image.Image:
        """A result as it is shown."""
        picture: Image.Image = self.medium.picture(result)
        return picture

    def quality(self, results: Sequence[Any], dense: Sequence[Any]) -> dict[str, list[float]]:
        """Named measures per sample of how near results are to dense ones."""
        rows = [self.medium.compare(a, b) for a, b in zip(results, dense, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}
