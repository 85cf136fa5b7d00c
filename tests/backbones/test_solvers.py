"""Solvers: order, first step and resets on a flow known in closed form; in a pipeline, and by name."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from backbones.solvers import MULTISTEP, solver
from backbones.spec import SOLVERS


def integrate(scheduler_class, steps: int) -> float:
    """Error at s = 0 for data N(2, 0.5^2), whose flow is known in closed form."""
    scheduler = scheduler_class()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    start = torch.tensor([[-1.3, 0.2, 1.7]])
    mean, deviation = 2.0, 0.5
    x = start
    for t in scheduler.timesteps:
        s = float(t) / 1000
        variance = (1 - s) ** 2 * deviation**2 + s**2
        slope = (s - (1 - s) * deviation**2) / variance
        v = -mean + slope * (x - (1 - s) * mean)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return float((x - (mean + deviation * start)).abs().max())


@pytest.mark.parametrize("name", MULTISTEP)
def test_solvers_are_of_second_order(name: str) -> None:
    errors = [integrate(MULTISTEP[name], steps) for steps in (20, 40, 80)]
    euler = [integrate(FlowMatchEulerDiscreteScheduler, steps) for steps in (20, 40, 80)]
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.4), (
        "Euler is of first order: the test problem is fit"
    )
    assert all(ours < theirs for ours, theirs in zip(errors, euler, strict=True))
    assert math.log2(errors[1] / errors[2]) > 1.5


@pytest.mark.parametrize("name", MULTISTEP)
def test_solvers_start_with_the_euler_step_and_forget_the_last_run(name: str) -> None:
    x, v = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.5]])
    euler, solver = FlowMatchEulerDiscreteScheduler(), MULTISTEP[name]()
    for _ in range(2):
        for scheduler in (euler, solver):
            scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
        first = [s.step(v, s.timesteps[0], x, return_dict=False)[0] for s in (euler, solver)]
        assert torch.allclose(*first, atol=1e-6)
        solver.step(2 * v, solver.timesteps[1], x)


def test_every_name_is_a_solver() -> None:
    assert set(SOLVERS) == {"euler", *MULTISTEP}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pipeline_gets_its_own_scheduler_back(name: str) -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = SimpleNamespace(scheduler=own)
    with solver(pipe, name):
        assert (pipe.scheduler is own) == (name == "euler")
        assert pipe.scheduler.config.shift == 3.0
    assert pipe.scheduler is own
    with pytest.raises(KeyError), solver(pipe, name):
        raise KeyError
    assert pipe.scheduler is own


def test_another_kind_of_scheduler_is_refused() -> None:
    from diffusers import DDIMScheduler

    pipe = SimpleNamespace(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="this model has DDIMScheduler; leave the solver out"):
        solver(pipe, "ab2").__enter__()


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_solvers_come_nearer_to_many_steps(family: str, request: pytest.FixtureRequest) -> None:
    """In a pipeline, with as many steps: the picture of 200 Euler steps is approached more closely."""
    from backbones import loading, registry
    from backbones.spec import Placement
    from backbones.workloads import PipelineWorkload

    folder: Path = request.getfixturevalue(f"{family}_folder")
    backbone = registry.resolve(str(folder))
    pipe = loading.load(backbone, Placement())
    pipe.set_progress_bar_config(disable=True)
    workload = PipelineWorkload(pipe, backbone.family, ["a cat"], 1, 8, 2.0, 64, 64)
    with torch.no_grad():
        exact = workload.run(0, num_steps=200)

        def error(name: str) -> float:
            with solver(pipe, name):
                return float((workload.run(0) - exact).square().mean())

        found = {name: error(name) for name in SOLVERS}
    assert found["ab2"] < 0.5 * found["euler"], found
    assert found["dpm++2m"] < found["euler"], found
