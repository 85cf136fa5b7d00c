"""A plan in time for Hunyuan3D: its scheduler's counterpart of `routers.planned.scheduler`.

Hunyuan3D's time runs from 0 (noise) to 1 (data), its velocity the other way, and its last step has size
zero: that evaluation changes nothing, and no plan makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routers.planned.closed_loop import Follower, Steps
from routers.planned.timeplan import Array, moving

from .schedulers import FlowMatchEulerScheduler


class ElasticMeshScheduler(FlowMatchEulerScheduler):
    """Another scheduler's times, replaced by a planner's. plan: what the present run follows."""

    def __init__(self, own: FlowMatchEulerScheduler, planner: Callable[[Array], Steps]) -> None:
        self.own, self.planner = own, planner
        super().__init__(own.num_train_timesteps, own.shift)

    def set_timesteps(
        self, num_steps: int | None = None, sigmas: Sequence[float] | np.ndarray | None = None
    ) -> None:
        """The own scheduler's times, then the plan's."""
        self.own.set_timesteps(num_steps, sigmas)
        self.plan = self.planner(moving(1 - np.array(self.own.sigmas.tolist())))
        self.sigmas = torch.tensor((1 - self.plan.times).tolist())
        self.timesteps = self.sigmas[:-1] * self.num_train_timesteps
        self._run = Follower(self.plan)

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """One step of the plan in float32."""
        size = (self.sigmas[index] - self.sigmas[index + 1]).item()
        return self._run.step(index, sample, -velocity, size).to(velocity.dtype)


@contextmanager
def elastic_mesh_scheduler(pipe: Any, planner: Callable[[Array], Steps]) -> Iterator[ElasticMeshScheduler]:
    """The mesh pipeline on a planner's times and weights instead of its own."""
    before = pipe.scheduler
    pipe.scheduler = ElasticMeshScheduler(before, planner)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = before
