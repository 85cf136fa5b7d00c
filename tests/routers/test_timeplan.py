"""A plan in continuous time: what it is exact for, special cases, file form; fits in closed loop."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from routers.planned import timeplan
from routers.planned.bends import BENDS, bent
from routers.planned.choose_times import CANDIDATES, FREE, choose, fit
from routers.planned.closed_loop import FitSettings, Recording, StageFit, Trajectory, mean_snr, solve_weights
from routers.planned.flow import Point
from routers.planned.follow import follow
from routers.planned.refine import refine
from routers.planned.timeplan import TimePlan, adams_bashforth, euler, resampled, shifted
from routers.planned.universal import solver_plan, universal_plan

TIMES = shifted(np.linspace(1, 0, 9), 2.2)
START = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def polynomial(degree: int):
    """v of a degree in time, the same for every x, and its solution from time 1."""
    factors = torch.tensor([0.7, -1.1, 0.4, 2.0], dtype=torch.float64)[: degree + 1]

    def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
        return torch.full_like(x, sum(float(f) * s**k for k, f in enumerate(factors)))

    def solution(s: float) -> torch.Tensor:
        return START + sum(float(f) * (s ** (k + 1) - 1) / (k + 1) for k, f in enumerate(factors))

    return velocity, solution


def decay(rate: float = 1.5):
    """dx/ds = rate x, and its solution from time 1."""
    return lambda x, s: rate * x, lambda s: START * np.exp(rate * (s - 1))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_continues_a_polynomial_of_its_order_exactly(order: int) -> None:
    velocity, solution = polynomial(order - 1)
    plan = adams_bashforth(TIMES, order)
    first = order - 1  # the first steps have too few outputs: start them from the solution
    x = START
    outputs: list[torch.Tensor] = []
    for step, (s, t) in enumerate(pairwise(TIMES)):
        x = solution(s) if step <= first else x
        outputs = [velocity(x, s), *outputs]
        used = zip(plan.weights[step], outputs, strict=False)
        x = x + (t - s) * sum(w * v for w, v in used)
    assert torch.allclose(x, solution(0.0), atol=1e-12)
    assert not order > 1 or not torch.allclose(
        follow(velocity, START, euler(TIMES)), solution(0.0), atol=1e-3
    )


def test_second_order_is_more_exact_than_euler() -> None:
    velocity, solution = decay()
    errors = {
        order: float((follow(velocity, START, adams_bashforth(TIMES, order)) - solution(0.0)).abs().max())
        for order in (1, 2, 3)
    }
    assert errors[1] > 3 * errors[2] > 3 * errors[3]


def test_what_makes_no_plan_is_refused() -> None:
    for times, weights, what in (
        ([1, 0.5, 0.5], np.ones((2, 1)), "decrease"),
        ([1, 0], np.ones((2, 1)), "make a plan"),
        ([1, 0], np.ones((1, 2)), "first evaluation"),
        ([1, 0], np.full((1, 1), np.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=what):
            TimePlan(np.array(times, float), weights)
    with pytest.raises(ValueError, match="'state'"):
        TimePlan.from_arrays({"times": [1, 0], "weights": [[1]]})


def test_arrays_hold_the_whole_plan() -> None:
    plan = TimePlan(TIMES, adams_bashforth(TIMES, 3).weights, np.linspace(0, 0.1, 8))
    again = TimePlan.from_arrays({name: array.tolist() for name, array in plan.to_arrays().items()})
    assert all(np.array_equal(a, again.to_arrays()[name]) for name, a in plan.to_arrays().items())
    assert not plan.is_consistent() and adams_bashforth(TIMES, 3).is_consistent()


def test_a_plan_begun_later_forgets_what_came_before_and_stays_consistent() -> None:
    whole = adams_bashforth(TIMES, 3)
    begun = whole.begun_at(2)
    assert begun.is_consistent() and np.array_equal(begun.times, TIMES)
    assert np.allclose(begun.weights[2], [1, 0, 0]) and not begun.weights[3, 2]
    assert np.array_equal(begun.weights[4:], whole.weights[4:])


def test_adams_bashforth_on_a_grid_sums_eulers_steps() -> None:
    grid = np.linspace(1, 0, 9)
    assert np.allclose(adams_bashforth(grid, 2, grid).weights, [[1, 0]] * 8)
    times = grid[[0, 2, 5, 8]]
    velocity, _ = polynomial(1)
    whole, few = (
        follow(velocity, START, euler(grid)),
        follow(velocity, START, adams_bashforth(times, 2, grid)),
    )
    first = follow(velocity, START, euler(grid[:3])) - follow(
        velocity, START, euler(times[:2])
    )  # Euler's own
    assert torch.allclose(whole - first, few, atol=1e-12)


def test_times_of_a_grid_at_other_steps_and_shifts() -> None:
    grid = np.append(np.linspace(1, 0, 21), 0.0)  # Hunyuan3D's last step goes nowhere
    assert np.allclose(resampled(grid, 4), [1, 0.75, 0.5, 0.25, 0])
    assert np.array_equal(timeplan.moving(grid), grid[:-1])
    moved = shifted(np.array([0.8, 0.4, 0.2]), 2.0)
    assert moved[0] == pytest.approx(0.8) and moved[-1] == pytest.approx(0.2) and moved[1] > 0.4


# -- fitting ------------------------------------------------------------------------------------


def exact(solution) -> Trajectory:
    return Trajectory(TIMES.tolist(), [solution(s).float() for s in TIMES])


def test_fitted_weights_reach_the_target_where_outputs_can() -> None:
    """v is linear in x: one weight per step is enough, and one sample tells it for all."""
    velocity, solution = decay()
    target = Trajectory(TIMES.tolist(), [solution(s)[:1].float() for s in TIMES])
    fit = StageFit(TIMES, target, FitSettings(ridge=1e-12))
    fitted = follow(velocity, START, fit)
    assert torch.allclose(fitted, solution(0.0), atol=1e-5)
    assert torch.allclose(follow(velocity, START, fit.plan), fitted, atol=1e-6)
    assert not torch.allclose(follow(velocity, START, adams_bashforth(TIMES)), solution(0.0), atol=1e-3)


def test_the_state_is_one_more_regressor() -> None:
    """x that shrinks along with a constant v cannot be followed by weights of v alone."""
    target = exact(lambda s: START * (1 + s) / 2)
    ends = {}
    for state in (False, True):
        fit = StageFit(TIMES, target, FitSettings(passes=1, state=state, ridge=1e-12))
        ends[state] = follow(lambda x, s: torch.ones_like(x), START, fit)
        assert fit.plan.state.any() == state
    assert torch.allclose(ends[True], START / 2, atol=1e-5)
    assert not torch.allclose(ends[False], START / 2, atol=0.1)


def test_consistent_weights_keep_their_sum() -> None:
    velocity, solution = decay()
    fits = {order: StageFit(TIMES, exact(solution), FitSettings(order=order)) for order in (0, 1, 2)}
    for stages in fits.values():
        follow(velocity, START, stages)
    assert not fits[0].plan.is_consistent() and fits[1].plan.is_consistent() and fits[2].plan.is_consistent()
    linear, line = polynomial(1)
    drift = {
        k: float((follow(linear, START, stages.plan) - line(0.0)).abs().max()) for k, stages in fits.items()
    }
    first = float(
        (follow(linear, START, adams_bashforth(TIMES)) - line(0.0)).abs().max()
    )  # Euler's first step
    assert drift[2] == pytest.approx(first, abs=1e-6) and drift[1] > 2 * first


def test_a_ridge_holds_weights_that_nothing_tells_apart_at_the_prior() -> None:
    gram, prior_weights = np.ones((2, 2)), np.array([1.6, -0.6])
    solved = solve_weights(gram, np.array([1.0, 1.0]), prior_weights, 1e-9, np.zeros((0, 2)))
    assert np.allclose(solved, prior_weights, atol=1e-6)
    assert np.allclose(
        solve_weights(gram, 2 * np.ones(2), prior_weights, 1e-9, np.zeros((0, 2))).sum(), 2, atol=1e-6
    )


def test_a_recorded_run_is_known_between_its_times() -> None:
    velocity, solution = decay()
    recording = Recording(adams_bashforth(np.linspace(1, 0, 201), 3), samples=1)
    end, record = follow(velocity, START, recording), recording.trajectory
    assert torch.equal(record.states[-1], end[:1].float()) and len(record.times) == 201
    record.states = [solution(s) for s in record.times[::8]]
    record.velocities = [velocity(x, s) for s, x in zip(record.times[::8], record.states, strict=True)][:-1]
    record.times = record.times[::8]
    straight = Trajectory(record.times, record.states)
    for s in (1.0, 0.777, 0.504, 0.003, 0.0):
        assert torch.allclose(record.at(s), solution(s), atol=1e-4)
    middle = (record.times[7] + record.times[8]) / 2
    curved, lines = ((r.at(middle) - solution(middle)).abs().max() for r in (record, straight))
    assert curved < lines / 100


def fine_run(rate: float) -> Trajectory:
    velocity, solution = decay(rate)
    times = np.linspace(1, 0, 201).tolist()
    states = [solution(s) for s in times]
    return Trajectory(times, states, [velocity(x, s) for s, x in zip(times, states, strict=True)])


def test_the_warp_that_ends_nearest_is_kept() -> None:
    """dx/ds = 6 x: most happens near the noise, so the more times are moved there, the better."""
    velocity, solution = decay(6.0)
    grid, warps = np.linspace(1, 0, 17), [(1.0, 1.0), (3.0, 1.0), (1.7, 1.0)]

    def run(plan: object) -> None:
        follow(velocity, START, plan)

    fitted = choose(run, fine_run(6.0), grid, 7, "exact", warps)
    assert next(iter(fitted)) == (3.0, 1.0) and len(fitted) == 3
    for (shift, _), each in fitted.items():
        assert np.allclose(each.plan.times, shifted(resampled(grid, 7), shift))
        end = follow(velocity, START, each.plan)
        assert each.snr == pytest.approx(mean_snr(end, solution(0.0)), abs=0.1)


def test_warps_that_give_the_same_times_are_run_once() -> None:
    runs: list[object] = []

    def run(plan: object) -> None:
        runs.append(plan)
        follow(decay()[0], START, plan)

    warps = CANDIDATES["dense"]
    assert len(choose(run, fine_run(1.5), np.linspace(1, 0, 5), 4, "dense", warps)) == len(runs) == 1
    assert len(choose(run, fine_run(1.5), np.linspace(1, 0, 21), 7, "dense", warps)) == len(runs) - 1 > 2


def test_fitted_weights_end_nearer_than_the_universal_ones() -> None:
    velocity, _ = decay(3.0)
    grid, recording = np.linspace(1, 0, 13), Recording(euler(np.linspace(1, 0, 13)))
    follow(velocity, START, recording)
    goal = recording.trajectory
    goal.velocities = []  # pieces of it are straight
    near = universal_plan(grid, 4, "dense")
    fitted = fit(lambda plan: follow(velocity, START, plan), near, goal, FREE)
    before = mean_snr(follow(velocity, START, near), goal.states[-1])
    assert fitted.snr > before + 6 and np.array_equal(fitted.plan.times, near.times)


# -- plans bent as a whole ----------------------------------------------------------------------


def two_points(x: torch.Tensor, s: float) -> torch.Tensor:
    """The flow to data at -a or a, of another a in each column."""
    a, s = torch.tensor([0.15, 0.5, 1.0, 1.7], dtype=torch.float64), max(s, 1e-3)
    mean = a * torch.tanh((1 - s) * a * x / s**2)
    return (x - (1 - s) * mean) / s - mean


def test_a_bend_of_one_plan_serves_other_samples_and_other_numbers_of_evaluations() -> None:
    noise = torch.randn(2, 6, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known, other = noise
    grid = np.linspace(1, 0, 21)
    exact = [follow(two_points, x, solver_plan(grid, 400)) for x in (known, other)]
    runs: list[TimePlan] = []

    def ends(plan: TimePlan) -> torch.Tensor:
        runs.append(plan)
        return follow(two_points, known, plan)

    near = solver_plan(grid, 7)
    found = refine(near, ends, exact[0], rounds=2)
    assert found.runs == len(runs) <= 1 + 2 * 13
    assert found.error == pytest.approx(-mean_snr(ends(bent(near, found.numbers, 7)), exact[0]), abs=0.01)
    for evaluations in (5, 7, 12):
        plan = solver_plan(grid, evaluations)
        before, after = (
            mean_snr(follow(two_points, other, p), exact[1]) for p in (plan, bent(plan, found.numbers, 7))
        )
        assert after > before + 3


def test_a_bend_of_nothing_is_adams_bashforths_plan_and_is_kept_if_nothing_is_nearer() -> None:
    plan = solver_plan(np.linspace(1, 0, 13), 5)
    same = bent(plan, np.zeros(BENDS), 8)
    assert np.allclose(same.times, plan.times) and np.allclose(same.weights[:, :2], plan.weights)
    goal = follow(decay()[0], START, plan)
    found = refine(plan, lambda p: follow(decay()[0], START, p), goal, rounds=2)
    assert not found.numbers.any() and found.error < -80


# -- other schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_euler_step_of_the_flow_is_ddims_step(kind: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    output = torch.randn(START.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, after = scheduler.timesteps[4:6]
    here, there = (
        Point(float(a) ** 0.5, (1 - float(a)) ** 0.5)
        for a in scheduler.alphas_cumprod[[int(t), int(after)]].double()
    )
    y = here.to_flow(START) + (there.time - here.time) * here.velocity(output, START, kind)
    ddim = scheduler.step(output, t, START).prev_sample
    assert torch.allclose(there.from_flow(y), ddim, atol=1e-5)


def test_a_flow_model_gives_the_velocity_itself_and_odd_points_are_refused() -> None:
    assert Point(0.4, 0.6).velocity(START, START, "flow_prediction") is START
    assert Point(0.4, 0.6).time == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no direction"):
        Point(0.0, 1.0).velocity(START, START, "epsilon")
    with pytest.raises(ValueError, match="no point"):
        Point(0.0, 0.0)
