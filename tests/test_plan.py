"""The budget: plans are optimal under their own model, and every row lands on what was asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from routers.cost import BlockCost
from routers.plan import BranchCosts, BranchErrors, ErrorTables, solve
from routers.planned import PlannedPolicy
from routers.policy import CallInfo, RunInfo
from routers.spec import WIDTHS
from routers.trace import FULL, REUSE, SKIP

BLOCKS = 12
COSTS = [BlockCost(dense=100.0 + n, mlp=40.0) for n in range(BLOCKS)]


def tables(steps: int = 20, blocks: int = BLOCKS, seed: int = 0) -> ErrorTables:
    """Errors that look like a diffusion transformer's: early steps matter more, older deltas are worse."""
    random = np.random.default_rng(seed)
    shape = (2, steps, blocks)
    gain = np.exp(-0.3 * np.arange(steps))[None, :, None] * random.uniform(0.5, 2, shape)
    age = np.arange(1, 5.0) ** 2
    reuse = random.uniform(0.5, 2, shape)[..., None] * age * 1e-3
    width = random.uniform(0.5, 2, shape)[..., None] * np.array([0.3, 0.1, 0.03])
    return ErrorTables(("cond", "uncond"), reuse, width, random.uniform(5, 20, shape), gain)


def branch_costs() -> BranchCosts:
    blocks = np.array([[cost.at(w) for w in WIDTHS] for cost in COSTS])
    return BranchCosts(blocks, outside=20.0, dense=20.0 + blocks[:, FULL].sum())


def drive(
    policy: PlannedPolicy, steps: int, budget: float, logits: np.ndarray | None = None, rows: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Run a policy on a model that exists only as costs: spent ratio per row, and codes [T, G, R, N]."""
    policy.start(RunInfo(BLOCKS, steps, budget))
    costs, names = branch_costs(), ("cond", "uncond")
    spent = {name: np.zeros(rows) for name in names}
    passes = {name: np.zeros((rows, BLOCKS), int) for name in names}
    codes = np.zeros((steps, 2, rows, BLOCKS), np.int8)
    for step, (g, name) in itertools.product(range(steps), enumerate(names)):
        seen = names[: g + 1] if step == 0 else names
        call = CallInfo(
            step, name, seen, rows, COSTS, costs.outside, 0.0, np.minimum(passes[name], 2),
            spent[name].copy(), np.full(rows, step * costs.dense),
        )  # fmt: skip
        chosen = policy.decide(call, None if logits is None or step == 0 else logits[step, g])
        codes[step, g] = chosen
        price = np.where(chosen >= 0, costs.blocks[np.arange(BLOCKS), np.maximum(chosen, 0)], 0.0)
        spent[name] += price.sum(axis=1) + costs.outside
        passes[name] += chosen >= 0
    return (spent["cond"] + spent["uncond"]) / (2 * steps * costs.dense), codes


def test_plan_is_optimal_under_its_own_model() -> None:
    """Against every sequence of actions of one block: nothing has less error plus price."""
    random = np.random.default_rng(3)
    steps, ages = 5, 8
    errors = BranchErrors(
        np.sort(random.uniform(0.1, 1, (steps, 1, ages)), axis=2),
        np.sort(random.uniform(0.05, 0.5, (steps, 1, 3)), axis=2)[..., ::-1].copy(),
        random.uniform(0.5, 2, (steps, 1)),
    )
    costs = BranchCosts(np.array([[40.0, 60.0, 80.0, 100.0]]), outside=0.0, dense=100.0)
    for budget in (0.4, 0.6, 0.8):
        plan = solve({"main": errors}, {"main": costs}, budget, first_dense=True)["main"]

        def objective(codes: tuple[int, ...], lam: float = plan.lam) -> float:
            total, age = 0.0, 0
            for t, code in enumerate(codes):
                if code >= 0:
                    total += lam * costs.blocks[0, code] + (errors.width[t, 0, code] if code < FULL else 0.0)
                    age = 0
                else:
                    total += errors.reuse[t, 0, min(age, ages - 1)] if code == REUSE else errors.skip[t, 0]
                    age += 1
            return total

        every = itertools.product(range(SKIP, FULL + 1), repeat=steps - 1)
        best = min(objective((FULL, *rest)) for rest in every)
        assert objective(tuple(int(c) for c in plan.codes[:, 0])) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("steps", [4, 10, 20, 50])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.6, 0.85])
def test_targets_add_up_to_the_budget(budget: float, steps: int) -> None:
    found = tables()
    errors = {name: found.at(name, steps) for name in found.branches}
    costs = dict.fromkeys(errors, branch_costs())
    plans = solve(errors, costs, budget, first_dense=True)
    total = sum(plan.cumulative[-1] for plan in plans.values()) / (2 * steps * branch_costs().dense)
    assert total == pytest.approx(budget, abs=1e-6)


def test_more_budget_never_means_more_predicted_error() -> None:
    found = tables()
    errors = {name: found.at(name, 20) for name in found.branches}
    costs = dict.fromkeys(errors, branch_costs())
    predicted = []
    for budget in np.linspace(0.3, 0.95, 14):
        plans = solve(errors, costs, float(budget), first_dense=True)
        blocks = costs["cond"].blocks
        total = 0.0
        for plan in plans.values():
            price = np.where(plan.codes >= 0, blocks[np.arange(BLOCKS), np.maximum(plan.codes, 0)], 0.0)
            total += plan.value[1, :, 0].sum() - plan.lam * price[1:].sum()
        predicted.append(total)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(predicted))
    assert predicted[-1] < 0.1 * predicted[0]


@pytest.mark.parametrize("steps", [10, 20, 40])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.6, 0.85, 0.97])
@pytest.mark.parametrize("routed", [False, True])
def test_every_row_lands_on_its_budget(budget: float, steps: int, routed: bool) -> None:
    logits = np.random.default_rng(1).normal(0, 1.5, (steps, 2, 3, BLOCKS, 5)).astype(np.float32)
    policy = PlannedPolicy(tables(), per_sample=routed)
    spent, codes = drive(policy, steps, budget, logits if routed else None)
    assert np.abs(spent - budget).max() <= 0.01
    if routed:
        assert (codes[:, :, 0] != codes[:, :, 1]).any(), "different samples must decide differently"


def test_rows_decide_for_themselves() -> None:
    logits = np.random.default_rng(2).normal(0, 1, (20, 2, 3, BLOCKS, 5)).astype(np.float32)
    _, together = drive(PlannedPolicy(tables()), 20, 0.5, logits)
    for row in range(3):
        _, alone = drive(PlannedPolicy(tables()), 20, 0.5, logits[:, :, row : row + 1], rows=1)
        assert (alone[:, :, 0] == together[:, :, row]).all()


def test_a_router_that_sees_more_error_gets_more_compute() -> None:
    logits = np.zeros((20, 2, 3, BLOCKS, 5), np.float32)
    logits[:, :, 0, :6, 0], logits[:, :, 0, 6:, 0] = 2.0, -2.0
    _, codes = drive(PlannedPolicy(tables()), 20, 0.5, logits)
    computed = (codes >= 0).sum(axis=(0, 1))
    assert computed[0, :6].sum() > 1.2 * computed[1, :6].sum()
    assert computed[0, 6:].sum() < 0.8 * computed[1, 6:].sum()


def test_batch_mean_gives_every_row_the_same_decisions() -> None:
    logits = np.random.default_rng(4).normal(0, 1.5, (20, 2, 3, BLOCKS, 5)).astype(np.float32)
    _, codes = drive(PlannedPolicy(tables(), batch_mean=True), 20, 0.5, logits)
    assert (codes == codes[:, :, :1]).all()


def test_full_budget_computes_everything_and_reads_nothing() -> None:
    policy = PlannedPolicy(tables())
    spent, codes = drive(policy, 20, 1.0)
    assert (codes == FULL).all() and spent == pytest.approx(1.0)
    assert not policy.reads_routers and policy.cache_depth == 0


def test_tables_are_interpolated_to_other_step_counts() -> None:
    found = tables(steps=20)
    same, double = found.at("cond", 20), found.at("cond", 40)
    assert same.skip == pytest.approx(found.skip[0] * found.gain[0])
    # with twice the steps a delta two steps old is as old as one step was
    assert double.reuse[0, :, 1] == pytest.approx(same.reuse[0, :, 0])
    assert (np.diff(double.reuse, axis=2) >= 0).all()
