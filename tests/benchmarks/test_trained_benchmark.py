"""Other decisions of the same trained network: what they are told, and that all of them keep the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import routers
from backbones.hunyuan3d.family import TRANSFORMER_2
from benchmarks.trained import SAME_NETWORK, Ways
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
        for name in (*SAME_NETWORK, "random skip, untrained"):
            with ways.run(name, workload) as trace:
                made[name] = workload.run(0)
            actions[name] = np.stack([call.actions for call in trace.calls])
            assert trace.spent == pytest.approx([0.7] * workload.rows, abs=0.03)
    for name in ("time only", "static", "batch mean"):
        rows = actions[name].reshape(*actions[name].shape[:1], 2, workload.rows, -1)
        assert (rows == rows[:, :, :1]).all(), "the same for every sample"
    assert len({latents.numpy().tobytes() for latents in made.values()}) >= 3
