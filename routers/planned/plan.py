"""From calibration's second moments to a plan: at which steps to compute the blocks, and how to stand in.

Reusing single blocks does not pay: a fresh block fed by stale ones answers an input it would never have
seen, and the errors of neighbouring blocks point the same way (docs/notes/reuse-granularity.md). So a plan
decides for the whole stack of blocks: at a step it is computed, or what it adds is *predicted* from its
last passes. The prediction is the linear one of least squared error (kriging): with the Gram matrix of
the stack's residual deltas over the steps of a run, known from calibration, its weights are the solution
of a small linear system for whichever steps were computed last. Extrapolating in time (Taylor) is the
special case of weights that do not look at the data; these do, and are several dB closer.

The same Gram matrix gives the squared error of the final latents for any choice of computed steps in
closed form, errors that add up or cancel between steps and CFG branches included. The best choice is
searched by removing steps one at a time, the best few choices kept, and then exchanging steps while that
helps. The closed form knows no error that a later step answers to, so calibration runs the best few
choices and keeps which was best (calibrate/choose.py); other numbers of steps rely on the closed form.

Between two whole steps lies a half one: the first CFG branch is computed, and the second is predicted from
its own past *and* from what the first has just added, by weights from the same Gram matrix. A sampler that
calls its branches one after the other can do that; what remains is a partial step's.

Shapes: G CFG branches, S calibrated steps, T steps of a run, P passes a prediction is made from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Levels = NDArray[np.int8]
Found = tuple[Mask, float]
"""Computed steps [T], and the squared error that computing only these leaves."""
DEPTH = 3
"""Passes a prediction is made from. A fourth gained nothing at 35 and 50 % of the steps of
qwen-image-tiny and half a dB at 70 %, for a third more memory (docs/notes/planning.md)."""
DEAD = 1e-6
"""A gain so far below the others says that an error at that step never reaches the latents."""
RIDGE = 1e-6
"""Added to the diagonal of a linear system, relative to it: noise that no calibration set averages out."""
BEAM = 12
"""Choices of steps that the search keeps while it removes steps one at a time."""
HALF, WHOLE = 1, 2
"""Levels of a step: how many of two CFG branches are computed."""
EARLY = 0.25
"""Share of a run's steps, from the first, that are never half ones: what half a step repairs there is less
than its moments say (docs/notes/planning.md)."""
GAIN = 1e-3
"""Relative gain below which moving one branch pass ends."""
REACH = 4
"""Steps a computed step is moved at most in one exchange of the search."""


@dataclass(frozen=True)
class Moments:
    """What calibration measured, on the S steps it ran.

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

        Interpolating the deltas themselves and not their products keeps the Gram matrix one. A step of
        a run of T steps is S / T as long as a calibrated one, and so is what an error at it adds. Plans
        that were tried hold for the calibrated steps alone.
        """
        if num_steps == self.num_steps:
            return self
        resize_TS = cubic_interpolation(self.num_steps, num_steps)
        resize = np.kron(np.eye(len(self.branches)), resize_TS)
        gain = gains_at(self.gain, num_steps)
        scale = (self.num_steps / num_steps) ** 2
        return Moments(self.branches, resize @ self.gram @ resize.T, gain * scale, self.mixing)

    def index(self, branch: str) -> int:
        """A branch's number; an unknown name is served by the first branch's moments."""
        return self.branches.index(branch) if branch in self.branches else 0


def gains_at(gain: Array, num_steps: int) -> Array:
    """Gains [S] interpolated to another number of steps, in logarithms.

    A last step of size 0, as Hunyuan3D's sampler makes one at any number of steps, stays the last step alone.
    """
    known = len(gain)
    ends = known > 2 and num_steps > 1 and gain[-1] < DEAD * gain[:-1].min() * 10
    at = np.linspace(0, known - 1, num_steps) if num_steps > 1 else np.zeros(1)
    counted = known - 1 if ends else known
    found: Array = np.exp(np.interp(at, np.arange(counted), np.log(gain[:counted])))
    if ends:
        found[-1] = gain[-1]
    return found


def cubic_interpolation(known: int, wanted: int) -> Array:
    """Matrix [wanted, known] of piecewise cubic (four-point Lagrange) interpolation at equal spacings."""
    if known < 4:
        eye = np.eye(known)
        at = np.linspace(0, known - 1, wanted) if wanted > 1 else np.zeros(1)
        return np.stack([np.interp(at, np.arange(known), row) for row in eye], axis=1)
    matrix = np.zeros((wanted, known))
    for row, x in enumerate(np.linspace(0, known - 1, wanted) if wanted > 1 else np.zeros(1)):
        start = min(max(int(x) - 1, 0), known - 4)
        nodes = np.arange(start, start + 4)
        for node in nodes:
            others = nodes[nodes != node]
            matrix[row, node] = np.prod((x - others) / (node - others))
    return matrix


@dataclass(frozen=True)
class StepPlan:
    """fresh [T]: steps at which the whole stack is computed; the first always is. partial: the one further
    step at which only the first blocks are, for a budget between two whole steps, or None. fraction: which
    share of the stack's FLOPs it has. error: predicted squared error of the final latents. half [T]: steps at
    which only the first CFG branch is computed; None where branches share their batch, or there is one.
    """

    fresh: Mask
    partial: int | None
    fraction: float
    error: float
    half: Mask | None = None


@dataclass
class Planner:
    """Plans for runs of one number of steps."""

    moments: Moments
    depth: int = DEPTH
    _weights: dict[tuple[int, int, tuple[int, ...]], Array] = field(default_factory=dict)
    _crossed: dict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[Array, Array]] = field(
        default_factory=dict
    )
    _errors: dict[tuple[int, tuple[int, ...], tuple[int, ...], int], Array] = field(default_factory=dict)
    _levels: dict[int, tuple[Levels, float]] = field(default_factory=dict)
    _beams: dict[int, list[Found]] = field(default_factory=dict)
    _best: dict[int, Found] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.moments.num_steps

    @cached_property
    def _tried(self) -> dict[int, Levels]:
        """The moments' plans by the number of branch passes that they compute."""
        plans = self.moments.plans
        return {} if plans is None else {int(levels.sum()): levels for levels in plans}

    @cached_property
    def _root(self) -> Array:
        """[G * T, G * T]: products of its rows are the Gram matrix, so that energies are sums of squares."""
        values, vectors = np.linalg.eigh(self.moments.gram)
        root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
        return root

    def weights(self, branch: int, step: int, passes: tuple[int, ...]) -> Array:
        """[P]: the weights of the passes at these steps, newest first, that predict the delta at `step`."""
        key = branch, step, passes
        if key not in self._weights:
            base = branch * self.num_steps
            known = base + np.array(passes, int)
            gram = self.moments.gram[np.ix_(known, known)]
            ridge = RIDGE * np.trace(gram) / len(known) * np.eye(len(known))
            self._weights[key] = np.linalg.solve(gram + ridge, self.moments.gram[known, base + step])
        return self._weights[key]

    def cross_weights(
        self, step: int, passes: tuple[int, ...], peers: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """Weights [P] of the second branch's passes and [P] of the first's: the second's delta at `step`.

        Newest first; the first branch's newest pass is the one at `step` itself.
        """
        key = step, passes, peers
        if key not in self._crossed:
            known = np.array([*(self.num_steps + p for p in passes), *peers], int)
            gram = self.moments.gram[np.ix_(known, known)]
            ridge = RIDGE * np.trace(gram) / len(known) * np.eye(len(known))
            found = np.linalg.solve(gram + ridge, self.moments.gram[known, self.num_steps + step])
            self._crossed[key] = found[: len(passes)], found[len(passes) :]
        return self._crossed[key]

    def _step_error(
        self, step: int, passes: tuple[int, ...], peers: tuple[int, ...] = (), level: int = 0
    ) -> Array:
        """[G * T]: what predicting a step from these passes adds to the final latents, in `_root`'s basis.

        level HALF: only the second branch is predicted. peers: the first branch's passes, if others.
        """
        key = step, passes, peers, level
        if key not in self._errors:
            total = np.zeros(len(self.moments.gram))
            for branch, mix in enumerate(self.moments.mixing):
                base = branch * self.num_steps
                if level == HALF:
                    if branch == 0:
                        continue
                    own, other = self.cross_weights(step, passes, peers)
                    guess = own @ self._root[base + np.array(passes)] + other @ self._root[np.array(peers)]
                else:
                    seen = peers if peers and branch == 0 else passes
                    guess = self.weights(branch, step, seen) @ self._root[base + np.array(seen)]
                total += mix * (guess - self._root[base + step])
            self._errors[key] = total * np.sqrt(self.moments.gain[step])
        return self._errors[key]

    def levels_error(self, levels: Levels) -> float:
        """Squared error of the final latents if steps are computed at these levels [T]: 0, HALF or WHOLE."""
        first: tuple[int, ...] = ()
        second: tuple[int, ...] = ()
        total = np.zeros(len(self.moments.gram))
        for step, level in enumerate(levels.tolist()):
            if level:
                first = (step, *first)[: self.depth]
            if level == WHOLE:
                second = (step, *second)[: self.depth]
            else:
                total += self._step_error(step, second, first, level)
        return float(total @ total)

    def best_levels(self, halves: int) -> tuple[Levels, float]:
        """Levels [T] of steps that together compute `halves` branch passes, and the error they leave."""
        if halves not in self._levels and halves in self._tried:
            self._levels[halves] = self._tried[halves], self.levels_error(self._tried[halves])
        if halves not in self._levels:
            fresh, _ = self.best(halves // WHOLE)
            starts = [WHOLE * fresh.astype(np.int8)]
            if halves % WHOLE:
                larger = WHOLE * self.best(halves // WHOLE + 1)[0].astype(np.int8)
                starts = [raised(starts[0], s) for s in np.flatnonzero(~fresh)]
                starts += [raised(larger, s, -1) for s in np.flatnonzero(larger)[1:]]
            elif WHOLE < halves < WHOLE * self.num_steps:
                fewer, _ = self.best_levels(halves - 1)
                starts += [raised(fewer, s) for s in np.flatnonzero(fewer < WHOLE)]
            starts = [s for s in starts if self.is_late(s)]
            ranked = sorted(((s, self.levels_error(s)) for s in starts), key=lambda pair: pair[1])
            self._levels[halves] = self._transfer(*ranked[0])
        return self._levels[halves]

    def is_late(self, levels: Levels) -> bool:
        """Whether half steps stay out of the start of a run."""
        return not (levels[: int(EARLY * self.num_steps)] == HALF).any()

    def _transfer(self, levels: Levels, error: float) -> tuple[Levels, float]:
        """Move single branch passes from step to step near by, the best move each time, while that helps."""
        while True:
            moved = [
                raised(raised(levels, giver, -1), taker)
                for giver in np.flatnonzero(levels)[1:]
                for taker in range(max(1, giver - REACH), min(self.num_steps, giver + REACH + 1))
                if taker != giver and levels[taker] < WHOLE
            ]
            ranked = [(m, self.levels_error(m)) for m in moved if self.is_late(m)]
            best = min(ranked, key=lambda pair: pair[1], default=(levels, error))
            if best[1] >= error * (1 - GAIN):
                return levels, error
            levels, error = best

    def error(self, fresh: Mask) -> float:
        """Squared error of the final latents if just these steps are computed; fresh [T] starts with True."""
        computed: list[int] = []
        total = np.zeros(len(self.moments.gram))
        for step, is_fresh in enumerate(fresh.tolist()):
            if is_fresh:
                computed.insert(0, step)
            else:
                total += self._step_error(step, tuple(computed[: self.depth]))
        return float(total @ total)

    def best(self, count: int) -> Found:
        """The `count` steps whose computation leaves the least error, and that error."""
        if count not in self._best:
            tried = self._tried.get(WHOLE * count)
            if tried is not None and not (tried == HALF).any():
                self._best[count] = tried == WHOLE, self.error(tried == WHOLE)
            else:
                self._best[count] = self._exchange(self._beam(count)[0])
        return self._best[count]

    def _beam(self, count: int) -> list[Found]:
        """The best few choices of `count` steps that come of removing steps one at a time, best first."""
        for level in range(self.num_steps, count - 1, -1):
            if level in self._beams:
                continue
            if level == self.num_steps:
                self._beams[level] = [(np.ones(level, bool), 0.0)]
                continue
            wider = self._beams[level + 1]
            removed = {
                mask.tobytes(): mask
                for fresh, _ in wider
                for mask in (_flipped(fresh, step) for step in np.flatnonzero(fresh)[1:])
            }
            ranked = sorted(((m, self.error(m)) for m in removed.values()), key=lambda pair: pair[1])
            self._beams[level] = ranked[:BEAM]
        return self._beams[count]

    def _exchange(self, found: Found) -> Found:
        """Move computed steps, one at a time and to the best place near by, while that lowers the error."""
        fresh, error = found
        improved = True
        while improved:
            improved = False
            for step in np.flatnonzero(fresh)[1:]:
                places = range(max(1, step - REACH), min(self.num_steps, step + REACH + 1))
                moved = [_flipped(fresh, step, place) for place in places if not fresh[place]]
                if not moved:
                    continue
                best = min(((m, self.error(m)) for m in moved), key=lambda pair: pair[1])
                if best[1] < error * (1 - 1e-9):
                    (fresh, error), improved = best, True
                    break
        return fresh, error

    def split_plan(self, computed: float) -> StepPlan:
        """As `plan`, half steps included: for two CFG branches that are called one after the other."""
        computed = min(max(computed, 1.0), float(self.num_steps))
        halves = int(WHOLE * computed + 1e-9)
        fraction = computed - halves / WHOLE
        levels, error = self.best_levels(halves)
        partial = None
        if fraction >= 1e-6:  # further blocks of a step that is not computed at all, where that helps most
            lowest = int(levels.min())  # HALF where no step is left out: then blocks of the second branch
            open_steps = np.flatnonzero(levels == lowest)
            helped = [self.levels_error(raised(levels, s, WHOLE - lowest)) for s in open_steps]
            partial = int(open_steps[int(np.argmin(helped))])
            share = fraction * WHOLE / (WHOLE - lowest)
            error += share * min(0.0, min(helped) - error)
        return StepPlan(levels == WHOLE, partial, fraction, error, levels == HALF)

    def plan(self, computed: float) -> StepPlan:
        """The best plan that computes the stack `computed` times, a fraction included; at least once."""
        computed = min(max(computed, 1.0), float(self.num_steps))
        count = int(computed + 1e-9)
        fraction = computed - count
        fresh, error = self.best(count)
        if fraction < 1e-6:
            return StepPlan(fresh, None, 0.0, error)
        # Either the plan with a step less and somewhere a partial one, or the one with a step more,
        # one of its steps partial. What a partial step repairs is taken as its share of the FLOPs.
        candidates = [(fresh, error, int(s)) for s in np.flatnonzero(~fresh)]
        larger, _ = self.best(count + 1)
        for step in np.flatnonzero(larger)[1:]:
            without = _flipped(larger, step)
            candidates.append((without, self.error(without), int(step)))

        def expected(candidate: tuple[Mask, float, int]) -> float:
            base, least, step = candidate
            return (1 - fraction) * least + fraction * self.error(_flipped(base, step))

        chosen = min(candidates, key=expected)
        return StepPlan(chosen[0], chosen[2], fraction, expected(chosen))


def raised(levels: Levels, step: int | np.signedinteger[Any], by: int = 1) -> Levels:
    """A copy with one step's level raised (or, by less than 0, lowered)."""
    changed = levels.copy()
    changed[step] += by
    return changed


def _flipped(fresh: Mask, *steps: int) -> Mask:
    """A copy with these steps changed over."""
    changed = fresh.copy()
    changed[list(steps)] ^= True
    return changed
