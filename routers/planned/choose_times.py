"""Which times, and which weights: a few candidates, judged where they end.

Errors of x feed back into v, so no formula tells how good times are (docs/notes/solver-plan.md): every
candidate runs on the recorded samples, n evaluations each, and the one that ends nearest to the target is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .closed_loop import FitSettings, Recording, StageFit, Trajectory, mean_snr
from .follow import Steps
from .timeplan import Array, TimePlan
from .universal import WARPS, Warp, universal_plan

CANDIDATES: dict[str, tuple[Warp, ...]] = {
    "dense": (WARPS["dense"], (1.7, 1.3), (1.0, 1.3), (2.2, 1.4), (0.8, 1.2), (2.2, 1.2)),
    "exact": (WARPS["exact"], (2.2, 1.0), (0.5, 1.0), (1.0, 1.0), (3.0, 1.0)),
}
"""Warps of the times by target, in the order in which they are tried."""
FREE = FitSettings()
"""Weights of plans to the dense run are fitted freely; those to the exact solution are bent (`refine.py`)."""

Run = Callable[[Steps], object]
"""Runs the recorded samples along a plan, a fit or a recording."""


@dataclass(frozen=True)
class Fitted:
    """A candidate that ran. snr: of where it ended on the recorded samples, in dB."""

    plan: TimePlan
    snr: float


def fit(run: Run, near: TimePlan, target: Trajectory, settings: FitSettings) -> Fitted:
    """One candidate: the weights of a plan's steps, near its own."""
    stages = StageFit(near.times, target, settings, near)
    run(stages)
    return Fitted(stages.plan, stages.snr)


def measure(run: Run, plan: TimePlan, target: Trajectory) -> Fitted:
    """A candidate as it is."""
    recording = Recording(plan, len(target.states[0]))
    run(recording)
    return Fitted(plan, mean_snr(recording.trajectory.states[-1], target.states[-1]))


def choose(
    run: Run, recorded: Trajectory, grid: Array, evaluations: int, target: str, warps: Sequence[Warp]
) -> dict[Warp, Fitted]:
    """What each warp of the times comes to, the best first; warps that give the same times count once."""
    fitted: dict[tuple[float, ...], tuple[Warp, Fitted]] = {}
    for warp in warps:
        near = universal_plan(grid, evaluations, target, warp)
        if tuple(near.times) not in fitted:
            found = fit(run, near, recorded, FREE) if target == "dense" else measure(run, near, recorded)
            fitted[tuple(near.times)] = warp, found
    return dict(sorted(fitted.values(), key=lambda pair: -pair[1].snr))
