"""Caches written from their papers: what their formulas must give on series that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import forecasts
from benchmarks.forecasts import _EasyCache, even, forecast_plan
from routers.planned.closed_loop import Trajectory
from routers.planned.follow import follow
from routers.planned.timeplan import adams_bashforth

GRID = np.linspace(1, 0, 13)


def test_the_line_through_the_last_two_outputs_is_what_our_own_weights_are() -> None:
    steps = even(12, 5)
    plan = forecast_plan(GRID, steps, forecasts.linear)
    expected = adams_bashforth(GRID[[*steps, -1]], 2, GRID)
    assert np.array_equal(plan.times, expected.times)
    assert np.allclose(plan.weights[:, :2], expected.weights) and not plan.weights[:, 2:].any()


@pytest.mark.parametrize("predict", [forecasts.hold, forecasts.spectrum, forecasts.hicache])
def test_a_constant_output_is_continued(predict) -> None:
    plan = forecast_plan(GRID, [0, 3, 6, 9], predict)
    assert np.allclose(plan.weights.sum(axis=1), 1)


def test_hicache_contracts_what_taylor_would_add() -> None:
    """sigma H_1(sigma k) = 2 sigma^2 k: half of the slope, with sigma 0.5; no constant part in order one."""
    assert forecasts.hicache(np.array([3.0, 0.0]), 6, 12) == pytest.approx([1.5, -0.5])


def test_spectrum_follows_a_smooth_series_that_a_line_does_not() -> None:
    known = np.arange(8.0)[::-1]
    series, there = np.cos(known / 4), np.cos(8 / 4)
    errors = [abs(p(known, 8, 16) @ series - there) for p in (forecasts.spectrum, forecasts.hold)]
    assert errors[0] < errors[1]


def test_exponentials_are_continued_exactly() -> None:
    directions = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double()
    rates = torch.tensor([0.95, 0.8, 0.6], dtype=torch.float64)

    def output(step: float) -> torch.Tensor:
        return (rates[:, None] ** step * directions).sum(dim=0)[None]

    plan = forecasts.Exponentials(GRID, [0, 2, 4, 6])
    outputs = [output(step) for step in (6, 4, 2, 0)]
    row, _ = plan.row(3, outputs[0], outputs)
    made = sum(weight * v for weight, v in zip(row, outputs, strict=True))
    expected = sum(output(step) for step in range(6, 12)) / 6
    assert torch.allclose(made, expected, atol=1e-4)
    few, _ = plan.row(1, outputs[2], outputs[2:])
    assert np.allclose(few, forecast_plan(GRID, [0, 2, 4, 6], forecasts.linear).weights[1, :2])


def test_a_velocity_whose_parts_go_along_lines_is_followed() -> None:
    """v = a x + b e with a and b linear in time and e fixed: what VDE assumes."""
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    e = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)

    def velocity(time: float, at: torch.Tensor) -> torch.Tensor:
        return (0.3 + 0.2 * time) * at + (1 - 0.5 * time) * e

    plan = forecasts.Decomposed(GRID, [0, 1])
    plan._sizes = [(0.5, 0.5)]
    start, reached = x, x
    for step in range(1, 12):  # Euler's steps, the parts as the assumption has them at the second evaluation
        along, rest = 0.3 + 0.2 * GRID[step], 1 - 0.5 * GRID[step]
        reached = reached + (GRID[step + 1] - GRID[step]) * (along * reached + rest * e)
    row, state = plan.row(1, start, [velocity(GRID[1], start)])
    ours = start + (GRID[-1] - GRID[1]) * (row[0] * velocity(GRID[1], start) + state * start)
    assert torch.allclose(ours, reached, atol=1e-9)


def recorded_path(samples: int = 2) -> Trajectory:
    """A run whose output bends at its end: late steps matter."""
    way = torch.randn(2, samples, 30, generator=torch.Generator().manual_seed(1))
    outputs = [way[0] + way[1] * (step / 12) ** 4 * 5 for step in range(12)]
    states = [torch.zeros(samples, 30)]
    for step, v in enumerate(outputs):
        states.append(states[-1] + float(GRID[step + 1] - GRID[step]) * v)
    return Trajectory(GRID.tolist(), states, outputs)


def test_learned_weights_end_where_the_recorded_run_does() -> None:
    path, steps = recorded_path(), [0, 2, 5, 8]
    plans = {
        name: forecast_plan(GRID, steps, predict)
        for name, predict in (("l2p", forecasts.learned(path, GRID, steps)), ("linear", forecasts.linear))
    }
    at = dict(zip(path.times, path.velocities, strict=False))
    ends = {n: follow(lambda _, time: at[time], path.states[0], plan) for n, plan in plans.items()}
    errors = {name: float((end - path.states[-1]).square().mean()) for name, end in ends.items()}
    assert errors["l2p"] < 0.01 * errors["linear"]


def test_the_shortest_path_and_the_embedding_go_where_outputs_change() -> None:
    steps = forecasts.shortest_path(recorded_path(), GRID, 5)
    assert steps[0] == 0 and len(steps) == 5 and np.mean(steps[1:]) > np.mean(even(12, 5)[1:])
    chosen = forecasts.least_changed(np.array([1.0, 0.99, 0.98, 0.5, 0.2, 0.0]), 3)
    assert chosen == [0, 3, 4], "the times that are far from the ones before"


def test_easy_cache_adds_what_it_added_until_the_change_is_too_large() -> None:
    cache, made = _EasyCache(0.5, 10), []

    def model(x: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return 2 * x

    for step in range(10):
        x = torch.full((1, 4), 1 + 0.1 * step)
        before = len(made)
        output = cache.forward(model, x)
        if len(made) == before:
            assert torch.allclose(output - x, cache.added["main"]) and 1 < step < 9
    assert 3 <= len(made) < 10
    exact = _EasyCache(0.0, 10)
    for x in torch.rand(10, 1, 4):
        assert torch.equal(exact.forward(model, x), 2 * x)
