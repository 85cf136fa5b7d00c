"""Evaluations x widths: where fewer whole evaluations fall apart, more of them with narrow MLPs are made.

A plan says a width for each evaluation (`TimePlan.widths`), or what share of an evaluation routers may spend
(`NarrowPlan.ratio`), which then decide for every sample and block. While a run of such a plan lasts, and no
longer, the transformer's blocks are under the engine, which counts what that costs. Which plans are narrow
was measured (`routers/calibrate/narrow.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..elastic import Elastic
from ..policy import OpenPolicy, Policy, WidthPolicy
from ..router import Router
from ..spec import TransformerSpec
from ..trace import Trace
from ..trained.bundle import Trained
from ..trained.policy import TrainedPolicy
from ..trained.router import build_router
from .spent import ROUNDING
from .timeplan import Array, TimePlan

SAME_TIMES = 2e-3
"""Times of a run may be so far from those that plans were fitted for."""


@dataclass(frozen=True)
class NarrowPlan:
    """A plan that measured better than all that cost less. share: of the dense run's FLOPs.

    until: budgets from share up to this are best served by it. ratio: what trained routers spend of an
    evaluation; 1: they do not decide.
    """

    plan: TimePlan
    share: float
    until: float
    ratio: float = 1.0

    def to_arrays(self) -> dict[str, Array]:
        """Plain arrays for a file; `from_arrays` reads them."""
        serves = [self.share, self.until, *([self.ratio] if self.ratio < 1 else [])]
        return {**self.plan.to_arrays(), "serves": np.array(serves)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> NarrowPlan:
        """The plan of `to_arrays`. Raises ValueError for what makes none."""
        serves = np.ravel(arrays.get("serves", ()))
        if len(serves) not in (2, 3) or not 0 < serves[0] < serves[1] <= 1:
            raise ValueError(f"it serves budgets {serves.tolist()}: from one share up to another, up to 1")
        if not 0 < (ratio := float([*serves, 1.0][2])) <= 1:
            raise ValueError(f"routers spend {ratio:g} of its evaluations: a share in (0, 1]")
        return cls(TimePlan.from_arrays(arrays), float(serves[0]), float(serves[1]), ratio)

    def policy(self, trained: Trained | None) -> Policy:
        """What decides over the blocks. Raises ValueError where that are routers, and none were trained."""
        if self.ratio >= 1:
            return WidthPolicy(self.plan.widths.tolist())
        if trained is None:
            raise ValueError("routers decide over this plan's evaluations, and the bundle has none")
        return TrainedPolicy(trained.profile, trained.trend, within=(self.plan.evaluations, self.ratio))


@dataclass(frozen=True)
class NarrowPlans:
    """A bundle's narrow plans, by target, cheapest first; the first serves all budgets below its share too.

    times [N + 1]: of the run that they were fitted for. spec: of the transformer. trained: its routers, where
    plans leave decisions to them.
    """

    spec: TransformerSpec
    times: Array
    plans: Mapping[str, Sequence[NarrowPlan]]
    trained: Trained | None = None

    def at(self, budget: float, target: str, steps: int) -> NarrowPlan | None:
        """The narrow plan for a budget of a run of so many steps; None where evaluations are whole.

        What was measured for one target serves the other too: with so few evaluations both are far away.
        """
        plans = self.plans.get(target) or next(iter(self.plans.values()), ())
        if not plans or steps != len(self.times) - 1:
            return None
        budget = max(budget + ROUNDING, plans[0].share)
        return next((found for found in plans if found.share <= budget < found.until), None)

    def for_times(self, budget: float, target: str, grid: Array) -> NarrowPlan | None:
        """As `at`, for a run's own times [N + 1]."""
        found = self.at(budget, target, len(grid) - 1)
        return found if found is not None and np.allclose(grid, self.times, atol=SAME_TIMES) else None


def made_routers(trained: Trained | None) -> list[Router] | None:
    """Of all blocks, frozen."""
    return None if trained is None else [build_router(state) for state in trained.routers]


class Narrowing:
    """Puts a pipeline's transformer at a plan's widths, or under its routers, for one run at a time."""

    def __init__(self, pipe: Any, spec: TransformerSpec, trained: Trained | None = None) -> None:
        self.pipe, self.spec, self.trained = pipe, spec, trained
        self._elastic: Elastic | None = None
        self._run = ExitStack()

    def begin(self, found: NarrowPlan, samples: int) -> Trace:
        """A run of a plan begins; the trace is filled while it lasts. Raises ValueError, one line, for a
        transformer whose blocks cannot be narrowed (compiled as a whole).
        """
        self.end()
        policy = found.policy(self.trained)
        if self._elastic is None or self._elastic.transformer is not self.pipe.transformer:
            routers = made_routers(self.trained)
            self._elastic = Elastic(self.pipe.transformer, self.spec, OpenPolicy, routers, pipe=self.pipe)
        else:
            self._elastic.attach()
        self._run.callback(self._elastic.detach)
        scope = self._elastic.scope(policy=policy, num_steps=found.plan.evaluations, samples=samples)
        return self._run.enter_context(scope)

    def end(self) -> None:
        """The run is over, or was interrupted: the transformer is as it was. Safe to call twice."""
        self._run.close()
