"""Flow-matching schedules of Hunyuan3D. Time runs from 0 (noise) to 1 (data); sigma is that time.

Not interchangeable with diffusers' class of the same name, whose time runs the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from routers.planned.scheduler import Planner

    from .elastic_scheduler import ElasticMeshScheduler


class FlowMatchEulerScheduler:
    """Euler steps on `shift`-warped times, followed by sigma 1.

    The pipeline passes `linspace(0, 1, N)`, so its last step has size zero: N evaluations, N - 1 effective
    steps. `timesteps [N]` and `sigmas [N + 1]` are float32.
    """

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

    def planned(self, planner: Planner, on_step: Callable[[], None]) -> ElasticMeshScheduler:
        """The scheduler that makes a plan's evaluations in this one's place (see `routers.planned`)."""
        from .elastic_scheduler import ElasticMeshScheduler

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
