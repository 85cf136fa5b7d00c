"""Plans chosen by trying: they are what the model ran best with, and what a run then follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones import qwen_image, registry
from backbones.hunyuan3d.family import TRANSFORMER_2
from backbones.workloads import MeshWorkload, PipelineWorkload
from routers.calibrate.choose import EVENED, Trials, choose_plans, evened, moves
from routers.calibrate.fit import FitSettings, first_moments, fit
from routers.calibrate.record import Record, record
from routers.elastic import Elastic
from routers.planned.plan import Planner
from routers.planned.policy import PlannedPolicy
from routers.planned.prediction import DEAD, HALF, WHOLE, Moments
from routers.trace import REUSE
from tests.cli.test_calibrate_mesh import make_workload
from tests.tiny_pipelines import make_moments, make_qwen_image

STEPS, ROWS = 6, 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PipelineWorkload:
    """Two CFG branches in calls of their own."""
    from diffusers import QwenImagePipeline

    folder = make_qwen_image(tmp_path_factory.mktemp("pipeline") / "qwen")
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():  # random modulations are near zero: let blocks matter
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    backbone, prompts = registry.resolve(str(folder)), ["a cat", "a tree"]
    return PipelineWorkload(pipe, backbone, ROWS, STEPS, 4.0, prompts, 64, 64)


def recorded_of(workload: PipelineWorkload | MeshWorkload, spec: object) -> tuple[Elastic, Record, Moments]:
    elastic = Elastic(workload.pipe.transformer, spec)  # type: ignore[arg-type]
    found = record(elastic, workload)
    return elastic, found, first_moments(found, workload.branches, workload.guidance)


@pytest.mark.parametrize("kind", ["pictures", "meshes"])
def test_no_proposal_came_out_better_than_what_was_chosen(kind: str, pictures: PipelineWorkload) -> None:
    workload = pictures if kind == "pictures" else make_workload("2.0")
    spec = qwen_image.TRANSFORMER if kind == "pictures" else TRANSFORMER_2
    elastic, recorded, moments = recorded_of(workload, spec)
    try:
        plans = choose_plans(elastic, workload, recorded, moments, ROWS, 0.35)
        trials = Trials(elastic, workload, recorded, moments, 1)
        split = trials.splits()
        assert split == (kind == "pictures"), "meshes have both branches in one call"
        assert plans is not None and plans.dtype == np.int8
        assert plans.sum(axis=1).tolist() == list(range(2, 11, HALF if split else WHOLE))
        assert (plans[:, 0] == WHOLE).all() and ((plans >= 0) & (plans <= WHOLE)).all()
        planners = [Planner(replace(moments, gain=evened(moments.gain, e))) for e in EVENED]
        lead = []
        for levels in plans:
            others = [trials.score(p.best(int(levels.sum()), split)[0]) for p in planners]
            lead.append(trials.score(levels) - max(others))
        assert min(lead) >= 0, "proposals are among the plans tried"
    finally:
        elastic.detach()


def test_a_run_at_a_budget_follows_the_plan_that_was_tried(
    pictures: PipelineWorkload, tmp_path: Path
) -> None:
    settings = FitSettings(probes=8, tried=ROWS)
    bundle = fit(pictures.pipe.transformer, qwen_image.TRANSFORMER, pictures, "random", 4.0, settings)
    assert bundle.moments.plans is not None
    worst = np.array([WHOLE, 0, 0, 0, WHOLE, WHOLE], np.int8)  # no search proposes three predictions in a row
    bundle.moments.plans[bundle.moments.plans.sum(axis=1) == worst.sum()] = worst
    bundle.save(tmp_path)
    loaded = routers.load_bundle(tmp_path)
    assert (loaded.moments.plans == bundle.moments.plans).all()
    elastic = routers.attach(pictures.pipe.transformer, loaded, budget=0.5, force=True)
    try:
        with torch.no_grad(), elastic.scope(num_steps=STEPS) as trace:
            pictures.run(0)
    finally:
        elastic.detach()
    computed = [bool((call.actions != REUSE).all()) for call in trace.calls if call.branch == "cond"]
    assert computed == (worst > 0).tolist()
    assert trace.spent == pytest.approx([0.5, 0.5], abs=0.01)


def test_forced_levels_are_what_is_computed(pictures: PipelineWorkload) -> None:
    """Half a step computes the first branch alone."""
    levels = np.array([WHOLE, WHOLE, 0, HALF, WHOLE, HALF], np.int8)
    elastic, _, moments = recorded_of(pictures, qwen_image.TRANSFORMER)
    try:
        policy = PlannedPolicy(moments, levels=levels)
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=STEPS, budget=1.0) as trace:
            pictures.run(0)
    finally:
        elastic.detach()
    computed = np.array([(call.actions != REUSE).all() for call in trace.calls]).reshape(STEPS, 2)
    assert computed.sum(axis=1).tolist() == levels.tolist()
    assert computed[:, 0].tolist() == (levels > 0).tolist()


def test_plans_hold_for_the_calibrated_steps_alone() -> None:
    plans = np.array([[WHOLE, 0, 0, 0, 0, 0, 0, WHOLE]], np.int8)
    moments = replace(make_moments(("cond", "uncond"), 8), plans=plans)
    for split in (False, True):
        assert (Planner(moments).best(4, split)[0] == plans[0]).all()
    assert moments.at(8).plans is plans and moments.at(12).plans is None
    assert Planner(moments.at(12)).best(4, split=True)[0].sum() == 4


def test_whole_step_plans_do_not_read_half_ones() -> None:
    """Where branches turn out to share a batch, a plan with half steps would spend more than its budget."""
    plans = np.array([[WHOLE, HALF, HALF, 0, 0, 0, 0, 0]], np.int8)
    moments = replace(make_moments(("cond", "uncond"), 8), plans=plans)
    levels, _ = Planner(moments).best(4)
    assert levels.sum() == 4 and HALF not in levels


def test_evened_gains_keep_steps_without_effect_apart() -> None:
    gain = np.array([1.0, 4.0, 16.0, 64.0, DEAD])
    flat = evened(gain, 0.0)
    assert flat[:4] == pytest.approx(np.full(4, 4.0)) and flat[4] == DEAD
    assert evened(gain, 1.0) == pytest.approx(gain)
    assert np.log(evened(gain, 0.5)[:4] / 4) == pytest.approx(np.log(gain[:4] / 4) / 2)


def test_moves_change_one_step_and_are_ranked() -> None:
    planner = Planner(make_moments(("cond", "uncond"), 8))
    levels = np.array([WHOLE, WHOLE, 0, HALF, WHOLE, 0, 0, WHOLE], np.int8)
    for by in (HALF, -HALF, WHOLE, -WHOLE):
        found = moves(planner, levels, by)
        assert all(plan.sum() == levels.sum() + by and (plan != levels).sum() == 1 for plan in found)
        errors = [planner.error(plan) for plan in found]
        assert errors == sorted(errors) and found
    assert moves(planner, None, HALF) == []


def test_nothing_is_tried_without_samples(pictures: PipelineWorkload) -> None:
    elastic, recorded, moments = recorded_of(pictures, qwen_image.TRANSFORMER)
    elastic.detach()
    assert choose_plans(elastic, pictures, recorded, moments, 0, 0.35) is None
