"""A plan for any budget with nothing measured: times warped, and Adams-Bashforth's weights.

Towards the exact solution a plan moves the run's own times towards the noise, and is bent (`bends.py`) as a
packaged picture model wants it; times of meshes move towards the data, and such a plan is left as it is.
Towards the run of all steps ("dense") it takes some of that run's own times, and its weights are summed on
that grid, so that a plan goes astray as Euler's run does: nearer to it by several dB than to the exact
solution, at the same price, and at the full budget it is that run.

Pipelines of large models bring times that are shifted already; those are moved no further than `WARPS` says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..spec import TARGETS
from .bends import COMMON, COMMON_AT, bent
from .spent import EXACT_EVALUATIONS, EXACT_SHARE, evaluations_for
from .timeplan import Array, TimePlan, adams_bashforth, euler, moving, resampled, shifted

Warp = tuple[float, float]
"""Shift of times towards the noise, and bend: of them towards both ends of the run, more than 1."""
WARPS: dict[str, Warp] = {"dense": (1.3, 1.2), "exact": (1.8, 1.0)}
"""By target (docs/notes/solver-plan.md); a bend is for steps of a dense run's own grid."""
LONG: Warp = (1.7, 1.3)
"""Towards the dense run, by more than half of its steps: denser where it starts and where it ends."""


def usual_warp(target: str, evaluations: int, steps: int) -> Warp:
    """The warp of a plan of so many of a run's steps, where nothing says another."""
    return LONG if target == "dense" and 2 * evaluations > steps else WARPS[target]


def universal_plan(grid: Array, evaluations: int, target: str, warp: Warp | None = None) -> TimePlan:
    """The plan for a run's own times [N + 1]. warp: default the usual one."""
    if target == "exact":
        plan = solver_plan(grid, evaluations, warp)
        return bent(plan, COMMON, COMMON_AT) if (warp or WARPS[target])[0] > 1 else plan
    grid = moving(grid)
    shift, bend = warp or usual_warp(target, evaluations, len(grid) - 1)
    steps = grid_steps(len(grid) - 1, evaluations, shift, bend)
    return adams_bashforth(grid[[*steps, -1]], 2, grid)


def solver_plan(grid: Array, evaluations: int, warp: Warp | None = None) -> TimePlan:
    """Adams-Bashforth's weights at shifted times: with many evaluations, the exact solution."""
    grid, (shift, _) = moving(grid), warp or WARPS["exact"]
    return adams_bashforth(shifted(resampled(grid, evaluations), missing_shift(grid, shift)), 2)


def grid_steps(steps: int, evaluations: int, shift: float, bend: float) -> list[int]:
    """Which of a run's steps are computed, ascending, the first among them: at most `evaluations`."""
    count = min(evaluations, steps)
    share = 1 - np.arange(1, count) / count
    logit = np.log(shift) + bend * np.log(share / (1 - share))
    chosen = [0, *np.rint(steps / (1 + np.exp(logit))).astype(int).tolist()]
    for i in range(1, count):
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    return [min(step, steps - (count - i)) for i, step in enumerate(chosen)]


def missing_shift(grid: Array, shift: float) -> float:
    """By how much a grid's times are short of a shift, at least 1: read where half of its steps are done. A
    shift below 1, towards the data, is of the grid's own times.
    """
    if shift <= 1:
        return shift
    middle = float(resampled(grid, 2)[1] / grid[0])
    return max(1.0, shift * (1 - middle) / middle) if 0 < middle < 1 else 1.0


def universal_planner(
    budget: float, target: str, warp: Warp | None = None
) -> Callable[[Array], TimePlan | None]:
    """What `elastic_scheduler` asks: from a run's own times to a plan within a budget; None where the
    run's own steps are it.

    The share is of the steps that the run would make: of fewer ones where it begins at a picture.
    Raises ValueError for a budget or target that does not exist, before any run.
    """
    check_wishes(budget, target)

    def planner(grid: Array) -> TimePlan | None:
        evaluations = evaluations_for(budget, len(grid) - 1)
        if target == "dense" and evaluations == len(grid) - 1:
            return None
        return universal_plan(grid, evaluations, target, warp)

    return planner


def exact_planner(grid: Array) -> TimePlan:
    """A planner for the exact solution: so many evaluations that more of them change nothing that is seen."""
    return solver_plan(grid, max(EXACT_EVALUATIONS, EXACT_SHARE * (len(grid) - 1)))


def fewer_steps(budget: float) -> Callable[[Array], TimePlan | None]:
    """A planner for a solver that somebody named: fewer of Euler's steps, at the run's own times."""

    def planner(grid: Array) -> TimePlan | None:
        evaluations = evaluations_for(budget, len(grid) - 1)
        return None if evaluations == len(grid) - 1 else euler(resampled(grid, evaluations))

    return planner


def check_wishes(budget: float, target: str) -> None:
    """Raises ValueError for a budget or target that does not exist."""
    evaluations_for(budget, 1)
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
