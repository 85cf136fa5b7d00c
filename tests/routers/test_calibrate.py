"""Calibration of small models: its plans beat those with nothing measured, and it costs what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import routers
from backbones import qwen_image
from backbones.hunyuan3d.family import TRANSFORMER_2
from backbones.workloads import MeshWorkload, PipelineWorkload
from routers.bundle import Bundle
from routers.calibrate.evaluate import Quality, evaluate, latent_snr, recommend
from routers.calibrate.fit import fit
from routers.calibrate.settings import FitSettings
from routers.planned.sampled import Sampled
from tests.tiny_workloads import ROWS, mesh_workload, picture_workload

STEPS = 10
BOTH = ("dense", "exact")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PipelineWorkload:
    return picture_workload(tmp_path_factory.mktemp("pipeline") / "qwen", STEPS)


@pytest.fixture(scope="module")
def meshes() -> MeshWorkload:
    return replace(mesh_workload(), num_steps=STEPS)


Workload = PipelineWorkload | MeshWorkload


@pytest.fixture(scope="module", params=["pictures", "meshes"])
def workload(request: pytest.FixtureRequest) -> Workload:
    return request.getfixturevalue(request.param)


def fitted(workload: Workload, settings: FitSettings, report=lambda *_: None) -> Bundle:
    spec = TRANSFORMER_2 if isinstance(workload, MeshWorkload) else qwen_image.TRANSFORMER
    return fit(workload.pipe.transformer, spec, workload, "random", 4.0, settings, report)


def evaluations(workload: Workload) -> int:
    """Of the transformer, by one run of the first batch."""
    calls = []
    handle = workload.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        workload.run(0)
    finally:
        handle.remove()
    return len(calls)


def test_a_workload_is_repeatable_and_counts_branches(pictures: PipelineWorkload) -> None:
    assert (pictures.num_batches, pictures.branches) == (2, ("cond", "uncond"))
    assert torch.equal(pictures.run(1), pictures.run(1))
    assert not torch.equal(pictures.run(0), pictures.run(1))


# -- what is fitted -----------------------------------------------------------------------------


def snr(workload: Workload, bundle: Bundle | None, budget: float, target: str, goal: torch.Tensor) -> float:
    """How near the first batch's latents come to a goal, dB."""
    sampled = routers.attach(workload.pipe, bundle, budget=budget, target=target)
    assert isinstance(sampled, Sampled)
    try:
        latents = workload.run(0)
    finally:
        sampled.detach()
    return float(np.mean(latent_snr(latents, goal)))


def exact_run(workload: Workload) -> torch.Tensor:
    sampled = routers.attach(workload.pipe, target="exact")
    try:
        return workload.run(0, num_steps=8 * STEPS)
    finally:
        sampled.detach()


@pytest.mark.parametrize("target", BOTH)
def test_two_samples_make_plans_that_beat_the_universal_one(workload: Workload, target: str) -> None:
    """On those samples, where it was sent: at the budget that was fitted."""
    before = [p.clone() for p in workload.pipe.transformer.parameters()]
    own, dense = workload.pipe.scheduler, workload.run(0)
    bundle = fitted(workload, FitSettings(budgets=(0.4,), targets=(target,)))
    assert {t: list(each) for t, each in bundle.plans.items()} == {target: [4]}
    goal = dense if target == "dense" else exact_run(workload)
    universal = snr(workload, None, 0.4, target, goal)
    assert snr(workload, bundle, 0.4, target, goal) > universal + 0.3
    assert workload.pipe.scheduler is own and torch.equal(workload.run(0), dense)
    assert all(torch.equal(a, b) for a, b in zip(before, workload.pipe.transformer.parameters(), strict=True))


def test_a_bundle_has_a_plan_for_every_budget_and_keeps_it(workload: Workload, tmp_path: Path) -> None:
    phases: list[tuple[str, int, int]] = []
    settings = FitSettings(budgets=(0.3, 0.5, 0.7), targets=BOTH)
    bundle = fitted(workload, settings, lambda *phase: phases.append(phase))
    assert {name for name, _, _ in phases} == {
        f"{what}{target}" for target in BOTH for what in ("record ", "plans, ")
    }
    assert all(0 <= done < total for _, done, total in phases)
    assert {t: sorted(each) for t, each in bundle.plans.items()} == {target: [3, 5, 7] for target in BOTH}
    assert set(bundle.warps) == set(BOTH) and len(bundle.times) == STEPS + 1
    bundle.save(tmp_path / "b")
    rows = evaluate(routers.load_bundle(tmp_path / "b"), workload, [0.3, 0.5, 0.7, 1.0])
    assert [row.spent for row in rows] == pytest.approx([0.3, 0.5, 0.7, 1.0])
    assert all(row.spent_low == row.spent_high == row.spent for row in rows)
    assert rows[3].snr > 100 and rows[2].snr > rows[0].snr > 0
    assert all(row.time_ratio > 0 for row in rows)


def test_other_numbers_of_evaluations_begin_with_the_warp_that_was_best() -> None:
    bundle = fitted(mesh_workload(), FitSettings(budgets=(0.2, 0.5), tries=2))
    grid = np.array(bundle.times)
    assert bundle.warps["dense"] in ((1.3, 1.2), (1.7, 1.3)), "one of the two that were tried"
    for plan in bundle.plans["dense"].values():
        assert set(np.round(plan.times, 9)) <= set(np.round(grid, 9)), "times of the dense run itself"


def test_a_scheduler_that_a_plan_cannot_stand_in_for_is_refused(pictures: PipelineWorkload) -> None:
    own, pictures.pipe.scheduler = pictures.pipe.scheduler, DDPMScheduler()
    try:
        with pytest.raises(ValueError, match="this pipeline has DDPMScheduler"):
            fitted(pictures, FitSettings(budgets=(0.5,)))
    finally:
        pictures.pipe.scheduler = own


# -- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(4, 51))
def test_one_budget_costs_two_pictures_and_all_of_them_twenty(steps: int) -> None:
    for budget in [*np.linspace(0.01, 0.99, 99), 1 / steps, 0.5]:
        assert FitSettings(budgets=(float(budget),)).cost(steps) <= 2.2
        assert FitSettings(budgets=(float(budget),), targets=("exact",)).cost(steps) <= 16
    assert FitSettings().cost(steps) <= 20
    assert FitSettings(targets=BOTH).cost(steps) <= 42


def test_every_number_of_evaluations_has_a_plan_and_all_steps_need_none() -> None:
    assert FitSettings().evaluations(20) == list(range(1, 20))
    assert FitSettings().evaluations(4) == [1, 2, 3]
    assert FitSettings(budgets=(0.5, 0.51, 1.0)).evaluations(20) == [10]


@pytest.mark.parametrize(
    "settings", [FitSettings(budgets=(0.4,)), FitSettings(targets=BOTH)], ids=["one", "all of both targets"]
)
def test_the_cost_that_is_told_is_not_exceeded(meshes: MeshWorkload, settings: FitSettings) -> None:
    dense, calls = evaluations(meshes), []
    handle = meshes.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        bundle = fitted(meshes, settings)
    finally:
        handle.remove()
    told = bundle.metadata["generations"]
    assert 0.5 * told < len(calls) / dense <= told + 0.01
    assert bundle.metadata["rows"] == ROWS


# -- what is recommended ------------------------------------------------------------------------


def test_recommended_budget_is_the_smallest_without_loss() -> None:
    def row(budget: float, snr: float) -> Quality:
        return Quality(budget, budget, budget, budget, snr, budget)

    assert recommend([row(0.4, 20), row(0.6, 33), row(0.8, 40), row(1.0, 120)]) == 0.6
    assert recommend([row(0.4, 35), row(0.6, 25), row(0.8, 40), row(1.0, 120)]) == 0.8
    assert recommend([row(0.4, 5), row(1.0, 20)]) == 1.0
