"""Weights for any times without a model: the closed loop, simulated on a flow that is known in closed form.

Weights that bring a run to its target depend mostly on the times, and little on the model
(docs/notes/solver-plan.md). So where nothing has been measured they are fitted on data whose velocity can be
written down: independent coordinates of two values, x_0 = +a or -a, with variances a^2 that fall like a
natural picture's spectrum, 1 / i. With x_s = (1 - s) x_0 + s n,

    E[x_0 | x_s] = a tanh((1 - s) a x_s / s^2),        v = (x_s - E[x_0 | x_s]) / s.

Gaussian data (v linear in x) and flat spectra serve less well. Everything is drawn from a fixed seed: the
same times give the same weights.

Shapes: D coordinates, S samples of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from .closed_loop import FitSettings, stage_weights
from .timeplan import Array, TimePlan, adams_bashforth, moving

LEAST = 1e-3
"""Velocities are asked for at no later time: they are 0 / 0 at 0."""


@dataclass(frozen=True)
class Flow:
    """Two-point data. spectrum: variances fall as i^-spectrum, with a mean of `variance`. coordinates: D.
    samples: S. guidance: scale of classifier-free guidance towards a label that tells the sign with log
    odds `label`.
    """

    spectrum: float = 1.0
    variance: float = 1.0
    coordinates: int = 256
    samples: int = 16
    guidance: float = 1.0
    label: float = 0.0

    def amplitudes(self) -> Array:
        """[D]: a."""
        variances = np.arange(1, self.coordinates + 1, dtype=float) ** -self.spectrum
        return np.asarray(np.sqrt(variances / variances.mean() * self.variance))

    def noise(self) -> Array:
        """[S, D]: where a run starts; odd samples mirror the even ones."""
        drawn = np.random.default_rng(0).standard_normal((self.samples // 2, self.coordinates))
        return np.stack([drawn, -drawn], axis=1).reshape(-1, self.coordinates)

    def velocity(self, x: Array, s: float) -> Array:
        """v(x, s), guided."""
        s, a = max(s, LEAST), self.amplitudes()
        argument = (1 - s) * a * x / s**2
        clean = a * np.tanh(argument)
        if self.guidance != 1 and self.label:
            clean = clean + self.guidance * (a * np.tanh(argument + self.label / 2) - clean)
        return np.asarray((x - clean) / s)


def exact_states(flow: Flow, times: Array, steps: int = 8) -> list[Array]:
    """The solution at each time, by the classical Runge-Kutta method with `steps` steps between two times."""
    x = flow.noise()
    states = [x]
    for start, end in pairwise(times):
        fine = np.linspace(start, end, steps + 1)
        for s, t in pairwise(fine):
            h, middle = t - s, (s + t) / 2
            k1 = flow.velocity(x, s)
            k2 = flow.velocity(x + h / 2 * k1, middle)
            k3 = flow.velocity(x + h / 2 * k2, middle)
            k4 = flow.velocity(x + h * k3, t)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return states


def grid_states(flow: Flow, times: Array, grid: Array) -> list[Array]:
    """What Euler's steps on a grid reach, at each time, on a straight line between two steps."""
    x, states = flow.noise(), []
    path = [x]
    for start, end in pairwise(grid):
        x = x + (end - start) * flow.velocity(x, start)
        path.append(x)
    for time in times:
        k = min(max(int(np.searchsorted(-grid, -time, side="right")) - 1, 0), len(grid) - 2)
        share = (time - grid[k]) / (grid[k + 1] - grid[k])
        states.append(path[k] + share * (path[k + 1] - path[k]))
    return states


def simulated(near: TimePlan, targets: list[Array], flow: Flow, settings: FitSettings) -> TimePlan:
    """The closed loop of `closed_loop.StageFit` on a flow, towards targets at each of the times of `near`."""
    times = near.times
    weights, state = np.zeros((len(times) - 1, settings.passes)), np.zeros(len(times) - 1)
    x = targets[0]
    outputs: list[Array] = []
    for step, (start, end) in enumerate(pairwise(times)):
        outputs = [flow.velocity(x, start), *outputs][: settings.passes]
        count = len(outputs)
        rows = np.stack([r.ravel() for r in [*outputs, *[x] * settings.state]])
        goal = ((targets[step + 1] - x) / (end - start)).ravel()
        weights[step, :count], state[step] = stage_weights(
            rows @ rows.T, rows @ goal, near, step, count, settings
        )
        used = np.append(weights[step, :count], state[step])[: len(rows)]
        x = x + (end - start) * (used @ rows).reshape(x.shape)
    return TimePlan(times, weights, state)


@lru_cache(maxsize=256)
def _prior(
    times: tuple[float, ...], grid: tuple[float, ...] | None, flow: Flow, settings: FitSettings
) -> TimePlan:
    at = np.array(times)
    targets = exact_states(flow, at) if grid is None else grid_states(flow, at, np.array(grid))
    return simulated(adams_bashforth(at, 2, grid), targets, flow, settings)


def prior(
    times: Array, grid: Array | None = None, *, flow: Flow | None = None, settings: FitSettings | None = None
) -> TimePlan:
    """A plan for times of which nothing else is known. Deterministic; remembered.

    times [n + 1]. grid [N + 1]: its Euler run is the target; None for the exact solution.
    """
    known = None if grid is None else tuple(moving(grid).tolist())
    return _prior(tuple(np.asarray(times).tolist()), known, flow or Flow(), settings or FitSettings())
