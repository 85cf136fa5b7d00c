"""Solvers: order, first step and resets on a flow known in closed form; in a pipeline, and by name."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from backbones import loading, registry
from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
from backbones.solvers import MULTISTEP, solver
from backbones.spec import SOLVERS, Placement
from backbones.workloads import MeshWorkload, PipelineWorkload, embed

SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchEulerScheduler)


def integrate(scheduler: Any, name: str, steps: int) -> float:
    """Error at the end of a run for data N(2, 0.5^2), whose flow is known in closed form."""
    start = torch.tensor([[-1.3, 0.2, 1.7]])
    mean, deviation = 2.0, 0.5

    def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
        variance = (1 - s) ** 2 * deviation**2 + s**2
        slope = (s - (1 - s) * deviation**2) / variance
        return -mean + slope * (x - (1 - s) * mean)

    x = start
    with solver(SimpleNamespace(scheduler=scheduler), name):
        if isinstance(scheduler, FlowMatchEulerScheduler):
            scheduler.set_timesteps(
                steps + 1, sigmas=np.linspace(0, 1, steps + 1)
            )  # the last is of size zero
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(-velocity(x, 1 - float(t) / 1000), i, x)
        else:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
            for t in scheduler.timesteps:
                x = scheduler.step(velocity(x, float(t) / 1000), t, x, return_dict=False)[0]
    return float((x - (mean + deviation * start)).abs().max())


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_solvers_are_of_second_order(name: str, kind: type) -> None:
    errors = [integrate(kind(), name, steps) for steps in (20, 40, 80)]
    euler = [integrate(kind(), "euler", steps) for steps in (20, 40, 80)]
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.4), (
        "Euler is of first order: the test problem is fit"
    )
    assert all(ours < theirs for ours, theirs in zip(errors, euler, strict=True))
    assert math.log2(errors[1] / errors[2]) > 1.5


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_solvers_start_with_the_euler_step_and_forget_the_last_run(name: str, kind: type) -> None:
    x, v = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.5]])
    scheduler = kind()

    def step(index: int, v: torch.Tensor) -> torch.Tensor:
        if kind is FlowMatchEulerScheduler:
            return scheduler.step(v, index, x)
        return scheduler.step(v, scheduler.timesteps[index], x, return_dict=False)[0]

    scheduler.set_timesteps(
        sigmas=[1.0, 0.6, 0.3] if kind is not FlowMatchEulerScheduler else [0.0, 0.4, 0.7]
    )
    euler = step(0, v)
    with solver(SimpleNamespace(scheduler=scheduler), name):
        for _ in range(2):
            scheduler.set_timesteps(sigmas=(scheduler.sigmas[:-1]).tolist())
            assert torch.allclose(step(0, v), euler, atol=1e-6)
            step(1, 2 * v)


def test_every_name_is_a_solver() -> None:
    assert set(SOLVERS) == {"euler", *MULTISTEP}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_scheduler_gets_its_own_step_back(name: str, kind: type) -> None:
    scheduler = kind(shift=3.0)
    pipe, step = SimpleNamespace(scheduler=scheduler), scheduler.step
    with solver(pipe, name):
        assert pipe.scheduler is scheduler
        assert (scheduler.step == step) == (name == "euler")
    assert scheduler.step == step
    with pytest.raises(KeyError), solver(pipe, name):
        raise KeyError
    assert scheduler.step == step


def test_another_kind_of_scheduler_is_refused() -> None:
    from diffusers import DDIMScheduler

    pipe = SimpleNamespace(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="this model has DDIMScheduler; leave the solver out"):
        solver(pipe, "ab2").__enter__()


@pytest.mark.parametrize(
    "model",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen", "hunyuan3d-tiny")), "flux"],
)
def test_solvers_come_nearer_to_many_steps(model: str, request: pytest.FixtureRequest) -> None:
    """In a pipeline, with as many steps: the result of 200 Euler steps is approached more closely."""
    folder = model if "-" in model else str(request.getfixturevalue(f"{model}_folder"))
    backbone = registry.resolve(folder)
    pipe = loading.load(backbone, Placement())
    workload: Any
    if backbone.makes == "mesh":
        pictures = sorted((Path(backbone.source) / "calibration").glob("solid-*.png"))[:2]
        workload = MeshWorkload(pipe, backbone, 2, 12, 2.0, embed(pipe, [Image.open(p) for p in pictures]), 2)
    else:
        workload = PipelineWorkload(pipe, backbone, 1, 8, 2.0, ["a cat"], 64, 64)
    with torch.no_grad():
        exact = workload.run(0, num_steps=200)

        def error(name: str) -> float:
            with solver(pipe, name):
                return float((workload.run(0) - exact).square().mean())

        errors = {name: error(name) for name in SOLVERS}
    assert errors["ab2"] < 0.5 * errors["euler"], errors
    assert errors["dpm++2m"] < errors["euler"], errors
