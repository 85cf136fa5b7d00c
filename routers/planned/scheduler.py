"""The scheduler that steps over what a plan leaves out, in the place of the pipeline's own.

`set_timesteps` lays out the pipeline's own times first, whatever it was given (steps, custom sigmas, a shift
that depends on the size), hands them to a planner, and offers the plan's times instead: the pipeline makes
the plan's evaluations and knows of no others, so that what is left out costs nothing at all. Its progress
bar, callbacks and masks go by the times that they are offered.

A run from a picture (img2img, inpainting) begins part of the way. Pipelines find that place by
`get_timesteps(steps, strength)`; while the scheduler is in place, it answers on the pipeline's own grid, so
that `strength` means the same noise as ever, and what remains of the grid gets a plan of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from .closed_loop import Follower, Steps
from .timeplan import Array, TimePlan

Planner = Callable[[Array], Steps]
"""From the times of a run's own grid [N + 1] to what is done instead."""


class ElasticFlowScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' flow-matching Euler scheduler with a plan's times and weights.

    planner: set by `elastic_scheduler`. grid [N + 1]: the pipeline's own times of this run. plan: what is
    done instead.
    """

    planner: Planner
    plan: Steps
    timesteps: Tensor
    sigmas: Tensor
    grid: Array
    _run: Follower

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As the pipeline's own scheduler (pipelines look at the arguments' names), then the plan's times."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._offer(np.array(self.sigmas.tolist()))

    def begin_at(self, strength: float) -> Tensor:
        """A run that begins at the step of its own grid that `strength` means; returns its times."""
        steps = len(self.grid) - 1
        first = int(max(steps - min(steps * strength, steps), 0))
        self._offer(self.grid[first:])
        self.set_begin_index(0)
        return self.timesteps

    def _offer(self, grid: Array) -> None:
        self.grid, self.plan = grid, self.planner(grid)
        device = self.timesteps.device
        self.sigmas = torch.tensor(self.plan.times.tolist(), dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = len(self.timesteps)

    def _init_step_index(self, timestep: Any) -> None:
        super()._init_step_index(timestep)
        if self._step_index and isinstance(self.plan, TimePlan):
            self.plan = self.plan.begun_at(self._step_index)
        self._run = Follower(self.plan)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """One step of the plan, in float32. Raises ValueError for tokens with times of their own."""
        if kwargs.get("per_token_timesteps") is not None:
            raise ValueError("a plan has one time for all tokens; detach it where tokens have their own")
        if self.step_index is None:
            self._init_step_index(timestep)
        step = self.step_index
        size = float(self.sigmas[step + 1].double() - self.sigmas[step].double())
        after = self._run.step(step, sample, model_output, size).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=after) if return_dict else (after,)


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError, with the reason, if a plan in time cannot take this scheduler's place."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"a plan in time takes the place of FlowMatchEulerDiscreteScheduler, and this pipeline has "
            f"{type(scheduler).__name__}"
        )
    for name in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(name):
            raise ValueError(f"a plan in time follows the flow's own times; this scheduler has {name}=True")


@contextmanager
def elastic_scheduler(pipe: Any, planner: Planner) -> Iterator[ElasticFlowScheduler]:
    """The pipeline on a planner's times and weights instead of its own. Raises as `check_scheduler`."""
    check_scheduler(pipe.scheduler)
    before = pipe.scheduler
    scheduler = ElasticFlowScheduler.from_config(before.config)
    scheduler.set_shift(before.shift)  # it may have been set after the scheduler was made
    scheduler.planner = planner
    pipe.scheduler = scheduler
    starts_late = hasattr(pipe, "get_timesteps")
    if starts_late:

        def get_timesteps(
            num_inference_steps: int, strength: float, device: Any = None
        ) -> tuple[Tensor, int]:
            times = scheduler.begin_at(strength)
            return times, len(times)

        pipe.get_timesteps = get_timesteps
    try:
        yield scheduler
    finally:
        pipe.scheduler = before
        if starts_late:
            del pipe.get_timesteps
