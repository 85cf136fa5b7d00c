"""The plan that needs nothing measured: what a budget buys, which times it takes, where it goes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from routers.planned.follow import follow
from routers.planned.spent import PlanTrace, evaluations_for
from routers.planned.timeplan import adams_bashforth, euler, moving, resampled, shifted
from routers.planned.universal import (
    WARPS,
    fewer_steps,
    grid_steps,
    missing_shift,
    solver_plan,
    universal_plan,
    universal_planner,
)

GRID = np.linspace(1, 0, 21)
MESH_GRID = np.append(np.linspace(1, 0, 20), 0.0)
"""Hunyuan3D's last step goes nowhere."""
START = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def decay(rate: float = 1.5):
    """dx/ds = rate x, and its solution from time 1."""
    return lambda x, s: rate * x, lambda s: START * np.exp(rate * (s - 1))


# -- budgets ------------------------------------------------------------------------------------


def test_a_budget_buys_whole_evaluations() -> None:
    assert [evaluations_for(b, 20) for b in (0.01, 0.35, 0.39, 0.4, 1.0)] == [1, 7, 7, 8, 20]
    assert evaluations_for(3 / 7, 7) == 3


def test_a_share_of_the_steps_buys_exactly_these_and_nothing_overspends() -> None:
    for steps in range(1, 61):
        for evaluations in range(1, steps + 1):
            assert evaluations_for(evaluations / steps, steps) == evaluations
    for budget in np.linspace(0.02, 1, 50):
        for steps in range(50, 61):
            assert evaluations_for(budget, steps) / steps <= budget + 1e-6


@pytest.mark.parametrize("budget", [0.0, 1.2, -1.0, float("nan"), float("inf")])
def test_a_budget_that_does_not_exist_is_refused_in_one_line(budget: float) -> None:
    for make in (lambda: universal_planner(budget, "exact"), lambda: evaluations_for(budget, 20)):
        with pytest.raises(
            ValueError, match=r"share of the dense run's FLOPs; give one in \(0, 1\]"
        ) as error:
            make()
        assert "\n" not in str(error.value) and f"{budget:g}" in str(error.value)


def test_a_target_that_does_not_exist_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^target 'sharp' is not one of dense, exact$"):
        universal_planner(0.5, "sharp")


def test_a_trace_says_where_whole_evaluations_miss_the_budget() -> None:
    def trace(requested: float, planned: int, steps: int) -> PlanTrace:
        return PlanTrace(requested, samples=2, steps=steps, planned=planned, made=planned, of=steps)

    assert trace(0.35, 7, 20).notes == [] and trace(0.35, 7, 20).spent == [0.35, 0.35]
    assert trace(0.5, 3, 7).notes == [
        "a budget of 0.5 buys 3 of 7 evaluations, which is 0.43 of the dense FLOPs"
    ]
    assert "spent 0.429 of dense FLOPs: 3 evaluations of 7, target dense\na budget of 0.5 buys 3" in (
        trace(0.5, 3, 7).summary()
    )
    assert (trace(0.5, 3, 7).num_steps, trace(0.5, 3, 7).num_calls) == (7, 7)
    assert PlanTrace(0.5).summary() == "no run yet"


# -- which steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("warp", [WARPS["dense"], (1.0, 1.0), (2.2, 1.4), (8.0, 3.0)])
def test_any_number_of_any_number_of_steps(warp: tuple[float, float]) -> None:
    """The first step, ascending, each once, never more than asked for, and all where all are asked for."""
    for steps in range(1, 61):
        for evaluations in range(1, steps + 2):
            chosen = grid_steps(steps, evaluations, *warp)
            assert chosen[0] == 0 and chosen[-1] < steps
            assert all(a < b for a, b in pairwise(chosen))
            assert len(chosen) == min(evaluations, steps)
        assert grid_steps(steps, steps, *warp) == list(range(steps))


def test_more_shift_leaves_more_steps_near_the_noise() -> None:
    middles = [grid_steps(50, 11, shift, 1.0)[5] for shift in (1.0, 1.5, 3.0)]
    assert middles[0] == pytest.approx(23, abs=1) and middles[0] > middles[1] > middles[2]
    bent, straight = grid_steps(50, 11, 1.0, 1.5), grid_steps(50, 11, 1.0, 1.0)
    assert bent[1] < straight[1] and bent[-1] > straight[-1]


@pytest.mark.parametrize("grid", [GRID, MESH_GRID], ids=["pictures", "meshes"])
def test_a_plan_for_the_dense_run_takes_its_own_times(grid: np.ndarray) -> None:
    for evaluations in range(1, len(grid)):
        plan = universal_plan(grid, evaluations, "dense")
        assert set(plan.times.tolist()) <= set(grid.tolist())
        assert plan.evaluations == min(evaluations, len(moving(grid)) - 1) and plan.is_consistent()
        assert plan.times[0] == 1 and plan.times[-1] == 0


# -- which times --------------------------------------------------------------------------------


def test_the_exact_target_is_adams_bashforth_on_shifted_times_bent() -> None:
    plan, straight = universal_plan(GRID, 7, "exact"), solver_plan(GRID, 7)
    times = shifted(resampled(GRID, 7), WARPS["exact"][0])
    assert np.allclose(plan.times, times) and np.allclose(straight.times, times)
    assert np.allclose(straight.weights, adams_bashforth(times, 2).weights) and not straight.state.any()
    assert np.abs(plan.weights[:, :2] - straight.weights).max() > 0.1
    many = universal_plan(GRID, 200, "exact")
    assert np.allclose(many.weights.sum(axis=1), 1, atol=1e-3), "it comes to the exact solution"
    assert np.abs(many.state).max() < 1e-3
    meshes = universal_plan(GRID, 7, "exact", (0.5, 1.0))
    assert np.array_equal(meshes.weights, solver_plan(GRID, 7, (0.5, 1.0)).weights)
    all_of_it = universal_planner(1.0, "exact")(GRID)
    assert all_of_it is not None and all_of_it.evaluations == 20, "the dense run is not the exact solution"


@pytest.mark.parametrize("shift", [1.0, 1.5, 2.2, 3.0, 6.0])
def test_times_that_are_shifted_already_are_moved_no_further_than_need_be(shift: float) -> None:
    """Those of large models' pipelines: what is missing is made up for, what is there is kept."""
    wanted = WARPS["exact"][0]
    own = shifted(GRID, shift)
    missing = missing_shift(own, wanted)
    assert missing == pytest.approx(max(1.0, wanted / shift), rel=1e-6)
    plan = universal_plan(own, 7, "exact")
    # the grid between its times is read as straight lines
    assert np.allclose(plan.times, shifted(resampled(GRID, 7), max(shift, wanted)), atol=0.02)
    if shift >= wanted:
        assert np.allclose(plan.times, resampled(own, 7), rtol=0, atol=1e-12)


def test_the_part_of_a_run_that_begins_at_a_picture_has_a_plan_of_its_own() -> None:
    part = GRID[8:]
    for target in ("dense", "exact"):
        plan = universal_planner(0.5, target)(part)
        assert plan is not None and plan.evaluations == 6
        assert plan.times[0] == part[0] and plan.times[-1] == 0


# -- where it goes ------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GRID, MESH_GRID], ids=["pictures", "meshes"])
def test_a_plan_with_nothing_measured_goes_where_it_is_sent(grid: np.ndarray) -> None:
    velocity, solution = decay()
    dense = follow(velocity, START, euler(moving(grid)))
    ends = {t: follow(velocity, START, universal_planner(0.5, t)(grid)) for t in ("dense", "exact")}
    goals = {"dense": dense, "exact": solution(0.0)}
    for target, other in (("dense", "exact"), ("exact", "dense")):
        near, far = ((ends[target] - goals[goal]).abs().max() for goal in (target, other))
        assert near < far / 2
    assert universal_planner(1.0, "dense")(grid) is None, "the run's own steps"
    every = universal_plan(grid, len(grid) - 1, "dense")
    assert torch.allclose(follow(velocity, START, every), dense, rtol=1e-12)


@pytest.mark.parametrize("target", ["dense", "exact"])
def test_it_beats_fewer_steps_at_the_same_price(target: str) -> None:
    velocity, solution = decay(2.0)
    goal = follow(velocity, START, euler(GRID)) if target == "dense" else solution(0.0)
    for budget in (0.25, 0.5, 0.75):
        planned, fewer = (
            float((follow(velocity, START, plan(GRID)) - goal).abs().max())
            for plan in (universal_planner(budget, target), fewer_steps(budget))
        )
        assert planned < 0.6 * fewer


def test_fewer_steps_are_the_solvers_own_at_another_number() -> None:
    plan = fewer_steps(0.5)(GRID)
    assert plan is not None and np.allclose(plan.times, np.linspace(1, 0, 11)) and plan.passes == 1
    assert fewer_steps(1.0)(GRID) is None
