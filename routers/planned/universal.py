"""A plan for any budget with nothing measured: the run's own times, shifted, and Adams-Bashforth's weights.

Towards the exact solution these are Adams-Bashforth's own. Towards the run of all steps ("dense") they are
summed on its grid, so that a plan goes astray as Euler's run does: nearer to it by several dB than to the
exact solution, at the same price, and at the full budget it is that run.
"""

from __future__ import annotations

from collections.abc import Callable

from .timeplan import Array, TimePlan, adams_bashforth, euler, moving, resampled, shifted

SHIFT = 2.2
"""Of a run's own times (docs/notes/solver-plan.md)."""
TARGETS = ("dense", "exact")
"""What a plan aims at: the run of all the pipeline's steps, or the solution that ever more steps tend to."""
GRAIN = 1e-6
"""A budget may be so little above what whole evaluations come to, as a share of one."""


def evaluations_for(budget: float, steps: int) -> int:
    """Whole evaluations that a share of the dense run's FLOPs buys, at least one.

    Raises ValueError for a budget that is not in (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget {budget:g} is not a share of the dense run's FLOPs; give one in (0, 1]")
    return max(1, int(budget * steps + GRAIN))


def universal_plan(grid: Array, evaluations: int, target: str) -> TimePlan:
    """The plan for a run's own times [N + 1]. Raises ValueError for an unknown target."""
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    grid = moving(grid)
    if target == "dense" and evaluations >= len(grid) - 1:
        return euler(grid)
    times = shifted(resampled(grid, evaluations), SHIFT)
    return adams_bashforth(times, 2, grid if target == "dense" else None)


def universal_planner(budget: float, target: str) -> Callable[[Array], TimePlan]:
    """What `scheduler.elastic_scheduler` asks: from a run's own times to a plan within a budget.

    The share is of the steps that the run would make: of fewer ones where it begins at a picture.
    Raises ValueError for a budget or target that does not exist, before any run.
    """
    evaluations_for(budget, 1)
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    return lambda grid: universal_plan(grid, evaluations_for(budget, len(grid) - 1), target)
