"""Weights of a plan fitted in closed loop: stage by stage, along the plan's own trajectory.

A model's own error moves x, and x moves what the model says next; weights that predict each output best
along the target's trajectory know nothing of that, and their errors add up. So each step's weights are
fitted where the plan really is: at x_i, reached by the weights of the steps before, they are the least
squares solution of bringing x_i to the target's next state,

    (x*(s_{i+1}) - x_i) / (s_{i+1} - s_i)  ~  w_i0 v_i + w_i1 v_{i-1} + ... + u_i x_i,

over all latent values of one or a few samples: a handful of weights from thousands of values, so that one
sample is enough. The target is a recorded trajectory: the pipeline's own run of all steps, or the exact
solution, which is a run of many steps.

Shapes: m samples, R regressors (P outputs, then the state).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .timeplan import PASSES, Array, TimePlan, adams_bashforth

Velocity = Callable[[Tensor, float], Tensor]
"""The guided velocity at (x, s)."""


@dataclass(frozen=True)
class FitSettings:
    """passes: P. ridge: of the difference to the prior weights, relative to the regressors' mean square.
    state: whether x itself is a regressor. consistent: weights of the outputs sum to 1.
    """

    passes: int = PASSES
    ridge: float = 1e-5
    state: bool = False
    consistent: bool = False


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


def solve_weights(
    gram: Array, moment: Array, prior: Array, ridge: float, *, sums_to: Array | None = None
) -> Array:
    """[R]: weights w of least |A w - y|^2 + ridge mean(diag) |w - prior|^2 with gram = A'A, moment = A'y.

    sums_to [R]: 0/1, the weights whose sum is kept as the prior's.
    """
    count = len(gram)
    system = gram + ridge * np.trace(gram) / count * np.eye(count)
    rest = moment - gram @ prior
    if sums_to is None:
        return prior + np.linalg.solve(system, rest)
    bordered = np.zeros((count + 1, count + 1))
    bordered[:count, :count], bordered[count, :count], bordered[:count, count] = system, sums_to, sums_to
    return prior + np.linalg.solve(bordered, np.append(rest, 0.0))[:count]


class StageFit:
    """The weights of one plan, step after step, while a run is under way.

    times [n + 1]. target: x* of the first `samples` rows of the run. prior: weights to stay near, by
    default Adams-Bashforth's of order two.
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
        count = len(self.times) - 1
        self._weights, self._state = np.zeros((count, self.settings.passes)), np.zeros(count)

    @property
    def passes(self) -> int:
        """Outputs that a step is made from: P."""
        return self.settings.passes

    def row(self, step: int, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Array, float]:
        """Weights of the outputs [<= P], newest first, and of x, for the step from times[step]."""
        settings, m = self.settings, self.samples
        outputs = outputs[: settings.passes]
        start, end = self.times[step : step + 2]
        regressors = [v[:m].float() for v in outputs] + [x[:m].float()] * settings.state
        goal = (self.target.at(float(end)).to(x.device) - x[:m].float()) / float(end - start)
        matrix = torch.stack([r.reshape(-1) for r in regressors]).double()
        gram, moment = (matrix @ matrix.T).cpu().numpy(), (matrix @ goal.reshape(-1).double()).cpu().numpy()
        prior, kept = np.zeros(len(gram)), np.zeros(len(gram))
        known = min(len(outputs), self.prior.passes)
        prior[:known], kept[: len(outputs)] = self.prior.weights[step, :known], 1
        solved = solve_weights(
            gram, moment, prior, settings.ridge, sums_to=kept if settings.consistent else None
        )
        self._weights[step, : len(outputs)] = solved[: len(outputs)]
        self._state[step] = solved[-1] if settings.state else 0.0
        return solved[: len(outputs)], float(self._state[step])

    @property
    def plan(self) -> TimePlan:
        """The plan, once every step has been taken."""
        return TimePlan(self.times, self._weights, self._state)


def run(velocity: Velocity, x: Tensor, plan: TimePlan | StageFit, record: Trajectory | None = None) -> Tensor:
    """Follow a plan, or fit one on the way, from x at times[0] to times[-1]; every state goes to `record`."""
    outputs: list[Tensor] = []
    for step, (start, end) in enumerate(zip(plan.times[:-1], plan.times[1:], strict=True)):
        outputs = [velocity(x, float(start)), *outputs][: plan.passes]
        if record is not None:
            record.times.append(float(start))
            record.states.append(x)
            record.velocities.append(outputs[0])
        row, state = plan.row(step, x, outputs)
        x = advance(x, outputs, row, state, float(end - start))
    if record is not None:
        record.times.append(float(plan.times[-1]))
        record.states.append(x)
    return x


def advance(x: Tensor, outputs: Sequence[Tensor], weights: Array, state: float, size: float) -> Tensor:
    """Returns x + size (sum of weights times outputs + state x), in x's dtype."""
    total: Tensor | None = None
    for weight, v in zip(weights.tolist(), outputs, strict=False):
        if weight:
            part = v if weight == 1 else weight * v
            total = part if total is None else total + part
    if state:
        total = state * x if total is None else total + state * x
    return x if total is None else x + size * total
