"""Second-order multistep solvers for flow matching: nearer to the exact solution at the same price.

Both take the place of diffusers' `FlowMatchEulerDiscreteScheduler`, keep its times, and cost one model
call per step, which elastic decisions apply to as ever. `DPMSolverMultistepScheduler(use_flow_sigmas=True)`
of diffusers 0.42 does not serve here: `QwenImagePipeline` passes sigmas, which its `set_timesteps` does not
take, and it rounds times to integers.

Time s runs from 1 (noise) to 0 (picture): x_s = (1 - s) x_0 + s n, and the model gives v = n - x_0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor


class MultistepFlowScheduler(FlowMatchEulerDiscreteScheduler, ABC):  # type: ignore[misc]
    """A flow scheduler that remembers one earlier model output. The first step is Euler's."""

    _earlier: tuple[float, Tensor] | None = None
    """Time and value of what the last step kept."""
    _times: Sequence[float] = ()
    """The run's sigmas on the host, read once."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """One step from sigma[i] to sigma[i + 1], in float32."""
        if self.step_index is None:  # set_timesteps was called: a new run
            self._init_step_index(timestep)
            self._earlier, self._times = None, self.sigmas.tolist()
        now, then = self._times[self.step_index : self.step_index + 2]
        after = self.advance(sample.float(), model_output.float(), now, then).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=after) if return_dict else (after,)

    @abstractmethod
    def advance(self, x: Tensor, v: Tensor, now: float, then: float) -> Tensor:
        """The sample at time `then` from the sample `x` and the model's `v` at time `now`."""


class AdamsBashforth2(MultistepFlowScheduler):
    """Two-step Adams-Bashforth with variable steps: v continued linearly to the middle of the step."""

    def advance(self, x: Tensor, v: Tensor, now: float, then: float) -> Tensor:
        """Returns x + dt (v + dt / (2 dt_last) (v - v_last))."""
        slope = torch.zeros_like(v)
        if self._earlier is not None:
            before, v_last = self._earlier
            slope = (v - v_last) / (now - before)
        self._earlier = now, v
        step = then - now
        return x + step * (v + step / 2 * slope)


class DpmSolver2M(MultistepFlowScheduler):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with alpha = 1 - s and sigma = s.

    The last step, to s = 0, is first order, as the paper advises for few steps.
    """

    def advance(self, x: Tensor, v: Tensor, now: float, then: float) -> Tensor:
        """Exact for x_0 linear in half log-SNR; equal to Euler's step where there is no earlier output."""
        clean = x - now * v
        estimate = clean
        if self._earlier is not None and then > 0:
            before, clean_last = self._earlier
            # at s = 1 the half log-SNR is minus infinity: its neighbour has no weight
            ratio = (
                0.0 if before >= 1 else (_log_snr(then) - _log_snr(now)) / (_log_snr(now) - _log_snr(before))
            )
            estimate = clean + ratio / 2 * (clean - clean_last)
        self._earlier = now, clean
        # sigma_t / sigma_s x - alpha_t (exp(-h) - 1) x_0, with exp(-h) written in sigma and alpha
        shrink = then / now
        return shrink * x + ((1 - then) - shrink * (1 - now)) * estimate


def _log_snr(s: float) -> float:
    """Half log signal-to-noise ratio log((1 - s) / s) for 0 < s < 1."""
    return float(torch.log(torch.tensor((1 - s) / s, dtype=torch.float64)))


MULTISTEP: dict[str, type[MultistepFlowScheduler]] = {"ab2": AdamsBashforth2, "dpm++2m": DpmSolver2M}
"""The names of `spec.SOLVERS` but "euler"."""


def check_solver(pipe: Any, name: str) -> None:
    """Raises ValueError if the pipeline's scheduler is not the one that the solvers stand in for."""
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"solver {name!r} stands in for FlowMatchEulerDiscreteScheduler, and this model has "
            f"{type(pipe.scheduler).__name__}; leave the solver out"
        )


@contextmanager
def solver(pipe: Any, name: str) -> Iterator[None]:
    """The pipeline with a solver of `spec.SOLVERS` on the same times. Raises as `check_solver`."""
    check_solver(pipe, name)
    before = pipe.scheduler
    if name in MULTISTEP:
        pipe.scheduler = MULTISTEP[name].from_config(before.config)
    try:
        yield
    finally:
        pipe.scheduler = before
