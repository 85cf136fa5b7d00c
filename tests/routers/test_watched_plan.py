"""A plan's run with its blocks in sight: the engine's trace says what the sampler did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones import registry
from routers.planned.universal import WARPS, grid_steps, universal_planner
from routers.trace import FULL, REUSE
from routers.watch.planned import WatchedPlan
from tests.routers.packaged import MESH, QWEN, load, make

STEPS = 8


@pytest.mark.parametrize("target", ["dense", "exact"])
@pytest.mark.parametrize("folder", [QWEN, MESH], ids=lambda folder: folder.name)
def test_what_is_watched_is_what_is_made(folder: Path, target: str) -> None:
    pipe, spec = load(folder), registry.rows()[folder.name.replace("_", "-")].family.transformer
    sampled = routers.attach(pipe, budget=0.5, target=target)
    expected, spent = make(pipe, STEPS), sampled.trace.spent
    sampled.detach()
    own, clean = pipe.scheduler, set(vars(pipe.transformer))
    watched = WatchedPlan(pipe, universal_planner, 0.5, target, spec)
    try:
        with watched.scope() as trace:
            assert torch.equal(make(pipe, STEPS), expected)
        assert trace.spent == pytest.approx(spent) == [0.5]
        branches = {call.branch for call in trace.calls}
        assert len(branches) == (2 if folder == QWEN else 1)
        for branch in branches:
            calls = {call.step: call for call in trace.calls if call.branch == branch}
            assert sorted(calls) == list(range(STEPS)), "counted as the dense run counts its steps"
            computed = {step for step, call in calls.items() if (call.actions == FULL).all()}
            left_out = {step for step, call in calls.items() if (call.actions == REUSE).all()}
            assert len(computed) == STEPS // 2 and computed | left_out == set(calls)
            assert all(not calls[step].flops.any() for step in left_out)
            assert len({call.dense_flops for call in calls.values()}) == 1
            if target == "dense":
                moving = STEPS - (folder == MESH)  # the last step of its sampler goes nowhere
                warp = getattr(own, "warps", WARPS)["dense"]
                assert sorted(computed) == grid_steps(moving, STEPS // 2, *warp)
    finally:
        watched.detach()
    assert pipe.scheduler is own and set(vars(pipe.transformer)) == clean
    assert np.isfinite(expected.numpy()).all()


def test_runs_of_other_lengths_and_budgets_one_after_the_other() -> None:
    pipe, spec = load(QWEN), registry.rows()["qwen-image-tiny"].family.transformer
    watched = WatchedPlan(pipe, universal_planner, 0.5, "dense", spec)
    try:
        for steps, budget in ((4, 0.5), (4, 0.75), (2, 1.0)):
            with watched.scope(budget=budget) as trace:
                make(pipe, steps)
            assert trace.spent == pytest.approx([budget])
            assert {call.step for call in trace.calls} == set(range(steps))
    finally:
        watched.detach()
