"""A plan in time for Hunyuan3D: its scheduler's counterpart of `routers.planned.scheduler`.

Hunyuan3D's time runs from 0 (noise) to 1 (data), its velocity the other way, and its last step has size
zero: that evaluation changes nothing, and no plan makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from routers.planned.follow import Follower, Steps
from routers.planned.scheduler import Planner

from .schedulers import FlowMatchEulerScheduler


class ElasticMeshScheduler(FlowMatchEulerScheduler):
    """Another scheduler's times, replaced by a planner's. plan: what the present run follows."""

    plan: Steps | None

    def __init__(self, own: FlowMatchEulerScheduler, planner: Planner, on_step: Callable[[], None]) -> None:
        self.own, self.planner, self.on_step = own, planner, on_step
        self.num_train_timesteps, self.shift = own.num_train_timesteps, own.shift
        # no run has begun: the planner is not asked yet
        self.plan, self.sigmas, self.timesteps = None, own.sigmas, own.timesteps

    def set_timesteps(
        self, num_steps: int | None = None, sigmas: Sequence[float] | np.ndarray | None = None
    ) -> None:
        """The own scheduler's times, then the plan's; without a plan, the own ones."""
        self.own.set_timesteps(num_steps, sigmas)
        self.plan = self.planner(1 - np.array(self.own.sigmas.tolist()))
        if self.plan is None:
            self.sigmas, self.timesteps = self.own.sigmas, self.own.timesteps
            return
        self.sigmas = torch.tensor((1 - self.plan.times).tolist())
        self.timesteps = self.sigmas[:-1] * self.num_train_timesteps
        self._run = Follower(self.plan)

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """One step of the plan in float32."""
        self.on_step()
        if self.plan is None:
            return self.own.step(velocity, index, sample)
        size = (self.sigmas[index] - self.sigmas[index + 1]).item()
        return self._run.step(index, sample, -velocity, size).to(velocity.dtype)

    def leave(self) -> None:
        """Nothing of the pipeline was replaced."""
