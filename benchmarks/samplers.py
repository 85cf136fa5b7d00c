"""What somebody who knows samplers would take instead: fewer steps of a better solver at better times.

Every solver here is a plan in time (`routers/planned/timeplan.py`), so that only the numbers differ. They
are derived in the basis of the noise x_0 and all outputs v_0, v_1, ...: after i steps

    x_i = levels[i] x_0 + sum_j outputs[i, j] v_j

Time s runs from 1 (noise) to 0 (data), alpha = 1 - s, sigma = s, and a model's estimate of the data is
D = x - s v. Shapes: n evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from routers.planned.closed_loop import Trajectory
from routers.planned.timeplan import Array, TimePlan, adams_bashforth, euler, resampled, shifted

BESIDE = 2e-4
"""Heun evaluates twice at one time; a plan's times decrease, so that the second one is so much later."""


def plan_of(times: Array, levels: Array, outputs: Array) -> TimePlan:
    """The plan that goes through these states. levels [n + 1], outputs [n + 1, n]: see above."""
    count = len(times) - 1
    weights, state = np.zeros((count, count)), np.zeros(count)
    for i in range(count):
        size, ratio = times[i + 1] - times[i], levels[i + 1] / levels[i]
        state[i] = (ratio - 1) / size
        weights[i, : i + 1] = ((outputs[i + 1] - ratio * outputs[i]) / size)[: i + 1][::-1]
    return TimePlan(times, weights, state)


def log_snr(s: float) -> float:
    """Half log signal-to-noise ratio, infinite at both ends."""
    return math.inf if s <= 0 else -math.inf if s >= 1 else math.log((1 - s) / s)


def dpm_solver_2m(times: Array) -> TimePlan:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2."""
    return _unified(times, corrector=False)


def unipc(times: Array) -> TimePlan:
    """UniPC of order two, arXiv 2302.04867, B(h) = exp(h) - 1: the predictor is DPM-Solver++(2M), and each
    new output also corrects the state that it was evaluated at.
    """
    return _unified(times, corrector=True)


def _unified(times: Array, corrector: bool) -> TimePlan:
    """Rows of `known` are D and x as coefficients of [x_0, v_0, ...]. The last step is of first order."""
    count = len(times) - 1
    states = np.zeros((count + 1, count + 1))  # where outputs are evaluated
    states[0, 0] = 1.0
    estimates: list[Array] = []
    better = states[0]
    for i in range(count):
        output = np.zeros(count + 1)
        output[i + 1] = 1.0
        estimates.append(states[i] - times[i] * output)
        if not corrector:
            better = states[i]
        elif i:
            better = _step(times, better, estimates, i - 1, corrected=True)
        states[i + 1] = _step(times, better, estimates, i, corrected=False)
    return plan_of(times, states[:, 0], states[:, 1:])


def _step(times: Array, state: Array, estimates: Sequence[Array], i: int, corrected: bool) -> Array:
    """The state at times[i + 1] from that at times[i]. corrected: estimates[i + 1] is known as well."""
    now, then = float(times[i]), float(times[i + 1])
    ratio = then / now
    gain = (1 - then) - ratio * (1 - now)  # alpha (1 - exp(-h))
    h, mean = log_snr(then) - log_snr(now), estimates[i].copy()
    earlier = (log_snr(float(times[i - 1])) - log_snr(now)) / h if i and math.isfinite(h) else -math.inf
    slope = (estimates[i - 1] - estimates[i]) / earlier if math.isfinite(earlier) else np.zeros_like(mean)
    if not corrected:
        mean += 0.5 * slope
    elif not math.isfinite(earlier):
        mean += 0.5 * (estimates[i + 1] - estimates[i])
    else:
        first = 1 / (1 - math.exp(-h)) - 1 / h  # what makes D linear in log SNR exact
        second = 1 / (1 - math.exp(-h)) - 2 * first / h  # and in its square
        rho = np.linalg.solve([[1.0, 1.0], [earlier, 1.0]], [first, second])
        mean += rho[0] * slope + rho[1] * (estimates[i + 1] - estimates[i])
    return np.asarray(ratio * state + gain * mean)


def heun(times: Array) -> TimePlan:
    """Two evaluations a step: where it begins, and where Euler's step would end."""
    ends = np.asarray(times, float)
    count = 2 * (len(ends) - 1)
    pairs = np.repeat(ends, 2)[1:-1]
    pairs[1::2] += BESIDE  # the second evaluation of a step stands just before its end
    pairs = np.append(pairs, ends[-1])[: count + 1].astype(np.float32).astype(float)
    outputs = np.zeros((count + 1, count))
    for i in range(0, count, 2):
        size = ends[i // 2 + 1] - ends[i // 2]
        outputs[i + 1], outputs[i + 2] = outputs[i], outputs[i]
        outputs[i + 1, i] += size
        outputs[i + 2, i : i + 2] += size / 2
    return plan_of(pairs, np.ones(count + 1), outputs)


Solver = Callable[[Array, int, float], TimePlan]
"""From a run's own times, a number of evaluations and a shift of the times."""


def _by_steps(solver: Callable[[Array], TimePlan], per_step: int = 1) -> Solver:
    def plan(grid: Array, evaluations: int, shift: float) -> TimePlan:
        steps = max(1, evaluations // per_step)
        return solver(shifted(resampled(grid, steps), shift))

    return plan


SOLVERS: dict[str, Solver] = {
    "Euler": _by_steps(euler),
    "Heun": _by_steps(heun, per_step=2),
    "AB2": _by_steps(adams_bashforth),
    "DPM++(2M)": _by_steps(dpm_solver_2m),
    "UniPC": _by_steps(unipc),
}
SHIFTS = (1.0, 1.5, 2.0, 3.0)


def optimal_steps(exact: Trajectory, evaluations: int) -> Array:
    """Times [n + 1] of OptimalSteps, arXiv 2503.21774: Euler's steps between times of a recorded run of many
    steps, chosen by dynamic programming so that each state reached is nearest to the recorded one.

    For every number of steps and every time the best run to there is kept, with its state; outputs are the
    recorded ones, so that nothing is evaluated.
    """
    times, count = np.asarray(exact.times), len(exact.times) - 1
    reached = {0: (exact.states[0], [0])}
    for used in range(1, evaluations + 1):
        last = used == evaluations
        after = {}
        for j in [count] if last else range(used, count - (evaluations - used) + 1):
            tries = (
                (state + float(times[j] - times[i]) * exact.velocities[i], path)
                for i, (state, path) in reached.items()
                if i < j
            )
            state, path = min(tries, key=lambda found: float((found[0] - exact.states[j]).square().sum()))
            after[j] = state, [*path, j]
        reached = after
    return times[reached[count][1]]
