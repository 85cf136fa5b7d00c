"""Evaluations x widths: few narrow evaluations serve budgets that few whole ones cannot, counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones import qwen_image
from backbones.hunyuan3d.family import TRANSFORMER_2
from backbones.workloads import MeshWorkload, PipelineWorkload
from routers.bundle import Bundle
from routers.calibrate.fit import fit
from routers.calibrate.narrow import Measured, candidates, overshooting_error, own_times, worth_it
from routers.calibrate.settings import FitSettings
from routers.meta import count_flops
from routers.planned.narrow import NarrowPlan
from routers.planned.sampled import Sampled
from routers.planned.timeplan import TimePlan, euler
from tests.tiny_workloads import mesh_workload, picture_workload

STEPS = 5
ASKED = FitSettings(budgets=(0.1, 0.5))


def plan(evaluations: int, width: float) -> TimePlan:
    steps = euler(np.linspace(1, 0, evaluations + 1))
    return replace(steps, widths=np.full(evaluations, width))


@pytest.fixture(scope="module", params=[pytest.param("pictures", marks=pytest.mark.slow), "meshes"])
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PipelineWorkload | MeshWorkload, Bundle]:
    if request.param == "pictures":
        workload = picture_workload(tmp_path_factory.mktemp("narrow") / "qwen", STEPS)
        spec = qwen_image.TRANSFORMER
    else:
        workload, spec = replace(mesh_workload(), num_steps=STEPS), TRANSFORMER_2
    bundle = fit(workload.pipe.transformer, spec, workload, "random", 4.0, ASKED)
    return workload, bundle


def test_kept_are_narrow_plans_that_end_nearer_than_all_that_is_cheaper() -> None:
    narrow, wide, whole = plan(3, 0.25), plan(3, 0.5), plan(2, 1.0)
    measured = [Measured(whole, 0.2, 0.5), Measured(narrow, 0.15, 0.4), Measured(wide, 0.22, 0.3)]
    measured += [Measured(plan(1, 0.5), 0.07, 0.9), Measured(plan(3, 1.0), 0.3, 0.2)]
    kept = worth_it(measured, 0.4)
    assert [(found.share, found.until) for found in kept] == [(0.07, 0.15), (0.15, 0.22), (0.22, 0.3)]
    assert kept[1].plan is narrow and kept[2].plan is wide, "the whole plan between them is worse than both"
    assert worth_it(measured[:3], 0.4)[-1].until == 0.4, "what was not measured may be better from there on"


def test_a_plan_that_shoots_beyond_the_target_counts_as_farther_away() -> None:
    target = torch.ones(2, 4)
    short, beyond = overshooting_error(0.8 * target, target), overshooting_error(1.2 * target, target)
    assert short == pytest.approx(0.04) and beyond == pytest.approx(0.04 + 0.44)


def test_narrow_plans_survive_the_bundle(calibrated, tmp_path: Path) -> None:
    _, bundle = calibrated
    bundle.save(tmp_path / "b")
    again = routers.load_bundle(tmp_path / "b")
    assert bundle.narrow["dense"], "something narrow was worth it"
    for one, two in zip(bundle.narrow["dense"], again.narrow["dense"], strict=True):
        assert {k: v.tolist() for k, v in one.to_arrays().items()} == {
            k: v.tolist() for k, v in two.to_arrays().items()
        }
    plans = again.narrow_plans()
    assert plans is not None and plans.at(0.01, "dense", STEPS) is plans.plans["dense"][0]
    assert plans.at(0.01, "exact", STEPS) is plans.plans["dense"][0], "where only the other was measured"
    assert plans.at(0.01, "dense", STEPS + 1) is None and plans.at(1.0, "dense", STEPS) is None
    shares = [found.share for found in again.narrow["dense"]]
    assert shares == sorted(shares) and all(found.plan.narrows for found in again.narrow["dense"])


def test_a_narrow_run_spends_what_is_counted_and_leaves_nothing_behind(calibrated) -> None:
    workload, bundle = calibrated
    transformer = workload.pipe.transformer
    before = {path: set(vars(module)) for path, module in transformer.named_modules()}
    dense, counted = workload.run(0), count_flops(workload.run, 0)
    with_one = routers.attach(workload.pipe, budget=0.2)  # one evaluation, and what is around the run
    evaluation = (counted - count_flops(workload.run, 0)) / (STEPS - 1)
    with_one.detach()
    around = counted - STEPS * evaluation
    for found in bundle.narrow["dense"]:
        sampled = routers.attach(workload.pipe, bundle, budget=(found.share + found.until) / 2)
        assert isinstance(sampled, Sampled)
        assert sampled.evaluations(STEPS) == found.plan.evaluations
        try:
            with sampled.scope(samples=workload.rows) as trace:
                workload.run(0)  # costs are known from here on
            assert trace.spent == pytest.approx([found.share] * workload.rows)
            assert trace.widths == tuple(found.plan.widths)
            with sampled.scope(samples=workload.rows):
                spent = (count_flops(workload.run, 0) - around) / (STEPS * evaluation)
            assert spent == pytest.approx(found.share, rel=0.01)
            assert f"width {found.plan.widths[0]:g}" in trace.notes[0]
        finally:
            sampled.detach()
    assert {path: set(vars(module)) for path, module in transformer.named_modules()} == before
    assert torch.equal(workload.run(0), dense)


def test_an_interrupted_narrow_run_leaves_nothing_behind(calibrated) -> None:
    workload, bundle = calibrated
    transformer, dense = workload.pipe.transformer, workload.run(0)
    sampled = routers.attach(workload.pipe, bundle, budget=bundle.narrow["dense"][0].share)
    handle = transformer.register_forward_hook(lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with pytest.raises(InterruptedError):
            workload.run(0)
        handle.remove()
        with sampled.scope(budget=1.0):
            assert torch.equal(workload.run(0), dense)
        assert "_edit_elastic" not in vars(transformer)
    finally:
        handle.remove()
        sampled.detach()


@pytest.mark.parametrize("used", [False, True])
def test_what_cannot_be_narrowed_runs_whole_and_says_so(calibrated, used: bool) -> None:
    workload, bundle = calibrated
    budget = bundle.narrow["dense"][0].share
    sampled = routers.attach(workload.pipe, bundle, budget=budget)
    if used:
        workload.run(0)
    workload.pipe.transformer._compiled_call_impl = workload.pipe.transformer._call_impl
    try:
        with sampled.scope(samples=workload.rows) as trace:
            workload.run(0)
    finally:
        workload.pipe.transformer._compiled_call_impl = None
        sampled.detach()
    assert trace.spent == [1 / STEPS] * workload.rows and trace.widths == ()
    assert trace.notes[0].startswith("evaluations are whole: the transformer is compiled as a whole")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"serves": np.array([0.3, 0.2])}, r"serves budgets \[0\.3, 0\.2\]"),
        ({"serves": np.array([0.3])}, "from one share up to another"),
        ({"widths": np.array([0.3, 0.3])}, r"widths \[0\.3, 0\.3\]: one of"),
        ({"widths": np.array([0.5])}, r"widths \[0\.5\]: one of"),
    ],
)
def test_what_makes_no_narrow_plan_is_refused(arrays: dict, message: str) -> None:
    good = NarrowPlan(plan(2, 0.5), 0.07, 0.1).to_arrays()
    with pytest.raises(ValueError, match=message):
        NarrowPlan.from_arrays({**good, **arrays})


def test_a_model_of_few_steps_is_tried_narrow_at_its_own_times() -> None:
    assert FitSettings().narrow(4) == [1, 2, 3, 4] and FitSettings().narrow(20) == [1, 2, 3, 4]
    assert FitSettings(budgets=(0.5,)).narrow(4) == []
    grid = np.linspace(1, 0, 5)
    assert own_times(grid, 4).tolist() == grid.tolist() and own_times(grid, 2).tolist() == [1, 0.25, 0]
    tried = list(candidates(grid, [4], None, routed=True))
    own = [(plan.widths[0], ratio) for plan, ratio in tried if np.allclose(plan.times, grid)]
    assert {width for width, _ in own} == {0.25, 0.5, 0.75, 1.0} and {r for _, r in own} > {1.0}
    assert len(tried) == len(own), "which are all that it may know"
