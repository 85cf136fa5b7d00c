"""Two transformers, each for a part of the steps (Wan 2.2): one plan, one trace, caches of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import routers
from routers.elastic import Elastic
from routers.policy import FixedPolicy
from routers.trace import FULL, REUSE
from tests.zoo.model import Model
from tests.zoo.videos import VIDEOS

STEPS, BLOCKS = 8, 3
MODEL: Model = next(model for model in VIDEOS if model.name == "WanTransformer3DModel")


@pytest.fixture
def pipe() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    second = MODEL.build()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=MODEL.build(),
        transformer_2=second, boundary_ratio=0.6,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: Any) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 2, 8, 8, generator=drawn)
    prompts = [torch.randn(1, 5, 12, generator=drawn) for _ in range(2)]
    result: torch.Tensor = pipe(
        prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], latents=latents,
        num_inference_steps=STEPS, height=64, width=64, num_frames=5, guidance_scale=4.0,
        output_type="latent",
    ).frames  # fmt: skip
    return result


def test_one_run_goes_over_both_halves(pipe: Any) -> None:
    dense = make(pipe)
    elastic = Elastic(pipe.transformer, None, pipe=pipe)
    with elastic.scope() as trace:
        opened = make(pipe)
    assert torch.equal(opened, dense)
    assert trace.num_steps == STEPS
    assert [record.step for record in trace.calls[::2]] == list(range(STEPS))
    assert {record.branch for record in trace.calls} == {"cond", "uncond"}
    elastic.detach()
    assert torch.equal(make(pipe), dense)
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert not any("forward" in vars(module) for module in transformer.modules())


def test_a_plan_is_followed_in_both_and_no_cache_crosses_over(pipe: Any) -> None:
    elastic = Elastic(pipe.transformer, None, pipe=pipe)
    plan = np.full((STEPS, BLOCKS), REUSE)
    plan[0] = FULL
    with elastic.scope(policy=FixedPolicy(plan, order=0)) as trace:
        make(pipe)
    computed = [bool((record.actions == FULL).all()) for record in trace.calls[::2]]
    switch = computed.index(True, 1)
    assert 1 < switch < STEPS - 1
    assert computed == [step in (0, switch) for step in range(STEPS)]
    assert trace.spent[0] < 0.5


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_a_budget_counts_the_evaluations_of_both(pipe: Any, budget: float) -> None:
    """They cost the same: the share of evaluations is that of the FLOPs."""
    counts = [0, 0]

    def count(half: int) -> Any:
        def add(*_: Any) -> None:
            counts[half] += 1

        return add

    for half, transformer in enumerate((pipe.transformer, pipe.transformer_2)):
        transformer.register_forward_pre_hook(count(half))
    handle = routers.attach(pipe, budget=budget)
    make(pipe)
    assert min(counts) > 0
    assert sum(counts) == 2 * STEPS * budget  # with and without the prompt
    assert handle.trace.spent == [budget]
    pipe.scheduler.set_timesteps(STEPS)  # WanAnimate does so once more when all is made
    assert handle.trace.spent == [budget]
    with handle.scope() as trace:
        make(pipe)
        pipe.scheduler.set_timesteps(STEPS)
    assert trace.spent == handle.trace.spent == [budget]
    handle.detach()
