"""Flow-matching schedules of Hunyuan3D. Time runs from 0 (noise) to 1 (data); sigma is that time.

Not interchangeable with diffusers' class of the same name, whose time runs the other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from routers.planned.follow import Steps, follower
from routers.planned.serving import OnStep, Serving

if TYPE_CHECKING:
    from routers.planned.follow import Planner


class FlowMatchEulerScheduler:
    """Euler steps on `shift`-warped times, followed by sigma 1.

    The pipeline passes `linspace(0, 1, N)`, so its last step has size zero: N evaluations, N - 1 effective
    steps. `timesteps [N]` and `sigmas [N + 1]` are float32.
    """

    warps: Mapping[str, tuple[float, float]] = {"dense": (1.0, 1.3), "exact": (0.5, 1.0)}
    """Of a plan's times where nothing was measured: shapes form late in a run (docs/notes/solver-plan.md)."""

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.num_train_timesteps, self.shift = num_train_timesteps, shift
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self, num_steps: int | None = None, sigmas: Sequence[float] | np.ndarray | None = None
    ) -> None:
        """Prepare a run, from explicit times in [0, 1] or from a number of steps (`linspace(1/T, 1, N)`)."""
        if sigmas is None:
            if num_steps is None or num_steps < 1:
                raise ValueError(f"num_steps must be at least 1, not {num_steps}")
            warped = np.linspace(1.0 / self.num_train_timesteps, 1.0, num_steps)
        else:
            times = np.asarray(sigmas, dtype=np.float64)
            warped = self.shift * times / (1 + (self.shift - 1) * times)
        self._store(warped)

    def _store(self, sigmas: np.ndarray) -> None:
        tensor = torch.from_numpy(sigmas).float()
        self.timesteps = tensor * self.num_train_timesteps
        self.sigmas = torch.cat([tensor, torch.ones(1)])

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """`sample + (sigma[i + 1] - sigma[i]) * velocity` in float32, in the velocity's dtype."""
        size = (self.sigmas[index + 1] - self.sigmas[index]).item()
        return (sample.float() + size * velocity.float()).to(velocity.dtype)

    def planned(self, planner: Planner, on_step: OnStep) -> ElasticMeshScheduler:
        """The scheduler that makes a plan's evaluations in this one's place (see `routers.planned`)."""
        return ElasticMeshScheduler(self, planner, on_step)

    def pred_original(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """The data that this velocity points at, in float32."""
        return sample.float() + (1.0 - self.sigmas[index].item()) * velocity.float()


class ConsistencyFlowMatchEulerScheduler(FlowMatchEulerScheduler):
    """Schedule of the step-distilled (-turbo) checkpoints: N of `pcm_timesteps` anchors, evenly spread.

    Every one of the N evaluations counts here. Only the number of times matters, not their values.
    """

    def __init__(self, num_train_timesteps: int = 1000, pcm_timesteps: int = 100) -> None:
        self.pcm_timesteps = pcm_timesteps
        stride = num_train_timesteps // pcm_timesteps
        grid = np.linspace(0.0, 1.0, num_train_timesteps)
        self._anchors = grid[[0, *(k * stride - 1 for k in range(1, pcm_timesteps))]]
        super().__init__(num_train_timesteps)

    def set_timesteps(
        self, num_steps: int | None = None, sigmas: Sequence[float] | np.ndarray | None = None
    ) -> None:
        """Prepare a run of `num_steps`, or of as many steps as there are `sigmas`."""
        count = num_steps if sigmas is None else len(sigmas)
        if count is None or count < 1:
            raise ValueError(f"num_steps must be at least 1, not {count}")
        chosen = np.floor(np.linspace(0, self.pcm_timesteps, count, endpoint=False)).astype(int)
        self._store(self._anchors[chosen])


class ElasticMeshScheduler(Serving, FlowMatchEulerScheduler):
    """Another scheduler's times, replaced by a planner's: the counterpart of `routers.planned.scheduler`.

    own: the scheduler. plan: what the present run follows, None for the own steps. A plan's times run from 1
    to 0, as those of a flow, and the velocity is the opposite one. The evaluation before a step of size zero
    changes nothing, and no plan makes it.
    """

    own: FlowMatchEulerScheduler

    def __init__(self, own: FlowMatchEulerScheduler, planner: Planner, on_step: OnStep) -> None:
        self.own, self.planner, self.on_step = own, planner, on_step
        self.num_train_timesteps, self.shift = own.num_train_timesteps, own.shift
        self.sigmas, self.timesteps = own.sigmas, own.timesteps
        self.plan: Steps | None = None
        self._patched = []

    def set_timesteps(
        self, num_steps: int | None = None, sigmas: Sequence[float] | np.ndarray | None = None
    ) -> None:
        """The own scheduler's times, then the plan's; without a plan, the own ones."""
        self.own.set_timesteps(num_steps, sigmas)
        self.plan = self.planner(1 - np.array(self.own.sigmas.tolist()))
        if self.plan is None:
            self.sigmas, self.timesteps = self.own.sigmas, self.own.timesteps
            return
        self._follow(self.plan)
        self._run = follower(self.plan)

    def _follow(self, steps: Steps) -> None:
        self.plan = steps
        self.sigmas = torch.tensor((1 - steps.times).tolist())
        self.timesteps = self.offered(self.sigmas[:-1] * self.num_train_timesteps)

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """One step of the plan in float32."""
        self.evaluated(index + 1, sample, -velocity)
        if self.plan is None:
            return self.own.step(velocity, index, sample)
        size = (self.sigmas[index] - self.sigmas[index + 1]).item()
        return self._run.step(index, sample, -velocity, size).to(velocity.dtype)
