"""Which times, and which weights: a few candidates, fitted in closed loop and judged where they end.

Errors of x feed back into v, so no formula tells how good times are (docs/notes/solver-plan.md): every
candidate runs on the recorded samples, n evaluations each, and the one that ends nearest to the target is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from .closed_loop import FitSettings, StageFit, Steps, Trajectory
from .timeplan import Array, TimePlan, adams_bashforth, moving, resampled, shifted
from .universal import BEND, SHIFT, grid_steps, missing_shift

WARPS = ((SHIFT, BEND), (1.5, 1.2), (SHIFT, 1.0), (3.0, BEND))
"""Shift and bend of the steps taken from a dense run, in the order in which they are tried."""
SHIFTS = (SHIFT, 1.7, 3.0)
"""Of the times of a plan that aims at the exact solution."""
FEW = 6
"""Up to so many evaluations weights are fitted to the exact solution; from there on Adams-Bashforth's are as
good (docs/notes/solver-plan.md)."""
HELD, FREE, STATE = FitSettings(passes=2, order=2), FitSettings(), FitSettings(state=True)
"""How far weights may leave Adams-Bashforth's: not at all; freely; freely, x among the regressors."""

Run = Callable[[Steps], object]
"""Runs the recorded samples along a plan, a fit or a recording."""


@dataclass(frozen=True)
class Fitted:
    """A candidate that ran. snr: of where it ended on the recorded samples, in dB."""

    plan: TimePlan
    snr: float


def candidates(grid: Array, evaluations: int, target: str) -> Iterator[tuple[TimePlan, FitSettings]]:
    """Plans to start from, and what of them is fitted; the most promising first.

    grid [N + 1]: the run's own times. To the dense run: steps of its grid, weights free. To the exact
    solution: its times shifted.
    """
    grid = moving(grid)
    if target == "dense":
        seen = set()
        for shift, bend in WARPS:
            steps = grid_steps(len(grid) - 1, evaluations, shift, bend)
            if tuple(steps) not in seen:
                seen.add(tuple(steps))
                yield adams_bashforth(grid[[*steps, -1]], 2, grid), FREE
        return
    for shift in SHIFTS:
        times = shifted(resampled(grid, evaluations), shift * missing_shift(grid) / SHIFT)
        for settings in (HELD, STATE) if evaluations <= FEW else (HELD,):
            yield adams_bashforth(times, 2), settings


def fit(run: Run, near: TimePlan, target: Trajectory, settings: FitSettings) -> Fitted:
    """One candidate: the weights of a plan's steps, near its own."""
    stages = StageFit(near.times, target, settings, near)
    run(stages)
    return Fitted(stages.plan, stages.snr)


def choose(
    run: Run, recorded: Trajectory, grid: Array, evaluations: int, target: str, tries: int = len(WARPS)
) -> Fitted:
    """The candidate that ends nearest to the recorded target, of the first `tries`."""
    tried = islice(candidates(grid, evaluations, target), tries)
    return max((fit(run, near, recorded, how) for near, how in tried), key=lambda fitted: fitted.snr)
