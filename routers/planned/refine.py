"""Which bend of a plan brings the run's end nearest to the exact solution: Gauss-Newton on recorded samples.

Weights fitted step by step bring each state nearer and the end not (docs/notes/solver-plan.md): errors move
what the model says next. So the end itself is what is made small here, with one run for each number of a bend
in the place of a derivative: nothing but runs of the pipeline is needed.

Shapes: M samples, D latent values, B numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .bends import BENDS, bent
from .timeplan import Array, TimePlan

NUDGE = 0.05
"""By how much each number is changed to see what that does."""
DAMPING = (0.01, 0.1, 1.0)
"""Shares of the diagonal that are tried, the boldest step first."""
SMALL = 1e-9
"""Share of the target's energy below which an error is none."""

Ends = Callable[[TimePlan], Tensor]
"""Where the recorded samples end along a plan: [M, ...]."""


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

    The mean *logarithm* of the samples' errors is made small: one whose run comes to a fork would outweigh
    all others in a sum of squares.
    """
    numbers = np.zeros(BENDS) if start is None else np.asarray(start, float)
    truth = target.double().flatten(1)

    def error_at(tried: Array) -> Tensor:
        return ends(bent(near, tried, near.evaluations)).double().flatten(1).to(truth.device) - truth

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
            step = np.linalg.lstsq(gram + damping * np.diag(np.diag(gram)), moment)[0]  # some may do nothing
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
