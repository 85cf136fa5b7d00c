"""Evaluations x widths: where fewer whole evaluations fall apart, more of them with narrow MLPs are made.

A plan says a width for each evaluation (`TimePlan.widths`). While a run of such a plan lasts, and no longer,
the transformer's blocks are under the engine, which runs every MLP on its first hidden units and counts what
that costs. Which plans are narrow was measured (`routers/calibrate/narrow.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..elastic import Elastic
from ..policy import OpenPolicy, WidthPolicy
from ..spec import TransformerSpec
from ..trace import Trace
from .spent import ROUNDING
from .timeplan import Array, TimePlan

SAME_TIMES = 2e-3
"""Times of a run may be so far from those that plans were fitted for."""


@dataclass(frozen=True)
class NarrowPlan:
    """A plan that measured better than all that cost less. share: of the dense run's FLOPs.

    until: budgets from share up to this are best served by it.
    """

    plan: TimePlan
    share: float
    until: float

    def to_arrays(self) -> dict[str, Array]:
        """Plain arrays for a file; `from_arrays` reads them."""
        return {**self.plan.to_arrays(), "serves": np.array([self.share, self.until])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> NarrowPlan:
        """The plan of `to_arrays`. Raises ValueError for what makes none."""
        serves = np.ravel(arrays.get("serves", ()))
        if len(serves) != 2 or not 0 < serves[0] < serves[1] <= 1:
            raise ValueError(f"it serves budgets {serves.tolist()}: from one share up to another, up to 1")
        return cls(TimePlan.from_arrays(arrays), float(serves[0]), float(serves[1]))


@dataclass(frozen=True)
class NarrowPlans:
    """A bundle's narrow plans, by target, cheapest first; the first serves all budgets below its share too.

    times [N + 1]: of the run that they were fitted for. spec: of the transformer.
    """

    spec: TransformerSpec
    times: Array
    plans: Mapping[str, Sequence[NarrowPlan]]

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


class Narrowing:
    """Puts a pipeline's transformer at a plan's widths for one run at a time."""

    def __init__(self, pipe: Any, spec: TransformerSpec) -> None:
        self.pipe, self.spec = pipe, spec
        self._elastic: Elastic | None = None
        self._run = ExitStack()

    def begin(self, plan: TimePlan, samples: int) -> Trace:
        """A run of a plan begins; the trace is filled while it lasts. Raises ValueError, one line, for a
        transformer whose blocks cannot be narrowed (compiled as a whole).
        """
        self.end()
        if self._elastic is None or self._elastic.transformer is not self.pipe.transformer:
            self._elastic = Elastic(self.pipe.transformer, self.spec, OpenPolicy, pipe=self.pipe)
        else:
            self._elastic.attach()
        self._run.callback(self._elastic.detach)
        policy = WidthPolicy(plan.widths.tolist())
        scope = self._elastic.scope(policy=policy, num_steps=plan.evaluations, samples=samples)
        return self._run.enter_context(scope)

    def end(self) -> None:
        """The run is over, or was interrupted: the transformer is as it was. Safe to call twice."""
        self._run.close()
