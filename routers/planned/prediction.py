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

Shapes: G CFG branches, T steps of a run, P passes a prediction is made from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .moments import HALF, WHOLE, Array, Levels, Moments

DEPTH = 3
"""Passes a prediction is made from. A fourth gained nothing at 35 and 50 % of the steps of
qwen-image-tiny and half a dB at 70 %, for a third more memory (docs/notes/planning.md)."""
RIDGE = 1e-6
"""Added to the diagonal of a linear system, relative to it: noise that no calibration set averages out."""

Passes = tuple[int, ...]
"""Steps at which a branch was computed, newest first."""


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
