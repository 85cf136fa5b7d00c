"""A plan bent as a whole, so that the run's end comes nearer to the exact solution.

Weights fitted step by step bring each state nearer and the end not (docs/notes/solver-plan.md): errors move
what the model says next. So the end itself is what is made small here. Weights and times bend smoothly along
the run, by ten numbers that are 0 for Adams-Bashforth's plan, so that a handful of samples fix them and one
set serves every number of evaluations. They are found by Gauss-Newton, with one run for each number in the
place of a derivative: nothing but runs of the pipeline is needed.

Shapes: M samples, D latent values, B numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .timeplan import Array, TimePlan, adams_bashforth

BENDS = 10
"""Numbers of a bend: log of the shift, bend of the times towards both ends, then two for each of slope, scale,
curve and state: where the run begins, and how that changes until its end."""
PASSES = 3
"""Outputs that a step is made from."""
NUDGE = 0.05
"""By how much each number is changed to see what that does."""
DAMPING = (0.01, 0.1, 1.0)
"""Shares of the diagonal that are tried, the boldest step first."""
SMALL = 1e-9
"""Share of the target's energy below which an error is none."""

Ends = Callable[[TimePlan], Tensor]
"""Where the recorded samples end along a plan: [M, ...]."""


def bent(plan: TimePlan, numbers: Array) -> TimePlan:
    """A plan of Adams-Bashforth's, of order two, bent. Raises ValueError if that moves times across another.

    slope: relative change of the weight on v_i - v_{i-1}. scale: added to the newest output's weight. curve:
    added to that of v_i - 2 v_{i-1} + v_{i-2}. state: added to that of x.
    """
    shift, bend, *rest = np.asarray(numbers, float).tolist()
    times = _bent_times(plan.times, shift, bend)
    own = adams_bashforth(times, 2).weights
    weights, state = np.zeros((len(own), PASSES)), np.zeros(len(own))
    weights[:, :2] = own
    for step, done in enumerate(np.linspace(0, 1, len(own))):
        slope, scale, curve, state[step] = (a + b * done for a, b in zip(rest[::2], rest[1::2], strict=True))
        weights[step, :2] += slope * own[step, 1] * np.array([-1, 1])
        weights[step, 0] += scale
        if step >= 2:
            weights[step] += curve * np.array([1, -2, 1])
    return TimePlan(times, weights, state)


def _bent_times(times: Array, shift: float, bend: float) -> Array:
    """Times whose log odds, as shares of the run's span, are stretched and moved."""
    share = (times[1:-1] - times[-1]) / (times[0] - times[-1])
    odds = np.log(share / (1 - share))
    moved = times[-1] + (times[0] - times[-1]) / (1 + np.exp(-(shift + (1 + bend) * odds)))
    return np.concatenate([times[:1], moved, times[-1:]])


@dataclass(frozen=True)
class Bent:
    """What a refinement comes to. error: mean over samples of the error's log energy, in dB to the target's.
    runs: how many it took.
    """

    numbers: Array
    error: float
    runs: int


def refine(near: TimePlan, ends: Ends, target: Tensor, rounds: int, start: Array | None = None) -> Bent:
    """Bend a plan so that its runs end near a target [M, ...]. start: numbers to begin with, default none.

    The mean *logarithm* of the samples' errors is made small: one whose run comes to a fork would outweigh all
    others in a sum of squares.
    """
    numbers = np.zeros(BENDS) if start is None else np.asarray(start, float)
    truth = target.double().flatten(1)

    def error_at(tried: Array) -> Tensor:
        return ends(bent(near, tried)).double().flatten(1).to(truth.device) - truth

    def size_of(error: Tensor) -> float:
        return float((10 * torch.log10(_energy(error, truth) / truth.square().sum(dim=1))).mean())

    error, runs = error_at(numbers), 1
    best = size_of(error)
    for _ in range(rounds):
        changes = [(error_at(numbers + NUDGE * row) - error) / NUDGE for row in np.eye(BENDS)]
        slopes_MDB = torch.stack(changes, dim=2)
        weight_M = 1 / _energy(error, truth)
        gram = torch.einsum("m,mdb,mdc->bc", weight_M, slopes_MDB, slopes_MDB).cpu().numpy()
        moment = torch.einsum("m,mdb,md->b", weight_M, slopes_MDB, error).cpu().numpy()
        runs += BENDS
        for damping in DAMPING:
            step = np.linalg.solve(gram + damping * np.diag(np.diag(gram)), moment)
            moved = error_at(numbers - step)
            runs += 1
            if size_of(moved) < best:
                numbers, error, best = numbers - step, moved, size_of(moved)
                break
        else:
            break
    return Bent(numbers, best, runs)


def _energy(error: Tensor, truth: Tensor) -> Tensor:
    """[M]: of each sample's error, at least next to nothing of its target's."""
    return torch.maximum(error.square().sum(dim=1), SMALL * truth.square().sum(dim=1))
