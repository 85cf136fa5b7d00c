"""Caches that predict the model's output from those before it, written from their papers' formulas.

What they predict is linear in the outputs, so a run with one is a plan in time: evaluations at some of the
dense run's own steps, and between them the sum of Euler's steps along the predictions. That costs a rival
nothing but its evaluations, as little as any implementation can.

- hold: the last output again, at steps where the embedding of the time changes least (mflux's StepCache), or
  evenly spread.
- Spectrum (arXiv 2603.01623): Chebyshev polynomials of degree 4, ridge 0.1, fitted to all outputs so far.
- HiCache (arXiv 2508.16984; hicache-pp's Hermite): finite differences with contracted Hermite polynomials.
- DMD (hicache-pp): exponentials through the last four outputs, which have to be evenly spread.
- VDE (arXiv 2605.23381): the output's part along the input and the rest of it; the sizes of both go on along
  lines, the direction of the rest stays.
- L2P (arXiv 2604.26365): weights of all outputs so far by least squares on recorded runs.
- MeanCache (arXiv 2601.19961), LeMiCa (arXiv 2511.00090): the steps of the shortest path in a graph whose
  edges cost what leaving out the steps between costs on recorded runs.
- BudCache (arXiv 2606.13496): steps searched under the budget, by runs of calibration prompts.
- EasyCache (arXiv 2507.02860): the change of input to output, added up, decides; patches the transformer.

Shapes: n evaluations, N steps of the grid, M samples, D latent values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev, hermite
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import recorded
from benchmarks.bench import Attached, Bench
from routers.patching import patch_forward, restore_forward
from routers.planned.closed_loop import Trajectory
from routers.planned.spent import evaluations_for
from routers.planned.timeplan import Array, TimePlan

Predict = Callable[[Array, int, int], Array]
"""From the steps of the outputs so far, newest first [n], the step to predict and N to weights of outputs."""
DEGREE, RIDGE = 4, 0.1
"""Of Spectrum."""
CONTRACTED = 0.5
"""HiCache's sigma."""
SNAPSHOTS = 4
"""Of DMD."""
EMBEDDED, PERIOD = 256, 10_000.0
"""Size of the embedding of the time, and its longest period, as in the transformers' own."""
SEARCHED, SEARCHED_ON = 24, 2
"""Runs of a search, and its prompts."""
SMALL = 1e-4
"""Ridge of L2P, as a share of the outputs' mean square."""


def forecast_plan(grid: Array, steps: Sequence[int], predict: Predict) -> TimePlan:
    """Euler's run on a grid [N + 1] whose outputs are computed at `steps`, the first of which is 0, and
    predicted at the others.
    """
    count, last = len(steps), len(grid) - 1
    weights = np.zeros((count, count))
    for i, (start, end) in enumerate(pairwise([*steps, last])):
        known = np.array(steps[: i + 1][::-1], float)
        for step in range(start, end):
            newest = np.eye(1, i + 1)[0] if step == start else predict(known, step, last)
            weights[i, : i + 1] += (grid[step + 1] - grid[step]) * newest
        weights[i] /= grid[end] - grid[start]
    return TimePlan(grid[[*steps, last]], weights)


def even(steps: int, count: int) -> list[int]:
    """So many of the steps, evenly spread, the first among them."""
    return sorted({int(step) for step in np.linspace(0, steps, count, endpoint=False).round()})


def hold(known: Array, step: int, last: int) -> Array:
    """The newest output again."""
    return np.eye(1, len(known))[0]


def linear(known: Array, step: int, last: int) -> Array:
    """The line through the last two outputs."""
    weights = hold(known, step, last)
    if len(known) > 1:
        share = (step - known[0]) / (known[0] - known[1])
        weights[:2] = 1 + share, -share
    return weights


def spectrum(known: Array, step: int, last: int) -> Array:
    """Chebyshev polynomials over the run, fitted with a ridge to all outputs so far: to their differences to
    the newest one, because the ridge would shrink what is constant by a fifth where there are few of them.
    """
    basis = chebyshev.chebvander(2 * known / last - 1, DEGREE)
    there = chebyshev.chebvander(np.array([2 * step / last - 1]), DEGREE)[0]
    system = basis.T @ basis + RIDGE * np.eye(DEGREE + 1)
    weights = np.asarray(there @ np.linalg.solve(system, basis.T))
    return weights + (1 - weights.sum()) * hold(known, step, last)


def hicache(known: Array, step: int, last: int) -> Array:
    """Differences of orders up to two; x^i becomes sigma^i H_i(sigma x)."""
    weights = hold(known, step, last)
    order = min(2, len(known) - 1)
    if not order:
        return weights
    apart = known[0] - known[1]
    ahead = (step - known[0]) / apart
    for i in range(1, order + 1):
        differences = np.zeros(len(known))
        differences[: i + 1] = [(-1) ** j * math.comb(i, j) for j in range(i + 1)]
        polynomial = CONTRACTED**i * hermite.hermval(CONTRACTED * ahead, np.eye(i + 1)[i])
        weights += polynomial / math.factorial(i) * differences
    return weights


def least_changed(grid: Array, count: int) -> list[int]:
    """Steps but those at which the embedding of the time changes least; first and last are computed."""
    rates = PERIOD ** (-np.arange(EMBEDDED // 2) / (EMBEDDED // 2))
    angles = 1000 * grid[:-1, None] * rates
    embedded = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    changes = np.abs(np.diff(embedded, axis=0)).mean(axis=1)
    changes[-1] = np.inf
    return sorted([0, *(1 + np.argsort(-changes, kind="stable")[: count - 1]).tolist()])


class Exponentials:
    """A plan whose predictions are exponentials through the last outputs: weights depend on what was given.

    Followed as a `TimePlan` is.
    """

    def __init__(self, grid: Array, steps: Sequence[int]) -> None:
        self.grid, self.steps, self.passes = grid, list(steps), SNAPSHOTS
        self.times = grid[[*steps, -1]]

    def row(self, step: int, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Array, float]:
        """Weights of the outputs, newest first, for the step from times[step]."""
        start, end = [*self.steps, len(self.grid) - 1][step : step + 2]
        known = np.array(self.steps[: step + 1][::-1], float)[: len(outputs)]
        total = np.zeros(len(outputs))
        for at in range(start, end):
            size = self.grid[at + 1] - self.grid[at]
            newest = hold(known, at, 0) if at == start else self._predicted(known, at, outputs)
            total += size * newest
        return total / (self.grid[end] - self.grid[start]), 0.0

    def _predicted(self, known: Array, step: int, outputs: Sequence[Tensor]) -> Array:
        apart = -np.diff(known)
        if len(outputs) < SNAPSHOTS or np.ptp(apart) > 0:
            return linear(known, step, 0)
        rows = torch.stack([v.flatten().double() for v in reversed(outputs)])
        gram = (rows @ rows.T).cpu().numpy()
        past, newest = gram[:-1, :-1], gram[:-1, -1]
        recurrence = np.linalg.lstsq(past + 1e-9 * np.trace(past) * np.eye(len(past)), newest, rcond=None)[0]
        roots = np.roots([1.0, *(-recurrence[::-1])]).astype(complex)
        roots = np.where(np.abs(roots) > 1.5, 1.5 * roots / np.abs(roots), roots)  # no mode may explode
        basis = roots[None] ** np.arange(SNAPSHOTS)[:, None]
        there = roots ** (SNAPSHOTS - 1 + (step - known[0]) / apart[0])
        return np.real(there @ np.linalg.pinv(basis))[::-1]


class Decomposed:
    """A plan of VDE's: v = a x + b e, where e has length 1 and is orthogonal to x at the evaluation.

    Both sizes are those of the batch's mean, since a plan has one weight for all rows.
    """

    passes = 1

    def __init__(self, grid: Array, steps: Sequence[int]) -> None:
        self.grid, self.steps, self.times = grid, list(steps), grid[[*steps, -1]]
        self._sizes: list[tuple[float, float]] = []

    def row(self, step: int, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Array, float]:
        """Weights of the output and of x, for the step from times[step]."""
        start, end = [*self.steps, len(self.grid) - 1][step : step + 2]
        x_MD, v_MD = x.flatten(1).double(), outputs[0].flatten(1).double()
        along_M = (x_MD * v_MD).sum(dim=1) / x_MD.square().sum(dim=1)
        rest_M = (v_MD - along_M[:, None] * x_MD).norm(dim=1)
        now = float(along_M.mean()), float(rest_M.mean())
        self._sizes = [*self._sizes[:step], now]
        slope = np.zeros(2)
        if step:
            before = self._sizes[step - 1]
            slope = np.subtract(now, before) / (self.grid[start] - self.grid[self.steps[step - 1]])
        of_x, of_rest = 1.0, 0.0  # the state, as so much of x and so much of e
        for at in range(start, end):
            along, rest = np.array(now) + slope * (self.grid[at] - self.grid[start])
            size = self.grid[at + 1] - self.grid[at]
            of_x, of_rest = of_x + size * along * of_x, of_rest + size * (along * of_rest + rest)
        whole, weight = self.grid[end] - self.grid[start], of_rest / now[1]
        return np.array([weight]) / whole, float((of_x - 1 - weight * now[0]) / whole)


def learned(path: Trajectory, grid: Array, steps: Sequence[int]) -> Predict:
    """L2P: for each step, weights of all outputs so far that come nearest to the recorded one."""
    outputs = torch.stack([v.flatten(1).double() for v in path.velocities])
    gram = torch.einsum("imd,jmd->ij", outputs, outputs).cpu().numpy()

    def predict(known: Array, step: int, last: int) -> Array:
        past = known.astype(int)
        system = gram[np.ix_(past, past)]
        ridge = SMALL * np.trace(system) / len(past) * np.eye(len(past))
        near = linear(known, step, last)
        return np.asarray(near + np.linalg.solve(system + ridge, gram[past, step] - system @ near))

    return predict


def shortest_path(path: Trajectory, grid: Array, count: int) -> list[int]:
    """The steps of the cheapest path of `count` edges; an edge costs what its output misses of the way."""
    last, sizes = len(grid) - 1, np.diff(grid)
    outputs = torch.stack([v.flatten(1).double() for v in path.velocities])
    gram = torch.einsum("imd,jmd->ij", outputs, outputs).cpu().numpy()
    cost = np.full((last + 1, last + 1), np.inf)
    for start in range(last):
        for end in range(start + 1, last + 1):
            way = np.zeros(last)
            way[start:end] = sizes[start:end]
            way[start] -= sizes[start:end].sum()
            cost[start, end] = math.sqrt(max(float(way @ gram @ way), 0.0))
    best, came = np.full((count + 1, last + 1), np.inf), np.zeros((count + 1, last + 1), int)
    best[0, 0] = 0
    for edges in range(1, count + 1):
        total = best[edges - 1][:, None] + cost
        best[edges], came[edges] = total.min(axis=0), total.argmin(axis=0)
    steps, at = [], last
    for edges in range(count, 0, -1):
        at = int(came[edges, at])
        steps.append(at)
    return steps[::-1]


def always(plan: TimePlan) -> recorded.Planning:
    """This plan, whatever the run's own times."""
    return lambda grid: plan


def searched(bench: Bench, grid: Array, count: int) -> list[int]:
    """The best of a random walk over sets of steps, by runs of calibration prompts."""
    key = f"searched steps {count} of {len(grid) - 1}"
    if key not in bench.memo:
        truth = recorded.trajectory(bench, "dense")[1].states[-1][:SEARCHED_ON]
        random, best, found = np.random.default_rng(0), math.inf, even(len(grid) - 1, count)
        steps = found
        for _ in range(SEARCHED):
            plan = forecast_plan(grid, steps, linear)
            latents = recorded.run_samples(bench, always(plan), SEARCHED_ON)
            error = float((latents.cpu().float() - truth.cpu()).square().mean())
            if error < best:
                best, found = error, steps
            free = [step for step in range(1, len(grid) - 1) if step not in found]
            if not free or len(found) < 2:
                break
            away = found[int(random.integers(1, len(found)))]
            steps = sorted([*(step for step in found if step != away), int(random.choice(free))])
        bench.memo[key] = found
    steps = bench.memo[key]
    return list(steps)


def plan_for(name: str, bench: Bench, grid: Array, count: int) -> Any:
    """What a rival of `NAMES` follows at so many evaluations."""
    spread, last = even(len(grid) - 1, count), len(grid) - 1
    if name == "step-share reuse":
        return forecast_plan(grid, least_changed(grid, count), hold)
    if name == "Spectrum":
        return forecast_plan(grid, spread, spectrum)
    if name == "HiCache":
        return forecast_plan(grid, spread, hicache)
    if name == "DMD":
        return Exponentials(grid, spread)
    if name == "VDE":
        return Decomposed(grid, spread)
    if name == "searched steps":
        return forecast_plan(grid, searched(bench, grid, count), linear)
    path = recorded.trajectory(bench, "dense")[1]
    assert len(path.velocities) >= last, "the recorded run is the dense one"
    if name == "L2P":
        return forecast_plan(grid, spread, learned(path, grid, spread))
    return forecast_plan(grid, shortest_path(path, grid, count), hold)


NAMES: dict[str, str] = {
    "step-share reuse": "own code after mflux's StepCache",
    "Spectrum": "own code after arXiv 2603.01623, evenly spread steps",
    "HiCache": "own code after arXiv 2508.16984 (Hermite, order 2), evenly spread steps",
    "DMD": "own code after hicache-pp, evenly spread steps",
    "VDE": "own code after arXiv 2605.23381, evenly spread steps, one pair of sizes for a batch",
    "L2P": "own code after arXiv 2604.26365, fitted on other prompts",
    "shortest path": "own code after MeanCache, arXiv 2601.19961, and LeMiCa: steps by recorded runs",
    "searched steps": f"own code after BudCache, arXiv 2606.13496: {SEARCHED} runs of {SEARCHED_ON} prompts",
}
"""Rivals that keep a budget, to the dense result, with a note for readers."""


@contextmanager
def forecast(name: str, bench: Bench, setting: Mapping[str, Any]) -> Iterator[Attached]:
    """A rival of `NAMES` at a budget."""
    count = evaluations_for(float(setting["budget"]), bench.num_steps)
    if name in ("L2P", "shortest path", "searched steps"):
        recorded.trajectory(bench, "dense")  # before the pipeline is on other times
    if name == "searched steps":
        searched(bench, recorded.trajectory(bench, "dense")[0], count)
    with recorded.planned(bench, lambda grid: plan_for(name, bench, grid, count)) as attached:
        yield attached


@contextmanager
def easy_cache(bench: Bench, setting: Mapping[str, Any]) -> Iterator[Attached]:
    """EasyCache: threshold: of the added up relative change that is expected of the output."""
    cache = _EasyCache(float(setting["threshold"]), bench.num_steps)
    patches = [("forward", patch_forward(bench.transformer, cache.forward))]
    if hasattr(bench.transformer, "cache_context"):
        name = "cache_context"
        patches.append((name, patch_forward(bench.transformer, cache.context, name)))
    try:

        @contextmanager
        def generation() -> Iterator[None]:
            cache.reset()
            yield

        yield Attached(bench.num_steps, generation)
    finally:
        for name, patch in reversed(patches):
            restore_forward(bench.transformer, patch, name)


class _EasyCache:
    """One decision for each step, by the first branch that calls. First steps and the last are computed."""

    FIRST = 2

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold, self.steps = threshold, steps
        self.reset()

    def reset(self) -> None:
        """A new generation begins."""
        self.name, self.calls, self.reusing, self.total, self.rate = "main", dict[str, int](), False, 0.0, 0.0
        self.seen: Tensor | None = None
        self.given: Tensor | None = None
        self.added: dict[str, Any] = {}
        self.leader = ""

    @contextmanager
    def context(self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tells which branch calls."""
        self.name = name
        with original(name, *args, **kwargs):
            yield

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call: computed, or the input and what was added to it at the last computed one."""
        x = tree_leaves(args)[0] if args else next(iter(kwargs.values()))
        number = self.calls.get(self.name, 0)
        self.calls[self.name] = number + 1
        self.leader = self.leader or self.name
        if self.name == self.leader:
            self._decide(x, number)
        if self.reusing and self.name in self.added:
            return tree_map(
                lambda difference: x + difference if isinstance(difference, Tensor) else difference,
                self.added[self.name],
            )
        output = original(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if self.name == self.leader:
            self._learn(x, tensors[0], number)
        same = tensors[0].shape == x.shape
        if same:
            self.added[self.name] = tree_map(
                lambda leaf: leaf - x if isinstance(leaf, Tensor) else leaf, output
            )
        return output

    def _decide(self, x: Tensor, number: int) -> None:
        self.reusing = False
        if self.seen is not None and self.given is not None:
            change = float((x - self.seen).abs().mean())
            self.total += self.rate * change / float(self.given.abs().mean())
            inside = self.FIRST <= number < self.steps - 1
            self.reusing = inside and self.total < self.threshold
        if self.reusing:
            self.seen = x.clone()

    def _learn(self, x: Tensor, output: Tensor, number: int) -> None:
        if self.seen is not None and self.given is not None:
            moved = float((x - self.seen).abs().mean())
            self.rate = float((output - self.given).abs().mean()) / max(moved, 1e-12)
        self.total, self.seen, self.given = 0.0, x.clone(), output.clone()
