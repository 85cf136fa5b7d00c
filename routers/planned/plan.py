"""The plan: at which steps of a run the stack of blocks is computed, searched under the closed form's error.

A plan gives each step a level: WHOLE, the stack is computed; 0, it is predicted; HALF, it is computed in the
first CFG branch and predicted in the second, for samplers that call their branches one after the other.
The best levels for a number of branch passes are searched in two movements:

    remove     from all steps computed, take one away at a time; keep the BEAM best choices of each size
    exchange   move passes between steps near by while that lowers the error

Half steps begin at the best whole ones. What is left of a budget computes the first blocks of one more step.

The closed form does not see that later steps answer to an error, so calibration runs its best few choices and
keeps the best (calibrate/choose.py); those plans come first. Other numbers of steps rely on the closed form.

Shapes: T steps of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .prediction import HALF, WHOLE, Levels, Predictor

BEAM = 12
"""Choices of steps that the search keeps while it removes steps one at a time."""
REACH = 4
"""Steps a pass is moved at most in one exchange."""
GAIN = {HALF: 1e-3, WHOLE: 1e-9}
"""Relative gain below which exchanging ends."""
EARLY = 0.25
"""Share of a run's steps, from the first, that are never half ones: what half a step repairs there is less
than its moments say (docs/notes/planning.md)."""

Step = int | np.signedinteger[Any]
Choice = tuple[Levels, float]
"""Levels, and the squared error of the final latents that they leave."""


@dataclass(frozen=True)
class StepPlan:
    """levels [T]: what is computed at each step; the first is WHOLE. partial: the one step of lower level at
    which the first blocks are computed too, or None. fraction: share of the stack's FLOPs that this takes.
    error: predicted squared error of the final latents. split: whether CFG branches have calls of their own,
    so that steps may be half ones.
    """

    levels: Levels
    partial: int | None
    fraction: float
    error: float
    split: bool = False


@dataclass
class Planner(Predictor):
    """Plans for runs of one number of steps."""

    _beams: list[list[Choice]] = field(default_factory=list, repr=False)
    _best: dict[tuple[int, bool], Choice] = field(default_factory=dict, repr=False)

    def plan(self, computed: float, split: bool = False) -> StepPlan:
        """The best plan that computes the stack `computed` times, a fraction included; at least once.

        split: half steps included.
        """
        computed = min(max(computed, 1.0), float(self.num_steps))
        grain = HALF if split else WHOLE
        passes = grain * int(WHOLE * computed / grain + 1e-9)
        fraction = computed - passes / WHOLE
        levels, error = self.best(passes, split)
        if fraction < 1e-6:
            return StepPlan(levels, None, 0.0, error, split)
        # HALF where no step is left out: then the partial step computes blocks of the second branch alone.
        lowest = int(levels.min())
        candidates = [(levels, error, step) for step in np.flatnonzero(levels == lowest)]
        if not split:  # or the plan with a step more, one of its steps partial
            larger, _ = self.best(passes + WHOLE)
            fewer = [(raised(larger, step, -WHOLE), step) for step in np.flatnonzero(larger)[1:]]
            candidates += [(levels, self.error(levels), step) for levels, step in fewer]
        # What a partial step repairs is taken as its share of the FLOPs.
        share = fraction * WHOLE / (WHOLE - lowest)

        def expected(candidate: tuple[Levels, float, Step]) -> float:
            levels, error, step = candidate
            return (1 - share) * error + share * self.error(raised(levels, step, WHOLE - lowest))

        chosen = min(candidates, key=expected)
        return StepPlan(chosen[0], int(chosen[2]), fraction, expected(chosen), split)

    def best(self, passes: int, split: bool = False) -> Choice:
        """The levels that together compute `passes` branch passes, WHOLE to a step, and leave least error."""
        key = passes, split
        if key not in self._best:
            tried = self._tried.get(passes)
            if tried is not None and (split or HALF not in tried):
                self._best[key] = tried, self.error(tried)
            elif split:
                starts = (s for s in self._half_starts(passes) if self.is_late(s))
                self._best[key] = self._exchange(*self._ranked(starts)[0], HALF)
            else:
                self._best[key] = self._exchange(*self._beam(passes // WHOLE)[0], WHOLE)
        return self._best[key]

    def is_late(self, levels: Levels) -> bool:
        """Whether half steps stay out of the start of a run."""
        return HALF not in levels[: int(EARLY * self.num_steps)]

    @cached_property
    def _tried(self) -> dict[int, Levels]:
        """Plans that calibration ran, by the number of branch passes that they compute."""
        plans = self.moments.plans
        return {} if plans is None else {int(levels.sum()): levels for levels in plans}

    def _beam(self, steps: int) -> list[Choice]:
        """The best few choices of `steps` whole steps that come of removing one at a time, best first."""
        if not self._beams:
            self._beams.append([(np.full(self.num_steps, WHOLE, np.int8), 0.0)])
        while len(self._beams) <= self.num_steps - steps:
            removed = {
                fewer.tobytes(): fewer
                for levels, _ in self._beams[-1]
                for fewer in (raised(levels, step, -WHOLE) for step in np.flatnonzero(levels)[1:])
            }
            self._beams.append(self._ranked(removed.values())[:BEAM])
        return self._beams[self.num_steps - steps]

    def _half_starts(self, passes: int) -> list[Levels]:
        """Where the search for half steps begins: at whole ones, or a pass beside them."""
        whole, _ = self.best(passes // WHOLE * WHOLE)
        if passes % WHOLE:
            larger, _ = self.best(passes + HALF)
            return [
                *(raised(whole, step) for step in np.flatnonzero(whole == 0)),
                *(raised(larger, step, -HALF) for step in np.flatnonzero(larger)[1:]),
            ]
        if not WHOLE < passes < WHOLE * self.num_steps:
            return [whole]
        fewer, _ = self.best(passes - HALF, split=True)
        return [whole, *(raised(fewer, step) for step in np.flatnonzero(fewer < WHOLE))]

    def _exchange(self, levels: Levels, error: float, by: int) -> Choice:
        """Move `by` passes from one step to another near by while that lowers the error.

        Whole steps: the first that has a better place takes its best one. Half steps: the best move of all.
        """
        while True:
            givers = np.flatnonzero(levels)[1:]
            for group in np.split(givers, len(givers)) if by == WHOLE and len(givers) else [givers]:
                moved = (
                    raised(raised(levels, giver, -by), taker, by)
                    for giver in group
                    for taker in range(max(1, giver - REACH), min(self.num_steps, giver + REACH + 1))
                    if taker != giver and levels[taker] + by <= WHOLE
                )
                ranked = self._ranked(m for m in moved if self.is_late(m))
                if ranked and ranked[0][1] < error * (1 - GAIN[by]):
                    levels, error = ranked[0]
                    break
            else:
                return levels, error

    def _ranked(self, choices: Iterable[Levels]) -> list[Choice]:
        """Choices with their errors, the least first."""
        return sorted(((levels, self.error(levels)) for levels in choices), key=lambda pair: pair[1])


def raised(levels: Levels, step: Step, by: int = HALF) -> Levels:
    """A copy with one step's level raised (or, by less than 0, lowered)."""
    changed = levels.copy()
    changed[step] += by
    return changed
