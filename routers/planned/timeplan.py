"""A plan in continuous time: at which times the model is evaluated, and how x gets from one to the next.

Time s runs from 1 (noise) to 0 (data) along x_s = (1 - s) x_0 + s n; the model gives v = dx/ds, of which
n - x_0 is the mean. A plan of n evaluations is n + 1 times and one row of weights for each step between them:

    v_i = v(x_i, s_i)
    x_{i+1} = x_i + (s_{i+1} - s_i) (w_i0 v_i + w_i1 v_{i-1} + ... + u_i x_i)

Fewer steps, shifted times, multistep solvers, reuse of earlier outputs and their prediction are all of this
form. A step that a grid of times leaves out is nothing but a longer step: between two evaluations every
combination of what has been computed adds up to one combination. Weights that sum to 1, with
u = 0, are exact for a constant v (order one); Adams-Bashforth's are exact for polynomials of v in time.

An evaluation may be narrow: all of the blocks' MLPs at a width of `spec.WIDTHS` (`narrow.py`).

Shapes: n evaluations, N steps of a grid, P passes a step is made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spec import WIDTHS

Array = NDArray[np.float64]
PASSES = 4
"""Outputs that a step is made from; a fifth gained nothing (docs/notes/solver-plan.md)."""
STILL = 1e-9
"""A step of a grid that is shorter than this goes nowhere: Hunyuan3D's sampler ends with one."""


@dataclass(frozen=True)
class TimePlan:
    """times [n + 1]: strictly decreasing, the last is where the run ends. weights [n, P]: of the outputs,
    newest first, 0 where there is none yet. state [n]: weight u of x itself. widths [n]: of the MLPs at each
    evaluation, one of `WIDTHS`; none given: all whole.

    Raises ValueError for arrays that make no plan.
    """

    times: Array
    weights: Array
    state: Array = field(default_factory=lambda: np.zeros(0))
    widths: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        times, weights = np.asarray(self.times, float), np.asarray(self.weights, float)
        state = np.asarray(self.state, float)
        state = state if state.size else np.zeros(len(weights))
        widths = np.asarray(self.widths, float)
        widths = widths if widths.size else np.ones(len(weights))
        arrays = (("times", times), ("weights", weights), ("state", state), ("widths", widths))
        for name, array in arrays:
            object.__setattr__(self, name, array)
        if times.ndim != 1 or weights.ndim != 2 or len(times) != len(weights) + 1 or len(times) < 2:
            raise ValueError(f"{times.shape} times and {weights.shape} weights: n + 1 and [n, P] make a plan")
        if state.shape != (len(weights),):
            raise ValueError(f"{state.shape} weights of the state for {len(weights)} steps")
        if widths.shape != (len(weights),) or not np.isin(widths, WIDTHS).all():
            raise ValueError(
                f"widths {widths.tolist()}: one of {WIDTHS} for each of {len(weights)} evaluations"
            )
        if not (np.diff(times) < 0).all():
            raise ValueError(f"times {times.round(4).tolist()} do not decrease")
        if not all(np.isfinite(array).all() for array in (times, weights, state)):
            raise ValueError("a plan's times and weights are finite")
        if np.triu(weights[:, 1:], 0)[: weights.shape[1]].any():
            raise ValueError("a step's weights go back beyond the first evaluation")

    @property
    def evaluations(self) -> int:
        """How many evaluations: n."""
        return len(self.weights)

    @property
    def passes(self) -> int:
        """Outputs that a step is made from: P."""
        return int(self.weights.shape[1])

    @property
    def narrows(self) -> bool:
        """Whether any evaluation is narrow."""
        return bool((self.widths < 1).any())

    def row(self, step: int, x: object = None, outputs: object = ()) -> tuple[Array, float]:
        """Weights of the outputs [P], newest first, and of x, for the step from times[step]."""
        return self.weights[step], float(self.state[step])

    def is_consistent(self, tolerance: float = 1e-6) -> bool:
        """Whether the plan follows a constant v exactly: every row of weights sums to 1, x has none."""
        return bool(np.abs(self.weights.sum(axis=1) - 1).max() < tolerance and not self.state.any())

    def begun_at(self, first: int) -> TimePlan:
        """The plan of a run that begins at this evaluation, without the outputs before it.

        Weights of outputs that are missing go to the oldest one there is, so that their sum stays.
        """
        weights = self.weights.copy()
        for step in range(first, min(first + self.passes, len(weights))):
            oldest = step - first
            weights[step, oldest] = weights[step, oldest:].sum()
            weights[step, oldest + 1 :] = 0
        return TimePlan(self.times, weights, self.state, self.widths)

    def to_arrays(self) -> dict[str, Array]:
        """Plain arrays for a file; `from_arrays` reads them."""
        arrays = {"times": self.times, "weights": self.weights, "state": self.state}
        return {**arrays, **({"widths": self.widths} if self.narrows else {})}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> TimePlan:
        """The plan of `to_arrays`. Raises ValueError for a missing array, or what makes no plan."""
        missing = sorted({"times", "weights", "state"} - set(arrays))
        if missing:
            raise ValueError(f"a plan in time without {missing[0]!r}")
        names = ("times", "weights", "state", *(["widths"] if "widths" in arrays else []))
        return cls(*(np.asarray(arrays[name], float) for name in names))


def euler(times: Sequence[float] | Array) -> TimePlan:
    """Every step goes along the newest output alone."""
    return TimePlan(np.asarray(times, float), np.ones((len(times) - 1, 1)))


def adams_bashforth(
    times: Sequence[float] | Array, order: int = 2, grid: Sequence[float] | Array | None = None
) -> TimePlan:
    """The last `order` outputs continued as a polynomial in time and integrated over the step: exact for v of
    degree order - 1. The first steps have fewer outputs, so lower order (the first is Euler's).

    order 1 is `euler`. grid [N + 1]: the sum of Euler's steps on it takes the place of the integral; with all
    of the grid's times the plan is Euler's run.
    """
    times = np.asarray(times, float)
    weights = np.zeros((len(times) - 1, order))
    for step in range(len(weights)):
        count = min(order, step + 1)
        start, end = times[step : step + 2]
        # as shares of the step, so that the system is well scaled: sum_j w_j known_j^p = mean of t^p
        known = (times[step - count + 1 : step + 1][::-1] - start) / (end - start)
        powers = np.arange(count)
        means = 1 / (powers + 1) if grid is None else _grid_means(np.asarray(grid, float), start, end, powers)
        weights[step, :count] = np.linalg.solve(known[None] ** powers[:, None], means)
    return TimePlan(times, weights)


def _grid_means(grid: Array, start: float, end: float, powers: NDArray[np.int64]) -> Array:
    """Means of t^p over a step when t, the share done, is held at each step of a grid's first value."""
    inside = grid[(grid < start) & (grid > end)]
    cuts = np.concatenate([[start], inside, [end]])
    held = np.array([grid[grid >= cut - STILL].min() for cut in cuts[:-1]])
    shares, sizes = (held - start) / (end - start), np.diff(cuts) / (end - start)
    return np.asarray((sizes * shares ** powers[:, None]).sum(axis=1))


def moving(times: Sequence[float] | Array) -> Array:
    """A grid's times without steps of size zero."""
    times = np.asarray(times, float)
    return np.asarray(times[np.concatenate([[True], np.diff(times) < -STILL])])


def resampled(times: Sequence[float] | Array, evaluations: int) -> Array:
    """[n + 1]: a grid's times at another number of steps, the grid read as a function of the share done."""
    times = moving(times)
    at = np.linspace(0, len(times) - 1, evaluations + 1)
    return np.asarray(np.interp(at, np.arange(len(times)), times))


def shifted(times: Sequence[float] | Array, shift: float) -> Array:
    """Times moved towards the noise, s' = shift s / (1 + (shift - 1) s), as flow-matching schedulers do.

    The ends of the run stay where they are: times are measured from the first one.
    """
    times = np.asarray(times, float)
    share = (times - times[-1]) / (times[0] - times[-1])
    moved = shift * share / (1 + (shift - 1) * share)
    return np.asarray(times[-1] + moved * (times[0] - times[-1]))
