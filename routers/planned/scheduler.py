"""The scheduler that steps over what a plan leaves out, in the place of the pipeline's own.

`set_timesteps` lays out the pipeline's own times first, whatever it was given (steps, custom sigmas, a shift
that depends on the size), hands them to a planner, and offers the plan's times instead: the pipeline makes
the plan's evaluations and knows of no others, so that what is left out costs nothing at all. Its progress
bar, callbacks and masks go by the times that they are offered.

A run from a picture (img2img, inpainting) begins part of the way. Pipelines find that place by
`get_timesteps(steps, strength)`; while the scheduler is in place, it answers on the pipeline's own grid, so
that `strength` means the same noise as ever, and what remains of the grid gets a plan of its own. That holds
for every pipeline that shares the scheduler, whenever it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ..calls import sent
from .apart import RowFollower, RowPlans
from .follow import Follower, Planner, Steps, follower
from .ode import ElasticOdeScheduler, check_ode
from .serving import OnStep, Serving, check_free, uncounted
from .timeplan import Array, TimePlan


class ElasticFlowScheduler(Serving, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' flow-matching Euler scheduler with a plan's times and weights.

    planner: set by `elastic_scheduler`. grid [N + 1]: the pipeline's own times of this run. plan: what is
    done instead, None for the pipeline's own steps.
    """

    plan: Steps | None
    sigmas: Tensor
    grid: Array
    _run: Follower | RowFollower

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As the pipeline's own scheduler (pipelines look at the arguments' names), then the plan's times."""
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        self.serve()
        self._device = torch.device("cpu" if device is None else device)
        self.grid = np.array(self.sigmas.tolist())  # on the CPU: no device is waited for
        self._steps = len(self.grid) - 1
        self._offer(0)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: some pipelines ask any scheduler that is not diffusers' own."""
        return sample

    def _offer(self, first: int) -> None:
        grid = self.grid[first:]
        self.plan = self.planner(grid)
        if first:
            self.set_begin_index(0)
        self._take(grid if self.plan is None else self.plan.times)

    def _take(self, times: Array) -> None:
        single = times.astype(np.float32)
        self.sigmas = sent(torch.from_numpy(single), self._device)
        self._sizes = np.diff(single.astype(np.float64)).tolist()
        self.timesteps = self.offered(self.sigmas[:-1] * self.config.num_train_timesteps)
        self.num_inference_steps = len(self.timesteps)

    def _follow(self, steps: Steps) -> None:
        self.plan = steps
        self._take(steps.times)

    def _init_step_index(self, timestep: Any) -> None:
        super()._init_step_index(timestep)
        self._first: int = self._step_index
        if self._step_index and isinstance(self.plan, TimePlan | RowPlans):
            self.plan = self.plan.begun_at(self._step_index)
        if self.plan is not None:
            self._run = follower(self.plan)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """One step of the plan, in float32. Tokens with times of their own go the same way, each to the next
        of the plan's times.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        step = self.step_index
        self.evaluated(step - self._first + 1, sample, model_output)
        if self.plan is None:
            return super().step(model_output, timestep, sample, return_dict=return_dict, **kwargs)
        if kwargs.get("per_token_timesteps") is not None:
            if isinstance(self.plan, RowPlans):
                raise ValueError("tokens have times of their own here, and so rows cannot: give one budget")
            way = self._run.step(step, sample, model_output, 1.0) - sample.float()
            return super().step(way, timestep, sample, return_dict=return_dict, **kwargs)
        # the step's size from the host: asked of the device, it would wait for all that is queued there
        after = self._run.step(step, sample, model_output, self._sizes[step]).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=after) if return_dict else (after,)


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError, with the reason, if a plan in time cannot take this scheduler's place."""
    check_free(scheduler)
    if hasattr(scheduler, "planned"):
        return
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        check_ode(scheduler)
        return
    for name in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(name):
            raise ValueError(f"a plan in time follows the flow's own times; this scheduler has {name}=True")


def takes_plans(scheduler: Any) -> bool:
    """Whether a plan in time can take a scheduler's place. Raises ValueError if one has taken it."""
    check_free(scheduler)
    try:
        check_scheduler(scheduler)
    except ValueError:
        return False
    return True


@contextmanager
def elastic_scheduler(pipe: Any, planner: Planner, on_step: OnStep = uncounted) -> Iterator[Any]:
    """The pipeline on a planner's times and weights instead of its own. Raises as `check_scheduler`.

    A scheduler that is not diffusers' may bring its own counterpart: `scheduler.planned(planner, on_step)`.
    on_step: called at each evaluation.
    """
    check_scheduler(pipe.scheduler)
    before = pipe.scheduler
    if hasattr(before, "planned"):
        scheduler = before.planned(planner, on_step)
    elif not isinstance(before, FlowMatchEulerDiscreteScheduler):
        scheduler = ElasticOdeScheduler(before, planner, on_step)
    else:
        scheduler = ElasticFlowScheduler.from_config(before.config)
        scheduler.set_shift(before.shift)  # it may have been set after the scheduler was made
        scheduler.planner, scheduler.on_step, scheduler._patched = planner, on_step, []
    inside = [part for part in vars(pipe).values() if getattr(part, "scheduler", None) is before]
    owners = [pipe, *inside]  # some pipelines run another one around the same components
    for owner in owners:
        owner.scheduler = scheduler
    try:
        yield scheduler
    finally:
        for owner in owners:
            if owner.scheduler is scheduler:  # not what somebody has put there since
                owner.scheduler = before
        scheduler.leave()
