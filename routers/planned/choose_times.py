"""Which times, and how free the weights: a few candidates, fitted in closed loop and judged where they end.

Errors of x feed back into v, so no formula tells how good times are (docs/notes/solver-plan.md): every
candidate runs on the recorded samples, n evaluations each, and the one that ends nearest to the target is
kept. `polish` then moves single times while that helps, for models whose plans are made once and used often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .closed_loop import FitSettings, StageFit, Steps, Trajectory
from .timeplan import Array, TimePlan, adams_bashforth, resampled, shifted

SHIFTS = (1.5, 2.2, 3.0)
"""Shifts of the run's own times that are tried."""
HELD, CONSISTENT, STATE = FitSettings(passes=2, order=2), FitSettings(order=1), FitSettings(state=True)
"""How far weights may leave Adams-Bashforth's: not at all; keeping their sum; freely, x among the regressors.
Which is best depends on target and evaluations (docs/notes/solver-plan.md)."""
MOVE, LEAST_MOVE = 0.3, 0.1
"""Steps of `polish`, in the logit of the share of the run that is left."""

Run = Callable[[Steps], object]
"""Runs the recorded samples along a plan, a fit or a recording."""


@dataclass(frozen=True)
class Fitted:
    """A candidate that ran. snr: of where it ended on the recorded samples, in dB."""

    plan: TimePlan
    snr: float
    settings: FitSettings


def candidates(
    grid: Array, evaluations: int, shifts: tuple[float, ...] = SHIFTS
) -> Iterator[tuple[Array, FitSettings]]:
    """Times and settings to try: the grid's times at n evaluations, shifted; weights held and fitted."""
    times = resampled(grid, evaluations)
    for shift in shifts:
        for settings in (HELD, CONSISTENT, STATE):
            yield shifted(times, shift), settings


def fit(
    run: Run, times: Array, target: Trajectory, settings: FitSettings, grid: Array | None = None
) -> Fitted:
    """One candidate. grid: that of a target of Euler's steps, so that the weights' start aims at it too."""
    stages = StageFit(times, target, settings, adams_bashforth(times, 2, grid))
    run(stages)
    return Fitted(stages.plan, stages.snr, settings)


def choose(
    run: Run,
    target: Trajectory,
    grid: Array,
    evaluations: int,
    *,
    euler_target: bool,
    shifts: tuple[float, ...] = SHIFTS,
) -> Fitted:
    """The candidate that ends nearest to the target on the recorded samples.

    euler_target: the target is the run of all the grid's steps, not the exact solution.
    """
    held = grid if euler_target else None
    tried = [fit(run, t, target, settings, held) for t, settings in candidates(grid, evaluations, shifts)]
    return max(tried, key=lambda fitted: fitted.snr)


def polish(
    run: Run, best: Fitted, target: Trajectory, grid: Array | None = None, *, most: int = 60
) -> Fitted:
    """Move times while the end comes nearer: all alike, spread, then one by one. most: runs at most."""
    size, ran = MOVE, 0
    while size > LEAST_MOVE and ran < most:
        before = best
        for direction in _directions(best.plan.times):
            for sign in (1, -1):
                times = _moved(best.plan.times, sign * size * direction)
                if times is None or ran >= most:
                    continue
                ran += 1
                found = fit(run, times, target, best.settings, grid)
                if found.snr > best.snr:
                    best = found
                    break
        if best is before:
            size /= 2
    return best


def _directions(times: Array) -> list[Array]:
    """Directions [n - 1] in which the inner times are moved, each with 1 as its largest move."""
    inner = _logits(times)
    spread = inner - inner.mean()
    largest = np.abs(spread).max()
    return [np.ones(len(inner)), *([spread / largest] if largest else []), *np.eye(len(inner))]


def _logits(times: Array) -> Array:
    share = (times[1:-1] - times[-1]) / (times[0] - times[-1])
    return np.asarray(np.log(share / (1 - share)))


def _moved(times: Array, by: Array) -> Array | None:
    """Times whose inner ones are moved in logits; None if they cross."""
    share = 1 / (1 + np.exp(-(_logits(times) + by)))
    moved = np.concatenate([times[:1], times[-1] + share * (times[0] - times[-1]), times[-1:]])
    return moved if (np.diff(moved) < 0).all() else None
