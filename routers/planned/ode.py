"""A plan in the place of any sampler of diffusers that solves an ODE: DDIM, DPM-Solver, UniPC, Euler.

Whatever the noise schedule and whatever the model predicts, the ODE is that of the flow in `flow.py`; the
plan is followed there, and the pipeline sees its own scheduler with other timesteps. DDIM's steps are Euler's
there. The dense run of a solver of higher order is near to the exact solution, so that a plan aims at that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .flow import KINDS, Point
from .follow import Planner, Steps, follower
from .serving import OnStep, Serving
from .timeplan import Array

FINISHED = 1e-6
"""Noise over signal that counts as none."""
VARIANCE_EXPLODING = ("EulerDiscreteScheduler",)
"""x = x_0 + sigma n; the others keep the variance, or follow a flow."""
FIRST_ORDER = ("DDIMScheduler", *VARIANCE_EXPLODING)
CLASSES = (
    *FIRST_ORDER, "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


def check_ode(scheduler: Any) -> None:
    """Raises ValueError, with the reason, if a scheduler does not solve an ODE that is known here."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in CLASSES:
        raise ValueError(
            f"a plan in time stands in for FlowMatchEulerDiscreteScheduler, {', '.join(CLASSES)}; this "
            f"pipeline has {name}"
        )
    if "sde" in str(config.get("algorithm_type")):
        raise ValueError(f"{name} with algorithm_type={config.algorithm_type!r} adds noise at every step")
    if _kind(config) not in KINDS:
        raise ValueError(f"{name} has prediction_type={config.prediction_type!r}, which is not known here")


def _kind(config: Any) -> str:
    return "flow_prediction" if config.get("use_flow_sigmas") else str(config.prediction_type)


class ElasticOdeScheduler(Serving):
    """Another scheduler with a plan's timesteps and steps. own: the scheduler; all else is its own.

    plan: what the present run follows, None for the own steps. timesteps [n]. points [n + 1].
    """

    def __init__(self, own: Any, planner: Planner, on_step: OnStep) -> None:
        self.own, self.planner, self.on_step = own, planner, on_step
        self.higher_order = type(own).__name__ not in FIRST_ORDER
        self.plan: Steps | None = None
        self.timesteps, self._patched = own.timesteps, []

    def __getattr__(self, name: str) -> Any:
        if name == "own" or name.startswith("__"):  # asked for while a copy is made
            raise AttributeError(name)
        return getattr(self.own, name)

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """As the own scheduler, whose arguments' names pipelines look at, then the plan's times."""

        def begin(*args: Any, **kwargs: Any) -> None:
            self.own.set_timesteps(*args, **kwargs)
            self.serve()
            self._steps = len(self.own.timesteps)
            self._offer(0)

        return functools.wraps(self.own.set_timesteps)(begin)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where a run from a picture starts: `begin_at` has seen to it."""

    def _offer(self, first: int) -> None:
        own, ratios = self.own.timesteps[first:], self._ratios()[first:]
        grid = ratios / (1 + ratios)
        self._begun = first
        self.plan, self._index = self.planner(grid), 0
        if self.plan is None:
            self.timesteps = own
            if hasattr(self.own, "set_begin_index"):
                self.own.set_begin_index(first)
            return
        self._follow(self.plan)
        self._run = follower(self.plan)

    def _follow(self, steps: Steps) -> None:
        self.plan = steps
        own, ratios = self.own.timesteps[self._begun :], self._ratios()[self._begun :]
        grid, times = ratios / (1 + ratios), np.asarray(steps.times)
        self.points = [self._point(float(s / max(1 - s, FINISHED))) for s in times]
        known, at = own.double().cpu().numpy(), grid[: len(own)]
        moved = np.interp(-times[:-1], -at, known)
        exact = np.isin(times[:-1], at).all()
        moved = torch.from_numpy(moved).to(own.dtype if exact else torch.float32).to(own.device)
        self.timesteps = self.offered(moved)

    def _ratios(self) -> Array:
        """[N + 1]: noise over signal, sigma / alpha, at the own steps and at the end."""
        if hasattr(self.own, "sigmas"):
            sigmas = self.own.sigmas.double().cpu().numpy()
            flow = _kind(self.own.config) == "flow_prediction"
            return np.asarray(sigmas / np.maximum(1 - sigmas, FINISHED) if flow else sigmas)
        signal = self.own.alphas_cumprod.double()[self.own.timesteps.cpu().long()].numpy()
        return np.append(np.sqrt((1 - signal) / np.maximum(signal, FINISHED**2)), 0.0)

    def _point(self, ratio: float) -> Point:
        if _kind(self.own.config) == "flow_prediction":
            return Point(1 / (1 + ratio), ratio / (1 + ratio))
        if type(self.own).__name__ in VARIANCE_EXPLODING:
            return Point(1.0, ratio)
        return Point(1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the model is shown of a sample."""
        if self.plan is None:
            return self.own.scale_model_input(sample, timestep)  # type: ignore[no-any-return]
        point = self.points[self._index]
        exploding = type(self.own).__name__ in VARIANCE_EXPLODING
        return sample / (1 + point.sigma**2) ** 0.5 if exploding else sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """One step of the plan, in float32. Raises ValueError for noise of its own (eta)."""
        index, self._index = self._index, self._index + 1
        self.evaluated(index + 1)
        if self.plan is None:
            return self.own.step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        if kwargs.get("eta"):
            raise ValueError("a plan in time solves an ODE, and eta above 0 adds noise; leave eta out")
        now, then = self.points[index : index + 2]
        x, kind = sample.float(), _kind(self.own.config)
        size = float(self.plan.times[index + 1] - self.plan.times[index])
        velocity = now.velocity(model_output.float(), x, kind)
        after = then.from_flow(self._run.step(index, now.to_flow(x), velocity, size)).to(sample.dtype)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)
