"""A plan's scheduler in a pipeline's place: bit for bit where nothing changes, img2img, masks, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from backbones.hunyuan3d.pipeline import denoise
from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
from backbones.solvers import solver
from routers.planned.closed_loop import StageFit, Trajectory
from routers.planned.scheduler import ElasticFlowScheduler, elastic_scheduler
from routers.planned.timeplan import adams_bashforth, euler, moving, resampled
from tests.tiny_pipelines import make_flux

SIGMAS = np.linspace(1.0, 1 / 8, 8).tolist()
START = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def elastic(planner, **config) -> ElasticFlowScheduler:
    scheduler = ElasticFlowScheduler(**config)
    scheduler.planner, scheduler.on_step, scheduler._patched = planner, lambda number: None, []
    return scheduler


def follow(scheduler, x: torch.Tensor = START, **times) -> torch.Tensor:
    """A run on v = x (1 + s), from the times that the scheduler offers."""
    scheduler.set_timesteps(**(times or {"sigmas": SIGMAS}))
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = scheduler.step(x * (1 + t / 1000), t, x, return_dict=False)[0]
    return x


def ab2(**times) -> torch.Tensor:
    """The same run by `backbones.solvers`."""
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    with solver(pipe, "ab2"):
        return follow(pipe.scheduler, **times)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift_terminal": 0.02}])
def test_an_euler_plan_of_all_steps_is_the_own_scheduler_bit_for_bit(config: dict) -> None:
    for _ in range(2):
        ours = follow(elastic(euler, **config))
        assert torch.equal(ours, follow(FlowMatchEulerDiscreteScheduler(**config)))


def test_an_adams_bashforth_plan_is_the_solver_of_that_name() -> None:
    ours = follow(elastic(adams_bashforth))
    assert torch.allclose(ours, ab2(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, follow(FlowMatchEulerDiscreteScheduler()), rtol=1e-2)


def test_evaluations_are_fewer_than_steps_whatever_times_are_asked_for() -> None:
    grids = []

    def planner(grid):
        grids.append(grid)
        return euler(resampled(grid, 3))

    scheduler = elastic(planner, use_dynamic_shifting=True)
    for arguments in ({"num_inference_steps": 8}, {"sigmas": [1.0, 0.7, 0.4, 0.2]}):
        follow(scheduler, **arguments, mu=0.8)
        assert len(scheduler.timesteps) == 3 == scheduler.num_inference_steps
        own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        own.set_timesteps(**arguments, mu=0.8)
        assert np.array_equal(grids[-1], np.array(own.sigmas.tolist()))


def test_a_run_that_a_pipeline_begins_later_starts_without_history() -> None:
    scheduler = elastic(adams_bashforth)
    scheduler.set_timesteps(sigmas=SIGMAS)
    scheduler.set_begin_index(5)
    x = START
    for t in scheduler.timesteps[5:]:
        x = scheduler.step(x * (1 + t / 1000), t, x, return_dict=False)[0]
    assert torch.allclose(x, ab2(sigmas=SIGMAS[5:]), rtol=1e-6, atol=1e-6)


def test_masks_are_noised_to_the_time_that_comes_next() -> None:
    """Inpainting puts the known part back after each step, noised to the following time."""
    scheduler = elastic(lambda grid: euler(resampled(grid, 3)))
    scheduler.set_timesteps(sigmas=SIGMAS)
    scheduler.set_begin_index(0)
    clean, noise = torch.zeros(1, 4), torch.ones(1, 4)
    assert float(scheduler.scale_noise(clean, scheduler.timesteps[:1], noise)[0, 0]) == 1.0
    for i, t in enumerate(scheduler.timesteps[:-1]):
        scheduler.step(START, t, START)
        mixed = scheduler.scale_noise(clean, scheduler.timesteps[i + 1 : i + 2], noise)
        assert float(mixed[0, 0]) == pytest.approx(float(scheduler.timesteps[i + 1]) / 1000)


def test_a_fit_runs_inside_the_scheduler() -> None:
    times = np.append(np.array(SIGMAS, np.float32).astype(float), 0)
    target = Trajectory(times.tolist(), [START * np.exp(s - 1) for s in times])
    scheduler = elastic(lambda grid: StageFit(grid, target))
    x = follow(scheduler)
    assert torch.allclose(x, target.states[-1], atol=1e-3)
    assert torch.equal(follow(elastic(lambda grid: scheduler.plan.plan)), x)


def test_schedulers_that_a_plan_cannot_stand_in_for_are_refused() -> None:
    for scheduler, what in (
        (DDPMScheduler(), "DDPMScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ):
        pipe = SimpleNamespace(scheduler=scheduler)
        with pytest.raises(ValueError, match=what), elastic_scheduler(pipe, euler):
            pass
        assert pipe.scheduler is scheduler


def test_tokens_with_times_of_their_own_go_along_the_plan() -> None:
    """At the run's own time their step is the run's; diffusers' sign for them is the other one."""
    own, together = (elastic(adams_bashforth) for _ in range(2))
    x = y = START[:, :, None]
    for scheduler in (own, together):
        scheduler.set_timesteps(sigmas=SIGMAS)
        scheduler.set_begin_index(0)
    for t in own.timesteps:
        y = together.step(y * (1 + t / 1000), t, y, return_dict=False)[0]
        times = torch.full(x.shape[:2], float(t))
        x = own.step(-x * (1 + t / 1000), t, x, per_token_timesteps=times, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-5)


# -- in pipelines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(make_flux(tmp_path_factory.mktemp("flux")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(
        prompt="a cat", height=64, width=64, generator=generator, output_type="latent", **arguments
    ).images


def test_a_pipeline_makes_the_plans_evaluations_and_its_own_picture_with_all_of_them(flux) -> None:
    own, before = flux.scheduler, latents(flux, num_inference_steps=5)
    with elastic_scheduler(flux, euler):
        assert torch.equal(latents(flux, num_inference_steps=5), before)
    calls: list[float] = []

    def callback(pipe, step, t, arguments):
        calls.append(float(t))
        return arguments

    with elastic_scheduler(flux, lambda grid: adams_bashforth(resampled(grid, 2))) as scheduler:
        latents(flux, num_inference_steps=5, callback_on_step_end=callback)
        assert calls == scheduler.timesteps.tolist() and len(calls) == 2
    assert flux.scheduler is own and torch.equal(latents(flux, num_inference_steps=5), before)


def test_strength_means_the_same_noise_as_without_a_plan(flux) -> None:
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    other = FluxImg2ImgPipeline.from_pipe(flux)
    other.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3)))
    arguments = {"image": picture, "strength": 0.6, "num_inference_steps": 10}
    before = latents(other, **arguments)
    with elastic_scheduler(other, euler):
        assert torch.equal(latents(other, **arguments), before)
    grids = []

    def planner(grid):
        grids.append(grid)
        return euler(resampled(grid, 2))

    with elastic_scheduler(other, planner) as scheduler:
        latents(other, **arguments)
        assert len(grids[-1]) - 1 == 6 and scheduler.plan.times[0] == grids[-1][0]
    assert "get_timesteps" not in vars(other) and torch.equal(latents(other, **arguments), before)


# -- meshes -------------------------------------------------------------------------------------


class Spring(torch.nn.Module):
    """A model of meshes whose velocity is known: v = -x / 2, in its own time."""

    guidance_embed = False

    def forward(self, x: torch.Tensor, t: torch.Tensor, contexts, guidance=None) -> torch.Tensor:
        self.calls += 1
        return -x / 2


@pytest.mark.parametrize("steps", [2, 7])
def test_a_mesh_run_of_all_steps_is_its_own_bit_for_bit_and_needs_no_last_evaluation(steps: int) -> None:
    model = Spring()

    def make(scheduler, evaluations: int) -> torch.Tensor:
        done: list[tuple[int, int]] = []
        model.calls = 0
        made = denoise(model, scheduler, START[None], {}, steps, -1.0, lambda i, n, x: done.append((i, n)))
        assert model.calls == evaluations
        assert done == [(i + 1, evaluations) for i in range(evaluations)]
        return made

    pipe = SimpleNamespace(scheduler=FlowMatchEulerScheduler(shift=2.0))
    own = make(pipe.scheduler, steps)
    with elastic_scheduler(pipe, lambda grid: euler(moving(grid))):
        assert torch.equal(make(pipe.scheduler, steps - 1), own)
    with elastic_scheduler(pipe, lambda grid: euler(resampled(grid, 1))):
        assert torch.allclose(make(pipe.scheduler, 1), START[None] / 2)
    assert torch.equal(make(pipe.scheduler, steps), own)
