"""What rivals may fit themselves on: recorded runs of calibration prompts, which no score is taken of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import routers
from benchmarks.bench import Attached, Bench
from routers.calibrate.evaluate import latent_snr
from routers.calibrate.fit import fit
from routers.calibrate.settings import FitSettings
from routers.planned.closed_loop import Recording, Trajectory
from routers.planned.follow import Steps
from routers.planned.scheduler import elastic_scheduler
from routers.planned.timeplan import Array, TimePlan, euler, moving
from routers.planned.universal import solver_plan

SAMPLES = 6
"""Calibration prompts that a fit is made on."""
EXACT_EVALUATIONS = 100
"""Of the exact solution that is recorded."""

Planning = Callable[[Array], Steps]
"""From a run's own times to what is done instead."""


@contextmanager
def planned(bench: Bench, planning: Planning) -> Iterator[Attached]:
    """The pipeline on other times and weights."""
    made: list[Steps] = []

    def planner(grid: Array) -> Steps:
        made.append(planning(moving(grid)))
        return made[-1]

    with elastic_scheduler(bench.pipe, planner) as scheduler:
        del scheduler
        yield Attached(
            bench.num_steps, nullcontext, spent=lambda: (len(made[-1].times) - 1) / bench.num_steps
        )


def exact_plan(bench: Bench, grid: Array, evaluations: int = EXACT_EVALUATIONS) -> TimePlan:
    """So many evaluations that more of them change nothing that is seen."""
    warps = getattr(bench.pipe.scheduler, "warps", {})
    return solver_plan(grid, evaluations, warps.get("exact"))


def run_samples(bench: Bench, planning: Planning | None = None, most: int = SAMPLES) -> Any:
    """Final latents of the calibration samples, at most so many."""
    prompts = bench.calibration[:most]
    workload = bench.workload(len(prompts), prompts)
    if planning is None:
        return workload.run(0)
    with planned(bench, planning):
        return workload.run(0)


def trajectory(bench: Bench, target: str) -> tuple[Array, Trajectory]:
    """The grid, and the recorded run of the calibration samples to a target. Kept in the bench's memo."""
    if f"recorded {target}" not in bench.memo:
        grids: list[Array] = []
        taken: list[Recording] = []

        def planning(grid: Array) -> Recording:
            grids.append(grid)
            taken.append(Recording(euler(grid) if target == "dense" else exact_plan(bench, grid)))
            return taken[-1]

        run_samples(bench, planning)
        bench.memo[f"recorded {target}"] = grids[-1], taken[-1].trajectory
    grid, path = bench.memo[f"recorded {target}"]
    return grid, path


def best(
    bench: Bench, key: str, target: str, values: Sequence[float], planning: Callable[[float], Planning]
) -> float:
    """The value whose plan ends nearest to the target on the calibration samples. Kept in `bench.chosen`."""
    if key not in bench.chosen:
        truth = trajectory(bench, target)[1].states[-1]
        found = {}
        for value in values:
            latents = run_samples(bench, planning(value))
            found[value] = statistics.mean(latent_snr(latents.float().cpu(), truth.cpu()))
        bench.chosen[key] = max(found, key=lambda value: found[value])
    return bench.chosen[key]


def calibrated(bench: Bench, evaluations: int, target: str) -> routers.Bundle:
    """What `edit calibrate` makes for one budget of the calibration samples."""
    key = f"calibrated {evaluations} {target}"
    if key not in bench.memo:
        prompts = bench.calibration[:SAMPLES]
        workload = bench.workload(len(prompts), prompts)
        settings = FitSettings(budgets=(evaluations / bench.num_steps,), targets=(target,))
        spec, base = bench.backbone.family.transformer, bench.backbone.name
        bench.memo[key] = fit(bench.transformer, spec, workload, base, bench.guidance, settings)
    bundle: routers.Bundle = bench.memo[key]
    return bundle
