"""Predict what the stack of blocks adds from its last passes, and say in closed form what that costs.

Reusing single blocks does not pay: a fresh block fed by stale ones answers an input it would never have
seen, and the errors of neighbouring blocks point the same way (docs/notes/reuse-granularity.md). So at a step
the whole stack is computed, or what it adds, its delta d, is predicted from its last passes P:

    d_s ~ sum_p w_p d_p        with        w = (K_PP + r I)^-1 K_Ps

These weights have the least squared error (kriging): K is the Gram matrix of the deltas, K_ij the mean of
d_i d_j over calibration. Extrapolating in time (Taylor) is the special case of weights that do not look
at the data; these do, and are several dB closer.

The same matrix gives the squared error of the final latents for any choice of computed steps. With gain c_s
of the step and guidance m_g of the CFG branches,

    E = | sum_s sqrt(c_s) sum_g m_g (sum_p w_p d_gp - d_gs) |^2

where s runs over predicted steps: errors of different steps and branches add up or cancel. The rows of a root
of K stand for the deltas.

Between a whole step and none lies a half one: the first CFG branch is computed, and the second is predicted
from its own past *and* from what the first has just added. P then holds passes of both branches.

Calibration measures K, c and m at its own number of steps (`Moments`); they are interpolated to any other.

Shapes: G CFG branches, S calibrated steps, T steps of a run, P passes a prediction is made from, K plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Levels = NDArray[np.int8]
"""[T]: what a run computes at each step, 0, HALF or WHOLE."""
HALF, WHOLE = 1, 2
"""Levels of a step: how many of two CFG branches are computed."""
DEAD = 1e-6
"""A gain so far below the others says that an error at that step never reaches the latents."""
DEPTH = 3
"""Passes a prediction is made from. A fourth gained nothing at 35 and 50 % of the steps of
qwen-image-tiny and half a dB at 70 %, for a third more memory (docs/notes/planning.md)."""
RIDGE = 1e-6
"""Added to the diagonal of a linear system, relative to it: noise that no calibration set averages out."""

Passes = tuple[int, ...]
"""Steps at which a branch was computed, newest first."""


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


@dataclass
class Predictor:
    """Weights and errors in runs of one number of steps, the moments' own. depth: P, at most."""

    moments: Moments
    depth: int = DEPTH
    _weights: dict[tuple[int, int, Passes, Passes], Array] = field(default_factory=dict, repr=False)
    _errors: dict[tuple[int, int, Passes, Passes], Array] = field(default_factory=dict, repr=False)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.moments.num_steps

    def weights(self, branch: int, step: int, passes: Passes, peers: Passes = ()) -> Array:
        """Weights [P], newest first, that predict a branch's delta at `step` from its passes at these steps.

        peers: passes of the first branch to predict from as well; their weights follow.
        """
        key = branch, step, passes, peers
        if key not in self._weights:
            seen = self._rows(branch, passes, peers)
            gram = self.moments.gram[np.ix_(seen, seen)]
            ridge = RIDGE * np.trace(gram) / len(seen) * np.eye(len(seen))
            target = self.moments.gram[seen, branch * self.num_steps + step]
            self._weights[key] = np.linalg.solve(gram + ridge, target)
        return self._weights[key]

    def error(self, levels: Levels) -> float:
        """E, the squared error of the final latents if steps are computed at these levels [T]."""
        first: Passes = ()
        others: Passes = ()
        total = np.zeros(len(self.moments.gram))
        for step, level in enumerate(levels.tolist()):
            if level:
                first = (step, *first)[: self.depth]
            if level == WHOLE:
                others = (step, *others)[: self.depth]
            else:
                total += self._step_error(step, level, first, others)
        return float(total @ total)

    def _step_error(self, step: int, level: int, first: Passes, others: Passes) -> Array:
        """[G * T]: one step's term of E, in the basis of `_root`. first, others: passes of the branches."""
        key = step, level, first, others
        if key not in self._errors:
            total = np.zeros(len(self.moments.gram))
            for branch, mix in enumerate(self.moments.mixing):
                if level == HALF and branch == 0:
                    continue
                passes = others if branch else first
                peers = first if level == HALF else ()
                weights = self.weights(branch, step, passes, peers)
                guess = weights @ self._root[self._rows(branch, passes, peers)]
                total += mix * (guess - self._root[branch * self.num_steps + step])
            self._errors[key] = total * np.sqrt(self.moments.gain[step])
        return self._errors[key]

    def _rows(self, branch: int, passes: Passes, peers: Passes) -> list[int]:
        """Rows of the Gram matrix: a branch's passes, then passes of the first one."""
        return [*(branch * self.num_steps + p for p in passes), *peers]

    @cached_property
    def _root(self) -> Array:
        """[G * T, G * T]: products of its rows are the Gram matrix, so that energies are sums of squares."""
        values, vectors = np.linalg.eigh(self.moments.gram)
        root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
        return root


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
