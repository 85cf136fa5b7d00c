"""Fit a bundle: plans in time for one model, from a dense run and a run or two of each plan.

1. record: the samples' dense run (and, for plans that aim at it, the exact solution: many steps of AB2);
2. plans: for every number of evaluations a few candidates, fitted in closed loop (`planned/choose_times.py`);
   those to the exact solution are bent as a whole instead, like one of them (`planned/refine.py`);
3. narrow: few evaluations with narrow MLPs, for budgets where whole ones fall apart (`narrow.py`).

One batch of samples is enough: a handful of weights are fitted to thousands of latent values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..attachment import architecture, fingerprint
from ..bundle import Bundle
from ..planned.bends import COMMON, bent
from ..planned.choose_times import CANDIDATES, FREE, choose
from ..planned.closed_loop import Recording, StageFit, Trajectory
from ..planned.follow import Steps
from ..planned.narrow import Narrowing, NarrowPlan
from ..planned.refine import refine
from ..planned.scheduler import check_scheduler, elastic_scheduler
from ..planned.spent import EXACT_SHARE
from ..planned.timeplan import Array, TimePlan, euler, moving
from ..planned.universal import Warp, solver_plan
from ..spec import TransformerSpec
from ..trained.bundle import Trained
from .narrow import Measured, candidates, overshooting_error, worth_it
from .settings import FitSettings
from .state import State
from .workload import Workload, require_finite

Report = Callable[[str, int, int], None]
"""(phase, done, of)."""


class Crew(Protocol):
    """Processes that share a fit, each with the whole model and the same state."""

    @property
    def leads(self) -> bool:
        """Whether this is the first of them."""
        ...

    def taken(self, batches: Sequence[int], name: str) -> Iterator[int]:
        """Those of a named list that nobody else takes."""
        ...

    def wait_for_everyone(self) -> None:
        """Go on when every process has come here."""
        ...


T = TypeVar("T")


class Fit:
    """A fit under way. state: keeps what is finished, and gives back what an earlier attempt kept, or what
    another process of a crew has made.
    """

    def __init__(
        self, workload: Workload, spec: TransformerSpec, settings: FitSettings, state: State | None,
        report: Report, trained: Trained | None = None, crew: Crew | None = None,
    ) -> None:  # fmt: skip
        self.crew = crew
        self.narrowing = Narrowing(workload.pipe, spec, trained)
        self.workload, self.settings, self.state, self.report = workload, settings, state, report
        self.grid: Array = np.zeros(0)
        self.warps: dict[str, Warp] = {}
        self._recorded: dict[str, Trajectory] = {}
        check_scheduler(workload.pipe.scheduler)

    def run(self, steps: Callable[[Array], Steps | None]) -> Tensor:
        """The samples' latents along what a planner makes of their own times. Raises NotFiniteError."""

        def planner(grid: Array) -> Steps | None:
            self.grid = grid
            return steps(moving(grid))

        with torch.no_grad(), elastic_scheduler(self.workload.pipe, planner):
            latents = self.workload.run(0).cpu()
        require_finite(latents, "in the final latents of the calibration samples")
        return latents

    def record(self, target: str) -> Trajectory:
        """The run that plans aim at."""
        if target in self._recorded:
            return self._recorded[target]
        stored = None if self.state is None else self.state.get(f"record-{target}")
        if stored is None:
            stored = self._record(target)
            if self.state is not None:
                self.state.keep(f"record-{target}", stored)
        self.grid = stored["grid"].double().numpy()
        velocities = [] if target == "dense" else list(stored["velocities"])
        path = Trajectory(stored["times"].tolist(), list(stored["states"]), velocities)
        return self._recorded.setdefault(target, path)

    def _record(self, target: str) -> dict[str, Tensor]:
        recordings: list[Recording] = []

        def planner(grid: Array) -> Recording:
            plan = euler(grid) if target == "dense" else solver_plan(grid, EXACT_SHARE * (len(grid) - 1))
            recordings.append(Recording(plan))
            return recordings[-1]

        self.run(planner)
        path = recordings[-1].trajectory
        return {
            "grid": torch.from_numpy(self.grid.copy()),
            "times": torch.tensor(path.times, dtype=torch.float64),
            "states": torch.stack(path.states).cpu(),
            "velocities": torch.stack(path.velocities).cpu(),
        }

    def _led(self, make: Callable[[], T]) -> T:
        """What the first process makes, and the others read from the state."""
        if self.crew is None:
            return make()
        if self.crew.leads:
            made = make()
            self.crew.wait_for_everyone()
            return made
        self.crew.wait_for_everyone()
        return make()

    def plans(self) -> dict[str, dict[int, TimePlan]]:
        """For each target and number of evaluations. The plan in the middle tries all warps of the times, and
        tells with which of them the others begin.
        """
        chosen: dict[str, dict[int, TimePlan]] = {}
        for target in self.settings.targets:
            self.report(f"record {target}", 0, 1)
            recorded, warps = self._led(partial(self.record, target)), CANDIDATES[target]
            numbers = self.settings.evaluations(len(self.grid) - 1)
            if target == "exact":
                chosen[target] = self._led(partial(self._exact_plans, recorded, numbers))
                continue
            middle = numbers[len(numbers) // 2]
            others = [n for n in numbers if n != middle]
            self.report(f"plans, {target}", 0, len(numbers))
            first, ranked = self._led(partial(self._tried, recorded, middle, target, warps, True))
            self.warps[target] = ranked[0]
            warps = (*ranked, *(w for w in warps if w not in ranked))
            if self.crew is not None:  # then they are in the state
                for evaluations in self.crew.taken(others, f"plans {target}"):
                    self.report(f"plans, {target}", 1 + others.index(evaluations), len(numbers))
                    self._tried(recorded, evaluations, target, warps)
                self.crew.wait_for_everyone()
            chosen[target] = {middle: first}
            for done, evaluations in enumerate(others):
                self.report(f"plans, {target}", 1 + done, len(numbers))
                chosen[target][evaluations], _ = self._tried(recorded, evaluations, target, warps)
        return chosen

    def _tried(
        self, recorded: Trajectory, evaluations: int, target: str, warps: Sequence[Warp], first: bool = False
    ) -> tuple[TimePlan, list[Warp]]:
        """As `_plan`, with as many candidates as it is worth."""
        tries = self.settings.tries_for(evaluations, len(self.grid) - 1, first)
        return self._plan(recorded, evaluations, target, warps[:tries])

    def _exact_plans(self, recorded: Trajectory, numbers: Sequence[int]) -> dict[int, TimePlan]:
        """For each number of evaluations: Adams-Bashforth's plan at the warp that serves best, bent."""
        leading = self.settings.leading(len(self.grid) - 1)
        warps = CANDIDATES["exact"][: self.settings.tries or None]
        self.report("plans, exact", 0, 2)
        _, (warp, *_) = self._plan(recorded, leading, "exact", warps)
        self.warps["exact"] = warp
        self.report("plans, exact", 1, 2)
        stored = None if self.state is None else self.state.get("bend-exact")
        if stored is None:
            near = solver_plan(self.grid, leading, warp)
            found = refine(near, self._end, recorded.states[-1], self.settings.rounds, COMMON)
            stored = {"numbers": torch.from_numpy(found.numbers)}
            if self.state is not None:
                self.state.keep("bend-exact", stored)
        bend = stored["numbers"].numpy()
        return {n: bent(solver_plan(self.grid, n, warp), bend, leading) for n in numbers}

    def _end(self, plan: TimePlan) -> Tensor:
        """Where the samples end along a plan, as the scheduler sees them."""
        recording = Recording(plan)
        self.run(always(recording))
        return recording.trajectory.states[-1].cpu()

    def narrow(self, plans: Mapping[str, Mapping[int, TimePlan]]) -> dict[str, list[NarrowPlan]]:
        """By target, the narrow plans that are worth their compute. plans: the whole ones."""
        steps = len(self.grid) - 1
        numbers, chosen = self.settings.narrow(steps, self.narrowing.trained is not None), {}
        for target in self.settings.targets if numbers else ():
            self.report(f"narrow, {target}", 0, 1)
            name = f"narrow-{target}"
            stored = None if self.state is None else self.state.get(name)
            if stored is None:
                found = self._narrow(plans.get(target, {}), numbers, self.record(target))
                arrays = {
                    f"{i}.{key}": a for i, one in enumerate(found) for key, a in one.to_arrays().items()
                }
                stored = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
                if self.state is not None:
                    self.state.keep(name, stored)
            kept: dict[int, dict[str, Any]] = {}
            for key, value in stored.items():
                number, _, array = key.partition(".")
                kept.setdefault(int(number), {})[array] = value.numpy()
            if kept:
                chosen[target] = [NarrowPlan.from_arrays(kept[number]) for number in sorted(kept)]
        return chosen

    def _narrow(
        self, whole: Mapping[int, TimePlan], numbers: Sequence[int], target: Trajectory
    ) -> list[NarrowPlan]:
        grid, steps = moving(self.grid), len(self.grid) - 1
        end, measured = target.states[-1].cpu(), list[Measured]()
        for number in whole.keys() & {*numbers}:
            plan = whole[number]
            error = overshooting_error(self.run(always(plan)), end)
            measured.append(Measured(plan, number / steps, error))
        routed = self.narrowing.trained is not None
        for near, ratio in candidates(grid, numbers, self.workload.pipe.scheduler, routed):
            stages = StageFit(near.times, target, FREE, near)
            trace = self.narrowing.begin(NarrowPlan(near, 0.0, 1.0, ratio), self.workload.rows)
            try:
                latents = self.run(always(stages))
            finally:
                self.narrowing.end()
            share = near.evaluations / steps * trace.flops["spent"] / trace.flops["dense"]
            plan = replace(stages.plan, widths=near.widths)
            measured.append(Measured(plan, share, overshooting_error(latents, end), ratio))
        return worth_it(measured, min(1.0, (max(numbers) + 1) / steps))

    def _plan(
        self, recorded: Trajectory, evaluations: int, target: str, warps: Sequence[Warp]
    ) -> tuple[TimePlan, list[Warp]]:
        """The best plan, and the warps from the best on."""
        name = f"plan-{target}-{evaluations}"
        stored = None if self.state is None else self.state.get(name)
        if stored is None:
            ranked = choose(
                lambda steps: self.run(always(steps)), recorded, self.grid, evaluations, target, warps
            )
            best = next(iter(ranked.values())).plan
            stored = {key: torch.from_numpy(array.copy()) for key, array in best.to_arrays().items()}
            stored["warps"] = torch.tensor(list(ranked), dtype=torch.float64)
            if self.state is not None:
                self.state.keep(name, stored)
        order: list[Warp] = [(float(shift), float(bend)) for shift, bend in stored["warps"].tolist()]
        return TimePlan.from_arrays({key: value.numpy() for key, value in stored.items()}), order


def always(steps: Steps) -> Callable[[Array], Steps]:
    """A planner for these steps, whatever the run's own times."""
    return lambda _: steps


def fit(
    transformer: nn.Module,
    spec: TransformerSpec,
    workload: Workload,
    base_model: str,
    guidance: float,
    settings: FitSettings | None = None,
    report: Report = lambda phase, done, total: None,
    state: State | None = None,
    trained: Trained | None = None,
    crew: Crew | None = None,
) -> Bundle:
    """Fit a bundle to a model on the first batch of a workload.

    state: keeps the progress; a fit that continues gives the same bundle as one in one go. trained: routers
    of the model's own weights, which narrow evaluations may be left to. crew: processes that make its plans
    together, with one state; the first one has the whole bundle, the same as of one process alone.
    Raises NotFiniteError, OSError if the state cannot be written, ValueError for a scheduler that a plan
    cannot stand in for.
    """
    settings = settings or FitSettings()
    work = Fit(workload, spec, settings, state, report, trained, crew)
    plans = work.plans()
    narrow = work.narrow(plans) if crew is None or crew.leads else {}
    metadata: dict[str, Any] = {"method": "fit", "rows": workload.rows, "seed": settings.seed}
    metadata["generations"] = round(settings.cost(workload.num_steps), 2)
    return Bundle(
        spec=spec,
        base_model=base_model,
        architecture=architecture(transformer),
        fingerprint=fingerprint(transformer),
        num_steps=workload.num_steps,
        guidance=guidance,
        times=work.grid.tolist(),
        plans=plans,
        warps=work.warps,
        narrow=narrow,
        trained=trained,
        metadata=metadata,
    )
