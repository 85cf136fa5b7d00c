"""Which steps of a dense run to compute: the least error along the recorded run, by dynamic programming.

Between two computed steps a and b a plan goes along a combination of the outputs at a and at the computed steps
before it. What it cannot reach of the run's own way there, sum of dt_j v_j for a <= j < b, is known from the
products of the recorded outputs alone. The steps that leave least in all are found exactly, for every number
of them at once, with the last `PAST` computed steps as state (OptimalSteps, arXiv 2503.21774, is the same idea
for the times of a sampler). The fit in closed loop then answers to what this leaves out: that errors feed back.

Shapes: N steps, M samples, D latent values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .timeplan import Array

PAST = 3
"""Computed steps that a gap is bridged from."""
RIDGE = 1e-6
"""Of a gap's least squares, relative to the mean square of the outputs."""


def products(velocities: Sequence[Tensor]) -> Array:
    """[N, N]: mean products of the outputs of a recorded run, [M, ...] each, samples of equal weight."""
    v_NMD = torch.stack([v.flatten(1) for v in velocities]).double()
    v_NMD = v_NMD / v_NMD.square().mean(dim=(0, 2), keepdim=True).sqrt()
    return np.asarray((torch.einsum("nmd,kmd->nk", v_NMD, v_NMD) / v_NMD[0].numel()).cpu().numpy())


def best_steps(gram: Array, sizes: Array, power: float = 2.0) -> dict[int, list[int]]:
    """For every number of computed steps the best ones, ascending, the first step of the run among them.

    gram [N, N]: `products`. sizes [N]: of the run's steps. power: errors of gaps add up as this power of their
    size: 2 if they have nothing to do with each other, 1 if they all point the same way.
    """
    steps = len(gram)
    error = _gap_errors(gram, np.abs(sizes), power)
    # best[state] = least error of a run that has come to state[0] with these last computed steps, newest first
    best: dict[tuple[int, ...], tuple[float, list[int]]] = {(0,): (0.0, [0])}
    found: dict[int, list[int]] = {}
    for count in range(1, steps + 1):
        ends = {state: total + error[state, steps] for state, (total, _) in best.items()}
        state = min(ends, key=ends.__getitem__)
        found[count] = best[state][1]
        following: dict[tuple[int, ...], tuple[float, list[int]]] = {}
        for state, (total, path) in best.items():
            for step in range(state[0] + 1, steps):
                onward, grown = (step, *state[: PAST - 1]), total + error[state, step]
                if onward not in following or grown < following[onward][0]:
                    following[onward] = grown, [*path, step]
        best = following
    return found


def _gap_errors(gram: Array, sizes: Array, power: float) -> dict[tuple[tuple[int, ...], int], float]:
    """What is left of every gap from state[0] to a step, after the best combination of the state's outputs."""
    steps, ridge = len(gram), RIDGE * np.trace(gram) / len(gram)
    # sums over gaps from a: way[a][b] . v = sum of dt_j v_j, a <= j < b
    errors: dict[tuple[tuple[int, ...], int], float] = {}
    for first in range(steps):
        way = np.tril(np.ones((steps - first, steps - first))) * sizes[first:]
        squares = np.einsum("bi,ij,bj->b", way, gram[first:, first:], way)
        cross = way @ gram[first:, :]
        for state in _states(first):
            known = np.array(state)
            solved = np.linalg.inv(gram[np.ix_(known, known)] + ridge * np.eye(len(known)))
            left = squares - np.einsum("bi,ij,bj->b", cross[:, known], solved, cross[:, known])
            for gap, value in enumerate(np.maximum(left, 0.0) ** (power / 2)):
                errors[state, first + gap + 1] = 0.0 if gap == 0 else float(value)
    return errors


def _states(newest: int) -> list[tuple[int, ...]]:
    """What may have been computed last at a step, newest first: itself and `PAST` - 1 before it, or fewer where
    they go back to the first step, which always is computed.
    """
    full = [(newest, *sorted(some, reverse=True)) for some in combinations(range(newest), PAST - 1)]
    begun = (some for count in range(PAST - 2) for some in combinations(range(1, newest), count))
    return [*full, *((newest, *sorted(some, reverse=True), 0) if newest else (0,) for some in begun)]
