"""Plans: predictions are the best linear ones, errors are what happens, and every row lands on its budget."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

import backbones
from routers.bundle import load_bundle
from routers.cost import BlockCost
from routers.planned.plan import Planner
from routers.planned.policy import SLACK, PlannedPolicy
from routers.planned.prediction import HALF, WHOLE, Moments, cubic_interpolation
from routers.policy import CallInfo, RunInfo
from routers.trace import FULL, REUSE
from tests.tiny_pipelines import make_moments

PACKAGED = Path(backbones.__file__).parent / "tiny"
BLOCKS = 12
COSTS = [BlockCost(dense=100.0 + n, mlp=40.0) for n in range(BLOCKS)]
OUTSIDE = 20.0
DENSE = OUTSIDE + sum(cost.dense for cost in COSTS)
BRANCHES = ("cond", "uncond")


def samples(moments: Moments, count: int = 4000) -> np.ndarray:
    """Deltas [count, G * S] that have these second moments."""
    root = np.linalg.cholesky(moments.gram + 1e-12 * np.eye(len(moments.gram)))
    return np.random.default_rng(0).normal(size=(count, len(root))) @ root.T


def drive(
    policy: PlannedPolicy,
    steps: int,
    budget: float,
    rows: int = 3,
    names: tuple[str, ...] = BRANCHES,
) -> tuple[np.ndarray, np.ndarray]:
    """Run a policy on a model that exists only as costs: spent ratio per row, and codes [T, G, R, N]."""
    policy.start(RunInfo(steps, budget, ((0, BLOCKS - 1),)))
    spent = {name: np.zeros(rows) for name in names}
    passes = {name: np.zeros((rows, BLOCKS), int) for name in names}
    codes = np.zeros((steps, len(names), rows, BLOCKS), np.int8)
    costs = np.array([cost.dense for cost in COSTS])
    for step, (g, name) in itertools.product(range(steps), enumerate(names)):
        call = CallInfo(
            step, name, names[: g + 1] if step == 0 else names, rows, COSTS, OUTSIDE, 0.0,
            np.minimum(passes[name], 3), spent[name].copy(),
        )  # fmt: skip
        decision = policy.decide(call, None)
        chosen = codes[step, g] = decision.actions
        spent[name] += np.where(chosen >= 0, costs, 0.0).sum(axis=1) + OUTSIDE
        assert decision.units is None or decision.weights is not None
        for first, last in decision.units or ():
            passes[name][:, first : last + 1] += (chosen[:, first : last + 1] >= 0).all(axis=1)[:, None]
    return np.sum([*spent.values()], axis=0) / (len(names) * steps * DENSE), codes


def test_weights_give_the_least_squared_error() -> None:
    """Against least squares on samples with the same moments."""
    moments = make_moments(BRANCHES, 12)
    planner, deltas = Planner(moments), samples(moments)
    for branch, step, passes in [(0, 5, (4, 3, 2)), (1, 9, (6, 5, 2)), (0, 1, (0,))]:
        known, target = deltas[:, [branch * 12 + p for p in passes]], deltas[:, branch * 12 + step]
        fitted = np.linalg.lstsq(known, target, rcond=None)[0]
        error = np.mean((known @ planner.weights(branch, step, passes) - target) ** 2)
        assert error == pytest.approx(np.mean((known @ fitted - target) ** 2), rel=0.02)


def test_predicted_error_is_the_error_of_predicting() -> None:
    """Carry a plan out on samples with the planner's moments: the mixed, weighted errors are what it said."""
    moments = make_moments(BRANCHES, 10)
    planner, deltas = Planner(moments), samples(moments)
    levels = WHOLE * np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 0], np.int8)
    total, computed = np.zeros(len(deltas)), [0]
    for step in range(1, 10):
        if levels[step]:
            computed.insert(0, step)
            continue
        passes = tuple(computed[:3])
        for branch in range(2):
            weights = planner.weights(branch, step, passes)
            guess = sum(w * deltas[:, branch * 10 + p] for w, p in zip(weights, passes, strict=True))
            off = guess - deltas[:, branch * 10 + step]
            total += moments.mixing[branch] * np.sqrt(moments.gain[step]) * off
    assert planner.error(levels) == pytest.approx(float(np.mean(total**2)), rel=0.1)


@pytest.mark.parametrize("count", range(2, 8))
def test_search_finds_nearly_the_best_choice_of_steps(count: int) -> None:
    """Against every choice of `count` out of 8 steps."""
    planner = Planner(make_moments(BRANCHES, 8))
    levels, error = planner.best(WHOLE * count)
    assert levels[0] and levels.sum() == WHOLE * count and error == pytest.approx(planner.error(levels))
    every = []
    for rest in itertools.combinations(range(1, 8), count - 1):
        choice = np.zeros(8, np.int8)
        choice[[0, *rest]] = WHOLE
        every.append(planner.error(choice))
    assert error <= 1.25 * min(every)


def test_more_steps_never_leave_more_error() -> None:
    planner = Planner(make_moments(BRANCHES, 20))
    errors = [planner.plan(k).error for k in np.arange(1, 20.01, 0.25)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("budget", [0.35, 0.4, 0.47, 0.5, 0.61, 0.7, 0.83, 0.9, 0.99])
@pytest.mark.parametrize("steps", [10, 20, 33, pytest.param(50, marks=pytest.mark.slow)])
def test_every_row_lands_on_its_budget(budget: float, steps: int) -> None:
    spent, _ = drive(PlannedPolicy(make_moments(BRANCHES, 20)), steps, budget)
    assert np.abs(spent - budget).max() <= max(SLACK, 0.51 * (100 + BLOCKS) / (steps * DENSE)) + 1e-9
    assert np.abs(spent - budget).max() <= 0.01


def test_branches_of_a_row_do_the_same() -> None:
    _, codes = drive(PlannedPolicy(make_moments(BRANCHES, 20)), 20, 0.6)
    half = (codes[:, 0] == FULL).all(axis=2) & (codes[:, 1] == REUSE).all(axis=2)
    assert ((codes[:, 0] == codes[:, 1]).all(axis=2) | half).all() and half.sum() <= 3 * 3


def test_a_partial_step_computes_the_first_blocks() -> None:
    policy = PlannedPolicy(make_moments(BRANCHES, 20))
    _, codes = drive(policy, 20, 0.515)
    partial = [c for c in codes[:, 0, 0] if (c == REUSE).any() and (c == FULL).any()]
    assert len(partial) == 1 and len(policy._units) in (2, 3)
    cut = int((partial[0] == FULL).sum())
    assert (partial[0][:cut] == FULL).all() and cut in {first for first, _ in policy._units}


def test_half_steps_stay_in_runs_that_call_both_branches() -> None:
    """The first branch alone: the same budget is met with whole steps and a partial one."""
    policy = PlannedPolicy(make_moments(BRANCHES, 20))
    spent, _ = drive(policy, 20, 0.54, names=("cond",))
    assert spent == pytest.approx(0.54, abs=0.01)
    assert policy.plan is not None and not policy.plan.split
    spent, codes = drive(policy, 20, 0.54)
    assert spent == pytest.approx(0.54, abs=0.005)
    assert policy.plan is not None and policy.plan.split and HALF in policy.plan.levels
    step = int(np.flatnonzero(policy.plan.levels == HALF)[0])
    assert (codes[step, 0] == FULL).all() and (codes[step, 1] == REUSE).all()


def test_unnamed_branches_are_known_by_their_order() -> None:
    named, unnamed = (
        drive(PlannedPolicy(make_moments(BRANCHES, 20)), 20, 0.54, names=names)[1]
        for names in (BRANCHES, ("main", "main 2"))
    )
    assert (named == unnamed).all()


def test_half_steps_lie_between_whole_ones() -> None:
    """Half a step's predicted error is what happens; a plan with one is worth its FLOPs."""
    moments = make_moments(BRANCHES, 10)
    planner, deltas = Planner(moments), samples(moments)
    for passes in range(3 * WHOLE, 9 * WHOLE, WHOLE):
        assert planner.best(passes, split=True)[1] <= planner.best(passes)[1] * (1 + 1e-6)
    levels = np.array([2, 2, 0, 2, 1, 0, 2, 0, 1, 0], np.int8)
    total, first, second = np.zeros(len(deltas)), [0], [0]
    for step in range(1, 10):
        first = [step, *first][:3] if levels[step] else first
        second = [step, *second][:3] if levels[step] == 2 else second
        if levels[step] == 2:
            continue
        known = deltas[:, [10 + p for p in second] + (first if levels[step] else [])]
        target = deltas[:, 10 + step]
        off = known @ np.linalg.lstsq(known, target, rcond=None)[0] - target
        total += moments.mixing[1] * np.sqrt(moments.gain[step]) * off
        if not levels[step]:
            known = deltas[:, first]
            off = known @ np.linalg.lstsq(known, deltas[:, step], rcond=None)[0] - deltas[:, step]
            total += moments.mixing[0] * np.sqrt(moments.gain[step]) * off
    assert planner.error(levels) == pytest.approx(float(np.mean(total**2)), rel=0.1)


def test_full_budget_computes_everything_and_reads_nothing() -> None:
    policy = PlannedPolicy(make_moments(BRANCHES, 20))
    spent, codes = drive(policy, 20, 1.0)
    assert (codes == FULL).all() and spent == pytest.approx(1.0)
    assert not policy.reads_routers
    nothing = np.zeros((1, BLOCKS), int)
    call = CallInfo(0, "cond", ("cond",), 1, COSTS, OUTSIDE, 0.0, nothing, np.zeros(1))
    assert policy.decide(call, None).depth == 0, "a dense run pays for no cache"


def test_moments_are_interpolated_to_other_step_counts() -> None:
    moments = make_moments(BRANCHES, 20)
    assert moments.at(20) is moments
    double = moments.at(39)  # every second step is a calibrated one
    assert double.gram[np.ix_(range(0, 39, 2), range(0, 39, 2))] == pytest.approx(moments.gram[:20, :20])
    assert np.linalg.eigvalsh(double.gram).min() > -1e-9
    assert double.gain[0] == pytest.approx(moments.gain[0] * (20 / 39) ** 2)


PLANS = {
    "qwen_image": "2fa43cc1874c81a50d7ce17f2d390b582a0d983bb043cc72cce6d715565cd15d",
    "flux": "8770daf7f6f793d986a21fc4f07a244c3988eb1917c3747f4f65a26406ebc71b",
    "hunyuan3d": "ba02227ce43b8aaf2a65947c5ccb6fa74e13ad964ecc7c0951174fd8d3e59659",
}
"""sha256 over the packaged bundles' plans at every budget: a search that is rearranged must find the same."""


@pytest.mark.parametrize("model", PLANS)
def test_packaged_plans_stay_what_they_are(model: str) -> None:
    folder, plans = PACKAGED / f"{model}_tiny" / "routers", hashlib.sha256()
    moments = load_bundle(folder).moments
    for steps in (8, 12, 20):
        planner = Planner(moments.at(steps))
        for computed in np.arange(1, steps + 0.001, 0.25):
            for split in (False, True)[: len(moments.branches)]:
                plan = planner.plan(float(computed), split)
                plans.update(plan.levels.tobytes() + repr((plan.partial, plan.fraction)).encode())
    assert plans.hexdigest() == PLANS[model]


@pytest.mark.parametrize(("known", "degree"), [(3, 1), (4, 3), (9, 3)])
def test_interpolation_is_exact_for_polynomials(known: int, degree: int) -> None:
    at = np.linspace(0, 1, known)
    fine = np.linspace(0, 1, 3 * known + 1)
    for power in range(degree + 1):
        assert cubic_interpolation(known, len(fine)) @ at**power == pytest.approx(fine**power)
