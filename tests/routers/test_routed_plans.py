"""Plans x routers: few evaluations, of each a share as trained routers choose, from the first call on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones.hunyuan3d.family import TRANSFORMER_2
from backbones.workloads import MeshWorkload
from routers.attachment import architecture, fingerprint
from routers.bundle import Bundle
from routers.calibrate.fit import fit
from routers.calibrate.settings import FitSettings
from routers.cost import BlockCost
from routers.meta import count_flops
from routers.planned.narrow import NarrowPlan
from routers.planned.sampled import Sampled
from routers.planned.scheduler import elastic_scheduler
from routers.planned.timeplan import TimePlan, euler, moving, resampled
from routers.policy import CallInfo, RunInfo
from routers.spec import WIDTHS
from routers.trace import FULL, REUSE, SKIP
from routers.trained.backbone import BackboneWeights
from routers.trained.bundle import Trained
from routers.trained.policy import Profile, TrainedPolicy
from routers.trained.router import BudgetRouter
from routers.watch.planned import WatchedPlan
from tests.tiny_workloads import mesh_workload

STEPS, BUDGETS = 5, np.array([0.25, 1.0])


@pytest.fixture(scope="module")
def workload() -> MeshWorkload:
    return replace(mesh_workload(), num_steps=STEPS)


def random_routers(workload: MeshWorkload) -> Trained:
    """Routers that say something else for every sample and block."""
    torch.manual_seed(0)
    elastic = routers.attach(workload.pipe.transformer, spec=TRANSFORMER_2)
    blocks, dim = len(elastic.blocks), 32
    elastic.detach()
    made = [BudgetRouter(dim, dim, 4).requires_grad_(False) for _ in range(blocks)]
    for parameter in (p for router in made for p in router.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    first = np.random.default_rng(0).normal(size=(2, blocks, 1 + len(WIDTHS)))
    profile = Profile(BUDGETS, np.tile(BUDGETS[:, None], (1, STEPS)), first)
    return Trained([router.state_dict() for router in made], profile, np.full(blocks, 0.3))


@pytest.fixture(scope="module")
def trained(workload: MeshWorkload) -> Trained:
    return random_routers(workload)


def times_of(workload: MeshWorkload) -> np.ndarray:
    """The run's own."""
    seen: list[np.ndarray] = []
    with elastic_scheduler(workload.pipe, seen.append):
        workload.run(0)
    return seen[-1]


def bundle_of(workload: MeshWorkload, trained: Trained, *narrow: NarrowPlan) -> Bundle:
    transformer, grid = workload.pipe.transformer, times_of(workload)
    return Bundle(
        TRANSFORMER_2, "random", architecture(transformer), fingerprint(transformer), STEPS, 5.0,
        times=grid.tolist(), plans={"dense": {2: euler(resampled(moving(grid), 2))}},
        narrow={"dense": [*narrow]}, trained=trained,
    )  # fmt: skip


def three(workload: MeshWorkload) -> TimePlan:
    """Three evaluations."""
    return euler(resampled(moving(times_of(workload)), 3))


def call(step: int, available: int, rows: int = 2, blocks: int = 3) -> CallInfo:
    return CallInfo(
        step, "main", ("main",), rows, [BlockCost(1.0, 0.5)] * blocks, 0.0, 0.0,
        np.full((rows, blocks), available), np.zeros(rows),
    )  # fmt: skip


def test_the_first_call_follows_the_profile_and_closed_blocks_without_a_past_add_nothing() -> None:
    first = np.zeros((2, 3, 5))
    first[0, :, 0], first[0, :, 4] = [2.0, -2.0, 1.0], 1.0
    profile = Profile(np.array([0.6, 1.0]), np.full((2, 2), 0.7), first)
    policy = TrainedPolicy(profile, np.zeros(3))
    policy.start(RunInfo(2, 0.6))
    actions = policy.decide(call(0, 0), None).actions
    assert (actions[:, [0, 2]] >= 0).all() and (actions[:, 1] == SKIP).all()
    policy = TrainedPolicy(replace(profile, first=None), np.zeros(3))
    policy.start(RunInfo(2, 0.6))
    assert (policy.decide(call(0, 0), None).actions == FULL).all(), "as bundles of before do"
    assert profile.at(0.6, 2)[0] == 0.7 and replace(profile, first=None).at(0.6, 2)[0] == 1.0


def test_within_a_plan_routers_hear_its_budget_and_count_its_evaluations() -> None:
    profile = Profile(np.array([0.3, 1.0]), np.array([[0.5, 0.5], [1.0, 1.0]]))
    policy = TrainedPolicy(profile, np.zeros(3), within=(2, 0.5))
    policy.start(RunInfo(20, 1.0))
    assert policy.told == 0.5 and policy.reads_routers
    logits = np.zeros((2, 3, 5), np.float32)
    assert (policy.decide(call(3, 0), None).actions == FULL).all()
    spent = replace(call(11, 1), spent=np.full(2, 3.0))
    assert (policy.decide(spent, logits).actions == REUSE).all(), "the first call took all that two may"


def test_a_bundle_holds_both(workload: MeshWorkload, trained: Trained, tmp_path: Path) -> None:
    plan = NarrowPlan(three(workload), 0.3, 0.5, 0.5)
    bundle = bundle_of(workload, trained, plan)
    bundle.save(tmp_path / "b")
    again = routers.load_bundle(tmp_path / "b")
    assert again.trained is not None and not again.decides and again.narrow["dense"][0].ratio == 0.5
    assert np.array_equal(again.trained.profile.first, trained.profile.first)
    with_weights = replace(trained, backbone=BackboneWeights("full", {"x": torch.zeros(1)}))
    bundle_of(workload, with_weights, plan).save(tmp_path / "c")
    with pytest.raises(ValueError, match="plans are made for the model's own"):
        routers.load_bundle(tmp_path / "c")
    arrays = {**plan.to_arrays(), "serves": np.array([0.3, 0.5, 1.5])}
    with pytest.raises(ValueError, match=r"routers spend 1\.5 of its evaluations"):
        NarrowPlan.from_arrays(arrays)


def test_routers_decide_over_the_evaluations_of_a_plan(workload: MeshWorkload, trained: Trained) -> None:
    dense, whole = workload.run(0), count_flops(workload.run, 0)
    bundle = bundle_of(workload, trained, NarrowPlan(three(workload), 0.3, 0.5, 0.5))
    sampled = routers.attach(workload.pipe, bundle, budget=0.35)
    assert isinstance(sampled, Sampled) and sampled.evaluations(STEPS) == 3
    with sampled.scope(samples=workload.rows) as trace:
        workload.run(0)
    assert trace.made == 3 and trace.spent == pytest.approx([0.3] * workload.rows, abs=0.03)
    assert "of each 0.5 as its routers choose" in trace.notes[0]
    with sampled.scope(samples=workload.rows):
        assert count_flops(workload.run, 0) < 0.6 * whole
    rows = trace.blocks.calls[1].actions
    assert (rows[0] != rows[1]).any(), "samples go their own ways"
    with sampled.scope(budget=1.0):
        assert torch.equal(workload.run(0), dense)
    sampled.detach()
    assert torch.equal(workload.run(0), dense)


def test_a_profile_sees_what_they_decide(workload: MeshWorkload, trained: Trained) -> None:
    bundle = bundle_of(workload, trained, NarrowPlan(three(workload), 0.3, 0.5, 0.5))
    sampled = routers.attach(workload.pipe, bundle, budget=0.35)
    with sampled.scope(samples=workload.rows) as expected:
        latents = workload.run(0)
    sampled.detach()
    watched = WatchedPlan(workload.pipe, bundle.planner, 0.35, "dense", TRANSFORMER_2, bundle.narrow_plans())
    with watched.scope(samples=workload.rows) as trace:
        assert torch.equal(workload.run(0), latents), "what is watched is what is made"
    watched.detach()
    assert len(trace.calls) == STEPS
    codes = [c.actions for c in sorted(trace.calls, key=lambda c: c.step)]
    assert sum((c >= 0).any() for c in codes) == 3
    made = [c for c in codes if (c >= 0).any()]
    assert all(np.array_equal(a, c.actions) for a, c in zip(made, expected.blocks.calls, strict=True))


def test_a_fit_chooses_by_where_runs_end(workload: MeshWorkload, trained: Trained) -> None:
    bundle = fit(
        workload.pipe.transformer, TRANSFORMER_2, workload, "random", 5.0, FitSettings(budgets=(0.2, 0.5)),
        trained=trained,
    )  # fmt: skip
    assert bundle.trained is trained and not bundle.decides
    ratios = {found.ratio for found in bundle.narrow["dense"]}
    assert ratios - {1.0}, "some plan leaves its evaluations to routers"
    found = next(f for f in bundle.narrow["dense"] if f.ratio < 1)
    sampled = routers.attach(workload.pipe, bundle, budget=(found.share + found.until) / 2)
    with sampled.scope(samples=workload.rows) as trace:
        workload.run(0)
    sampled.detach()
    assert trace.ratio == found.ratio and trace.share == pytest.approx(found.share, abs=0.02)
