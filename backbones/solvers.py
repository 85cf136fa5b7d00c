"""Second-order multistep solvers for flow matching: nearer to the exact solution at the same price.

Both replace the Euler step of diffusers' `FlowMatchEulerDiscreteScheduler` and of Hunyuan3D's schedulers,
keep its times, and cost one model call per step, which elastic decisions apply to as ever.
`DPMSolverMultistepScheduler(use_flow_sigmas=True)` of diffusers 0.42 does not serve here: `QwenImagePipeline`
passes sigmas, which its `set_timesteps` does not take, and it rounds times to integers.

Time s runs from 1 (noise) to 0 (data): x_s = (1 - s) x_0 + s n, and v = n - x_0. Hunyuan3D's time and
velocity run the other way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
from routers.planned.serving import uncounted


class Multistep(ABC):
    """One run's solver, which remembers one earlier model output. The first step is Euler's."""

    _earlier: tuple[float, Tensor] | None = None
    """Time and value of what the last step kept."""

    @abstractmethod
    def advance(self, x: Tensor, v: Tensor, now: float, then: float) -> Tensor:
        """The sample at time `then` from the sample `x` and the model's `v` at time `now` > `then`."""


class AdamsBashforth2(Multistep):
    """Two-step Adams-Bashforth with variable steps: v continued linearly to the middle of the step."""

    def advance(self, x: Tensor, v: Tensor, now: float, then: float) -> Tensor:
        """Returns x + dt (v + dt / (2 dt_last) (v - v_last))."""
        earlier, self._earlier = self._earlier, (now, v)
        step = then - now
        if earlier is None:
            return x + step * v
        before, v_last = earlier
        return x + step * (v + step / 2 * ((v - v_last) / (now - before)))


class DpmSolver2M(Multistep):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with alpha = 1 - s and sigma = s.

    The last step, to s = 0, is first order, as the paper advises for few steps.
    """

    def advance(self, x: Tensor, v: Tensor, now: float, then: float) -> Tensor:
        """Exact for x_0 linear in half log-SNR; equal to Euler's step where there is no earlier output."""
        clean = estimate = x - now * v
        earlier, self._earlier = self._earlier, (now, clean)
        # at s = 1 the half log-SNR is minus infinity: its neighbour has weight 0
        if earlier is not None and then > 0 and earlier[0] < 1:
            before, clean_last = earlier
            ratio = (_log_snr(then) - _log_snr(now)) / (_log_snr(now) - _log_snr(before))
            estimate = clean + ratio / 2 * (clean - clean_last)
        # sigma_t / sigma_s x - alpha_t (exp(-h) - 1) x_0, with exp(-h) written in sigma and alpha
        shrink = then / now
        return shrink * x + ((1 - then) - shrink * (1 - now)) * estimate


def _log_snr(s: float) -> float:
    """Half log signal-to-noise ratio log((1 - s) / s) for 0 < s < 1."""
    return math.log((1 - s) / s)


MULTISTEP: dict[str, type[Multistep]] = {"ab2": AdamsBashforth2, "dpm++2m": DpmSolver2M}
"""The names of `spec.SOLVERS` but "euler"."""


def check_solver(pipe: Any, name: str) -> None:
    """Raises ValueError if the pipeline's scheduler is not one whose steps the solvers replace."""
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchEulerScheduler):
        raise ValueError(
            f"solver {name!r} stands in for FlowMatchEulerDiscreteScheduler, and this model has "
            f"{type(pipe.scheduler).__name__}; leave the solver out"
        )


@contextmanager
def solver(pipe: Any, name: str) -> Iterator[None]:
    """The pipeline with a solver of `spec.SOLVERS` on the same times. Raises as `check_solver`."""
    check_solver(pipe, name)
    if name not in MULTISTEP:
        yield
        return
    scheduler = pipe.scheduler
    steps = _hunyuan3d_step if isinstance(scheduler, FlowMatchEulerScheduler) else _diffusers_step
    scheduler.step = steps(scheduler, MULTISTEP[name])
    try:
        yield
    finally:
        del scheduler.step  # the class's own is there again


def _diffusers_step(scheduler: FlowMatchEulerDiscreteScheduler, kind: type[Multistep]) -> Callable[..., Any]:
    run, count = kind(), getattr(scheduler, "evaluated", uncounted)

    def step(
        model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool = True, **_kwargs: Any
    ) -> Any:
        """One step from sigma[i] to sigma[i + 1], in float32."""
        nonlocal run
        if scheduler.step_index is None:  # set_timesteps was called: a new run
            scheduler._init_step_index(timestep)
            run = kind()
        count(scheduler.step_index + 1)
        now, then = scheduler.sigmas[scheduler.step_index : scheduler.step_index + 2].tolist()
        after = run.advance(sample.float(), model_output.float(), now, then).to(model_output.dtype)
        scheduler._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=after) if return_dict else (after,)

    return step


def _hunyuan3d_step(scheduler: FlowMatchEulerScheduler, kind: type[Multistep]) -> Callable[..., Tensor]:
    run, count = kind(), getattr(scheduler, "evaluated", uncounted)

    def step(velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """One step in float32; a step of size zero, the last of every run, changes nothing."""
        nonlocal run
        count(index + 1)
        if index == 0:
            run = kind()
        now, then = (1 - sigma for sigma in scheduler.sigmas[index : index + 2].tolist())
        if now == then:
            return sample.to(velocity.dtype)
        return run.advance(sample.float(), -velocity.float(), now, then).to(velocity.dtype)

    return step
