"""Plans in the place of samplers with other noise schedules, on Gaussian data with a perfect model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import routers
from routers.planned.apart import RowPlans
from routers.planned.grid import OnGrid
from routers.planned.sampled import Sampled
from routers.planned.scheduler import elastic_scheduler
from routers.planned.universal import universal_planner

SPREAD = torch.linspace(0.1, 2, 64)[None]
SIGNAL = DDIMScheduler().alphas_cumprod.double().numpy()
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS: dict[str, Any] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "ddim-v": lambda: DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "euler": lambda: EulerDiscreteScheduler(timestep_spacing="trailing"),
    "dpm": lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    "dpm-flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc-flow": lambda: UniPCMultistepScheduler(**FLOW),
}
FIRST_ORDER = ("ddim", "ddim-v", "euler")


def model(scheduler: Any, x: torch.Tensor, time: float) -> torch.Tensor:
    """What a perfect model of this data says at x = alpha x_0 + sigma n, the variance kept or a flow."""
    kind = scheduler.config.prediction_type
    if kind == "flow_prediction":
        alpha, sigma = 1 - time / 1000, time / 1000
    else:
        signal = float(np.exp(np.interp(time, np.arange(1000), np.log(SIGNAL))))
        alpha, sigma = signal**0.5, (1 - signal) ** 0.5
    clean = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x
    noise = (x - alpha * clean) / sigma
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "flow_prediction": noise - clean,
    }[kind]


def run(scheduler: Any, steps: int, rows: int = 1) -> tuple[torch.Tensor, int]:
    """A run as pipelines make it: the data, and how often the model was asked."""
    scheduler.set_timesteps(steps)
    noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(rows, 1)
    x, calls = noise * scheduler.init_noise_sigma, 0
    for time in scheduler.timesteps:
        output = model(scheduler, scheduler.scale_model_input(x, time), float(time))
        x, calls = scheduler.step(output, time, x, return_dict=False)[0], calls + 1
    return x, calls


def planned(name: str, budget: float, target: str) -> tuple[torch.Tensor, int]:
    pipe = SimpleNamespace(scheduler=SAMPLERS[name]())
    own = pipe.scheduler
    with elastic_scheduler(pipe, universal_planner(budget, target)) as scheduler:
        made = run(scheduler, 20)
    assert pipe.scheduler is own
    return made


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_full_budget_is_the_samplers_own_run_bit_for_bit(name: str) -> None:
    own, _ = run(SAMPLERS[name](), 20)
    made, calls = planned(name, 1.0, "dense")
    assert calls == 20 and torch.equal(made, own)


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_of_the_evaluations_come_nearer_to_the_exact_solution_than_half_of_the_own_steps(
    name: str,
) -> None:
    exact, _ = run(SAMPLERS[name](), 999 if name in FIRST_ORDER else 200)
    made, calls = planned(name, 0.5, "exact")
    fewer, _ = run(SAMPLERS[name](), 10)
    assert calls == 10
    assert distance(made, exact) < distance(fewer, exact)
    if name in FIRST_ORDER:  # nearer than all of the dense run's steps
        assert distance(made, exact) < distance(run(SAMPLERS[name](), 20)[0], exact)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_the_dense_target_comes_nearer_to_the_run_of_all_steps_than_fewer_steps(name: str) -> None:
    dense, _ = run(SAMPLERS[name](), 20)
    made, calls = planned(name, 0.5, "dense")
    fewer, _ = run(SAMPLERS[name](), 10)
    assert calls == 10 and distance(made, dense) < distance(fewer, dense) / 2


@pytest.mark.parametrize(
    ("scheduler", "what"),
    [
        (DDPMScheduler(), "DDPMScheduler"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "sde"),
    ],
)
def test_samplers_with_noise_of_their_own_are_refused(scheduler: Any, what: str) -> None:
    pipe = SimpleNamespace(scheduler=scheduler)
    with pytest.raises(ValueError, match=what), elastic_scheduler(pipe, universal_planner(0.5, "dense")):
        pass


def test_noise_that_is_asked_for_is_refused() -> None:
    pipe = SimpleNamespace(scheduler=SAMPLERS["ddim"]())
    with elastic_scheduler(pipe, universal_planner(0.5, "dense")) as scheduler:
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="eta"):
            scheduler.step(SPREAD, scheduler.timesteps[0], SPREAD, eta=1.0)


@pytest.mark.parametrize("target", ["dense", "exact"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_with_plans_of_their_own_go_where_they_go_alone(name: str, target: str) -> None:
    budgets, pipe = (0.3, 0.6), SimpleNamespace(scheduler=SAMPLERS[name]())

    def planner(grid: Any) -> Any:
        return RowPlans([universal_planner(budget, target)(grid) for budget in budgets])  # type: ignore[misc]

    with elastic_scheduler(pipe, planner) as scheduler:
        together, _ = run(scheduler, 20, rows=2)
    for row, budget in zip(together, budgets, strict=True):
        alone, _ = planned(name, budget, target)
        torch.testing.assert_close(row, alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [0.5, 1.0])
@pytest.mark.parametrize("name", [*SAMPLERS, "flow"])
def test_copies_of_a_scheduler_do_not_mix_their_runs(name: str, budget: float) -> None:
    """As pipelines make them for frames of their own: taking turns, each goes where it goes alone."""
    pipe = SimpleNamespace(
        scheduler=FlowMatchEulerDiscreteScheduler() if name == "flow" else SAMPLERS[name]()
    )
    with elastic_scheduler(pipe, universal_planner(budget, "exact" if budget < 1 else "dense")) as scheduler:
        scheduler.set_timesteps(10)
        starts = [torch.randn(1, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

        def onward(copied: Any, x: torch.Tensor, time: Any) -> torch.Tensor:
            moved: torch.Tensor = copied.step(x * (1 + float(time) / 1000), time, x, return_dict=False)[0]
            return moved

        alone = []
        for x in starts:
            copied = copy.deepcopy(scheduler)
            for time in copied.timesteps:
                x = onward(copied, x, time)
            alone.append(x)
        copies, together = [copy.deepcopy(scheduler) for _ in starts], list(starts)
        for time in scheduler.timesteps:
            together = [onward(copied, x, time) for copied, x in zip(copies, together, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# -- in pipelines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit() -> Any:
    """An older pipeline, whose one call a step holds both branches."""
    from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        norm_num_groups=4, sample_size=4, num_embeds_ada_norm=1000, patch_size=2,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(), id2label={0: "cat"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe([0, 1], num_inference_steps=10, generator=generator, output_type="np").images)


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_a_pipeline_meets_a_budget_and_has_its_scheduler_back(dit: Any, name: str) -> None:
    own = dit.scheduler = SAMPLERS[name]()
    dense, calls = picture(dit), []
    handle = dit.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    sampled = routers.attach(dit, budget=0.4)
    try:
        assert isinstance(sampled, Sampled)
        assert not np.array_equal(picture(dit), dense)
        assert sampled.trace is not None and sampled.trace.spent == [len(calls) / 10] == [0.4]
        with pytest.raises(ValueError, match="already follows a plan"):
            routers.attach(dit, budget=0.5)
        with sampled.scope(budget=1.0):
            assert np.array_equal(picture(dit), dense)
    finally:
        sampled.detach()
        handle.remove()
    assert dit.scheduler is own and np.array_equal(picture(dit), dense)


def test_a_sampler_that_no_plan_stands_in_for_keeps_its_steps(dit: Any) -> None:
    """The transformer then leaves out what the budget does not buy."""
    own = dit.scheduler = DDPMScheduler()
    torch.manual_seed(0)
    dense, calls = picture(dit), []
    handle = dit.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    on_grid = routers.attach(dit, budget=0.4)
    try:
        assert isinstance(on_grid, OnGrid) and dit.scheduler is own
        assert not np.array_equal(picture(dit), dense)
        assert on_grid.trace is not None and on_grid.trace.spent == [len(calls) / 10] == [0.4]
    finally:
        on_grid.detach()
        handle.remove()
    torch.manual_seed(0)
    assert np.array_equal(picture(dit), dense)
