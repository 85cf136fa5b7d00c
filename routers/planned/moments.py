"""What calibration measured of a model, for any number of steps.

Shapes: G CFG branches, S calibrated steps, T steps of a run, K plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Levels = NDArray[np.int8]
"""[T]: what a run computes at each step, 0, HALF or WHOLE."""
HALF, WHOLE = 1, 2
"""Levels of a step: how many of two CFG branches are computed."""
DEAD = 1e-6
"""A gain so far below the others says that an error at that step never reaches the latents."""


@dataclass(frozen=True)
class Moments:
    """Second moments over the S steps that calibration ran.

    branches: names of the CFG branches. gram [G * S, G * S]: mean product of the stack's residual deltas of
    two (branch, step)s, branch-major. gain [S]: squared error of the final latents per unit of squared
    error of the mixed deltas at that step. mixing [G]: how the sampler combines the branches' outputs,
    (g, 1 - g) for classifier-free guidance of scale g. plans [K, S]: levels of steps that came out best when
    they were tried, one row for each sum of levels.
    """

    branches: tuple[str, ...]
    gram: Array
    gain: Array
    mixing: Array
    plans: Levels | None = None

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.gain)

    def at(self, num_steps: int) -> Moments:
        """The moments of a run of another number of steps, interpolated over the share of it that is over.

        With R [T, S] the interpolation of the deltas, the Gram matrix is R gram R^T: interpolating the deltas
        and not their products keeps it one. A step of a run of T steps is S / T as long as a calibrated one,
        and so is what an error at it adds. Plans that were tried hold for the calibrated steps alone.
        """
        if num_steps == self.num_steps:
            return self
        resize_TS = cubic_interpolation(self.num_steps, num_steps)
        resize = np.kron(np.eye(len(self.branches)), resize_TS)
        gain = gains_at(self.gain, num_steps) * (self.num_steps / num_steps) ** 2
        return Moments(self.branches, resize @ self.gram @ resize.T, gain, self.mixing)

    def index(self, branch: str) -> int:
        """A branch's number; an unknown name is served by the first branch's moments."""
        return self.branches.index(branch) if branch in self.branches else 0


def gains_at(gain: Array, num_steps: int) -> Array:
    """Gains [S] interpolated to another number of steps, in logarithms.

    A last step of size 0, as Hunyuan3D's sampler makes one at any number of steps, stays the last step alone.
    """
    steps = len(gain)
    dead_end = steps > 2 and num_steps > 1 and gain[-1] < DEAD * gain[:-1].min() * 10
    alive = steps - 1 if dead_end else steps
    resized: Array = np.exp(np.interp(_places(steps, num_steps), np.arange(alive), np.log(gain[:alive])))
    if dead_end:
        resized[-1] = gain[-1]
    return resized


def cubic_interpolation(nodes: int, points: int) -> Array:
    """Matrix [points, nodes] of piecewise cubic (four-point Lagrange) interpolation at equal spacings.

    Row x holds prod_{j != i} (x - j) / (i - j) for the four nodes i around x.
    """
    places = _places(nodes, points)
    if nodes < 4:
        return np.stack([np.interp(places, np.arange(nodes), row) for row in np.eye(nodes)], axis=1)
    matrix = np.zeros((points, nodes))
    for row, x in enumerate(places):
        start = min(max(int(x) - 1, 0), nodes - 4)
        near = np.arange(start, start + 4)
        for node in near:
            others = near[near != node]
            matrix[row, node] = np.prod((x - others) / (node - others))
    return matrix


def _places(nodes: int, points: int) -> Array:
    """Where `points` equally spaced points lie among `nodes` numbered nodes; a single one at the first."""
    return np.linspace(0, nodes - 1, points) if points > 1 else np.zeros(1)
