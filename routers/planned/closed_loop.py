"""Weights of a plan fitted in closed loop: stage by stage, along the plan's own trajectory.

A model's own error moves x, and x moves what the model says next; weights that predict each output best
along the target's trajectory know nothing of that, and their errors add up. So each step's weights are
fitted where the plan really is: at x_i, reached by the weights of the steps before, they are the least
squares solution of bringing x_i to the target's next state,

    (x*(s_{i+1}) - x_i) / (s_{i+1} - s_i)  ~  w_i0 v_i + w_i1 v_{i-1} + ... + u_i x_i,

over all latent values of one or a few samples: a handful of weights from thousands of values, so that one
sample is enough. The target is a recorded trajectory: the pipeline's own run of all steps, or the exact
solution, which is a run of many steps.

Shapes: M samples, R regressors (P outputs, then the state), D latent values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .follow import advance
from .timeplan import PASSES, Array, TimePlan, adams_bashforth

SMALL = 1e-9
"""Share of a goal's energy below which an error is none."""
REWEIGHTED = 5
"""Rounds of least squares; a sixth changes weights by less than 0.01."""


@dataclass(frozen=True)
class FitSettings:
    """passes: P. ridge: of the difference to the prior weights, relative to the regressors' mean square.
    state: whether x itself is a regressor. order: how many moments in time of the prior's weights are kept:
    1, their sum (exact for a constant v); 2, also what makes Adams-Bashforth exact for a linear one; 0, none.
    """

    passes: int = PASSES
    ridge: float = 1e-5
    state: bool = False
    order: int = 0


@dataclass
class Trajectory:
    """A recorded run. times [K + 1] decreasing; states and velocities: at each of them, [m, ...] float32.

    velocities: of the K first times, for a curved (exact) trajectory; empty for one of straight pieces.
    """

    times: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    def at(self, time: float) -> Tensor:
        """The state at a time between the first and the last: cubic (Hermite) if velocities are known."""
        k = int(np.searchsorted(-np.array(self.times), -time, side="right")) - 1
        k = min(max(k, 0), len(self.times) - 2)
        start, end = self.times[k], self.times[k + 1]
        h, r = end - start, (time - start) / (end - start)
        a, b = self.states[k], self.states[k + 1]
        if r in (0.0, 1.0) or not self.velocities:
            return a + r * (b - a) if r not in (0.0, 1.0) else (a, b)[int(r)]
        last = k + 1 >= len(self.velocities)
        va, vb = self.velocities[k], 2 * (b - a) / h - self.velocities[k] if last else self.velocities[k + 1]
        keep, turn = (1 + 2 * r) * (1 - r) ** 2, r * (1 - r) ** 2
        return keep * a + (1 - keep) * b + h * (turn * va - r**2 * (1 - r) * vb)


def solve_weights(gram: Array, moment: Array, prior: Array, ridge: float, kept: Array) -> Array:
    """[R]: weights w of least |A w - y|^2 + ridge mean(diag) |w - prior|^2 with gram = A'A, moment = A'y.

    kept [C, R]: w has the prior's products with these rows.
    """
    count, held = len(gram), len(kept)
    system = np.zeros((count + held, count + held))
    system[:count, :count] = gram + ridge * np.trace(gram) / count * np.eye(count)
    system[count:, :count], system[:count, count:] = kept, kept.T
    rest = np.concatenate([moment - gram @ prior, np.zeros(held)])
    return np.asarray(prior + np.linalg.solve(system, rest)[:count])


def stage_weights(
    gram: Array, moment: Array, near: TimePlan, step: int, outputs: int, settings: FitSettings
) -> tuple[Array, float]:
    """Weights of `outputs` outputs [P], newest first, and of x, for one step, near a plan's.

    gram [R, R], moment [R]: of the outputs, and of x after them if it is a regressor.
    """
    prior = np.zeros(len(gram))
    prior[: min(outputs, near.passes)] = near.weights[step, :outputs][: near.passes]
    known = near.times[step - outputs + 1 : step + 1][::-1] - near.times[step]
    moments = min(settings.order, outputs)
    kept = np.zeros((moments, len(gram)))
    kept[:, :outputs] = (known / (near.times[step + 1] - near.times[step])) ** np.arange(moments)[:, None]
    solved = solve_weights(gram, moment, prior, settings.ridge, kept)
    return solved[:outputs], float(solved[outputs]) if settings.state else 0.0


class StageFit:
    """The weights of one plan, step after step, while a run is under way.

    times [n + 1]. target: x* of the first `samples` rows of the run. prior: weights to stay near, by
    default Adams-Bashforth's of order two. snr: how near the end came to the target's, in dB, once there.
    """

    def __init__(
        self,
        times: Array,
        target: Trajectory,
        settings: FitSettings | None = None,
        prior: TimePlan | None = None,
    ) -> None:
        self.times, self.target = np.asarray(times, float), target
        self.settings = settings or FitSettings()
        self.prior = prior or adams_bashforth(self.times, 2)
        self.samples = len(target.states[0])
        self.snr = -math.inf
        count = len(self.times) - 1
        self._weights, self._state = np.zeros((count, self.settings.passes)), np.zeros(count)

    @property
    def passes(self) -> int:
        """Outputs that a step is made from: P."""
        return self.settings.passes

    def row(self, step: int, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Array, float]:
        """Weights of the outputs [<= P], newest first, and of x, for the step from times[step]."""
        settings, m = self.settings, self.samples
        start, end = self.times[step : step + 2]
        regressors = [v[:m].float() for v in outputs] + [x[:m].float()] * settings.state
        goal = (self.target.at(float(end)).to(x.device) - x[:m].float()) / float(end - start)
        row, weight = self._solve(step, regressors, goal, len(outputs))
        self._weights[step, : len(row)], self._state[step] = row, weight
        if step == len(self.times) - 2:
            reached = advance(
                x[:m].float(), [v[:m].float() for v in outputs], row, weight, float(end - start)
            )
            self.snr = mean_snr(reached, self.target.at(float(end)).to(x.device))
        return row, weight

    def _solve(
        self, step: int, regressors: Sequence[Tensor], goal: Tensor, outputs: int
    ) -> tuple[Array, float]:
        """The least mean *logarithm* of samples' squared errors, by least squares weighted anew: a sample
        whose run comes to a fork has an error that would outweigh all others'.
        """
        a_MRD = torch.stack([r.flatten(1) for r in regressors], dim=1).double()
        y_MD = goal.flatten(1).double()
        gram_MRR = (a_MRD @ a_MRD.mT).cpu().numpy()
        moment_MR = (a_MRD @ y_MD[:, :, None]).squeeze(-1).cpu().numpy()
        energy_M = y_MD.square().sum(dim=1).cpu().numpy()
        share_M = 1 / np.maximum(energy_M, SMALL)
        for _ in range(REWEIGHTED if len(y_MD) > 1 else 1):
            gram, moment = np.tensordot(share_M, gram_MRR, 1), np.tensordot(share_M, moment_MR, 1)
            row, weight = stage_weights(gram, moment, self.prior, step, outputs, self.settings)
            w = np.append(row, weight)[: len(regressors)]
            error_M = energy_M - 2 * moment_MR @ w + np.einsum("r,mrs,s->m", w, gram_MRR, w)
            share_M = 1 / np.maximum(error_M, SMALL * energy_M + SMALL)
        return row, weight

    @property
    def plan(self) -> TimePlan:
        """The plan, once every step has been taken."""
        return TimePlan(self.times, self._weights, self._state)


def mean_snr(x: Tensor, truth: Tensor) -> float:
    """Signal-to-noise ratio of states [m, ...] in dB, the mean over samples."""
    error, signal = ((v.double() ** 2).flatten(1).sum(dim=1) for v in (x - truth, truth))
    return float((10 * torch.log10(signal / error.clamp_min(1e-30))).mean())


class Recording:
    """A plan that keeps the states and outputs of the run that follows it. samples: rows kept; None: all."""

    def __init__(self, plan: TimePlan, samples: int | None = None) -> None:
        self.plan, self.samples, self.trajectory = plan, samples, Trajectory()

    @property
    def times(self) -> Array:
        """The plan's."""
        return self.plan.times

    @property
    def passes(self) -> int:
        """The plan's."""
        return self.plan.passes

    def row(self, step: int, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Array, float]:
        """The plan's row; x and the newest output are kept, after the last step also where it leads."""
        row, state = self.plan.row(step)
        kept, path = slice(self.samples), self.trajectory
        if step == 0:
            path.times, path.states, path.velocities = [], [], []
        path.times.append(float(self.times[step]))
        path.states.append(x[kept].float())
        path.velocities.append(outputs[0][kept].float())
        if step == self.plan.evaluations - 1:
            size = float(self.times[-1] - self.times[-2])
            path.times.append(float(self.times[-1]))
            path.states.append(advance(x, outputs, row, state, size)[kept].float())
        return row, state
