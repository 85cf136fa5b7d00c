"""Other decisions of the same trained network: what they are told, and that all of them keep the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import routers
from backbones.hunyuan3d.family import TRANSFORMER_2
from benchmarks.trained import MIXES, SAME_NETWORK, Judge, Told, Ways
from routers.train.loop import Training
from routers.train.settings import TrainSettings
from tests.tiny_workloads import mesh_workload


@pytest.mark.slow
def test_all_decisions_of_the_same_network_keep_the_budget_and_differ(tmp_path: Path) -> None:
    workload, settings = mesh_workload(), TrainSettings(steps=2, hidden=4, low=0.5, rate=0.3)
    transformer = workload.pipe.transformer
    training = Training(transformer, TRANSFORMER_2, workload, settings, Accelerator(cpu=True))
    training.run("m", 5.0).save(tmp_path / "b")
    ways = Ways(routers.load_bundle(tmp_path / "b"), None, 0.7).read(workload)
    made, actions = {}, {}
    with torch.no_grad():
        for name in (*SAME_NETWORK, *MIXES):
            with ways.run(name, workload) as trace:
                made[name] = workload.run(0)
            actions[name] = np.stack([call.actions for call in trace.calls])
            assert trace.spent == pytest.approx([0.7] * workload.rows, abs=0.03)
    for name in ("time only", "static", "batch mean"):
        rows = actions[name].reshape(*actions[name].shape[:1], 2, workload.rows, -1)
        assert (rows == rows[:, :, :1]).all(), "the same for every sample"
    assert len({latents.numpy().tobytes() for latents in made.values()}) >= 3


def test_the_first_call_is_told_too_where_it_decides() -> None:
    from routers.policy import RunInfo
    from routers.trained.policy import Profile
    from tests.routers.test_routed_plans import call

    first = np.zeros((2, 3, 5))
    first[..., 0] = [1.0, 0.0, -1.0]
    profile = Profile(np.array([0.5, 1.0]), np.full((2, 2), 0.5), first)
    step = np.zeros((3, 5), np.float32)
    step[:, 0] = [-1.0, 0.0, 1.0]
    opened = {}
    for name, by_step in {"time only": {1: step}, "static": {0: step, 1: step}}.items():
        policy = Told(profile).tell(by_step)
        policy.start(RunInfo(2, 0.5))
        opened[name] = policy.decide(call(0, 0), None).actions[0].tolist()
    assert opened["time only"][0] >= 0 > opened["time only"][2]
    assert opened["static"][2] >= 0 > opened["static"][0]


def test_an_interval_holds_the_difference_and_none_is_none() -> None:
    judge, rng = Judge.__new__(Judge), np.random.default_rng(0)
    judge.labels, judge.real = [0] * 60, rng.normal(size=(60, 3))
    near = judge.real + 0.01 * rng.normal(size=(60, 3))
    judge.seen = {"trained": near, "same": near, "far": near + 1.0}
    assert judge.farther("same", "trained") == {"farther": [0.0, 0.0]}
    low, high = judge.farther("far", "trained")["farther"]
    assert 2 < low < high < 4, "the means are a distance of 1 apart in each of three features"
