"""How much of an error at one step reaches the picture: single predictions, measured to the final latents.

Every row of a batch probes another step: there it predicts what its blocks add, in all CFG branches, and
computes everything else. The squared error of its final latents over the squared error of the prediction is
the gain of that step, the one number per step that the Gram matrix does not know.

Shapes: R rows, G branches, S steps, U units, P passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..elastic import Elastic
from ..planned.policy import row_branches
from ..planned.prediction import DEAD, Moments, Predictor
from ..policy import CallInfo, Decision, OpenPolicy, RunInfo
from ..trace import REUSE
from .record import Record
from .state import Probes, State
from .workload import Workload, run_patched

TIE = 0.5
"""How strongly the log gains of neighbouring steps are tied to each other, in units of one probe."""


class ProbePolicy(OpenPolicy):
    """Sample r predicts every block at step steps[r] from the steps before; everything else computes.

    Where CFG branches share a batch, all rows of a sample do the same.
    """

    def __init__(self, steps: Sequence[int], predictor: Predictor) -> None:
        self.steps, self.predictor = list(steps), predictor

    def start(self, run: RunInfo) -> None:
        """Each segment is cached as one unit."""
        self._units = run.segments

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Full everywhere but in the rows whose step this is."""
        actions, predictor = super().decide(call, logits).actions, self.predictor
        passes = before(call.step, predictor.depth)
        weights = np.zeros((call.rows, len(self._units), predictor.depth), np.float32)
        for row, branch in enumerate(row_branches(call, predictor.moments)):
            if self.steps[row % len(self.steps)] == call.step and passes:
                actions[row] = REUSE
                weights[row, :, : len(passes)] = predictor.weights(branch, call.step, passes)
        return Decision(actions, self._units, predictor.depth, weights)


def measure_gains(
    elastic: Elastic,
    workload: Workload,
    recorded: Record,
    moments: Moments,
    probes: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    state: State | None = None,
) -> NDArray[np.float64]:
    """Gains [S] from `probes` single predictions, rounded up to whole batches, spread over all steps.

    state: keeps every finished batch of probes, and gives back those of an earlier attempt. Raises
    NotFiniteError.
    """
    steps, rows = workload.num_steps, workload.rows
    predictor = Predictor(moments)
    count = -(-probes // rows) * rows
    picked = [1 + i % (steps - 1) for i in range(count)] if steps > 1 else []
    probed: Probes = []
    for number, start in enumerate(range(0, len(picked), rows)):
        done = None if state is None else state.probes(number)
        if done is None:
            policy = ProbePolicy(picked[start : start + rows], predictor)
            done = _probe(elastic, workload, recorded, policy, number % workload.num_batches)
            if state is not None:
                state.keep_probes(done)
        probed += done
        report(start + rows, len(picked))
    return from_probes(probed, steps)


def _probe(elastic: Elastic, workload: Workload, recorded: Record, policy: ProbePolicy, batch: int) -> Probes:
    """One batch, another step predicted in each sample; log gains are -inf where latents stayed equal."""
    phase = f"gains, predicting steps {', '.join(str(step + 1) for step in policy.steps)}"
    latents = run_patched(elastic, workload, batch, policy, phase)
    first = batch * workload.rows
    dense = recorded.latents[first : first + workload.rows]
    final = (latents - dense).float().square().flatten(1).mean(dim=1).numpy()
    probes = []
    for row, step in enumerate(policy.steps):
        local = prediction_error(policy.predictor, step, recorded.gram[(first + row) % len(recorded.gram)])
        if local > 0:
            probes.append((step, float(np.log(final[row] / local)) if final[row] > 0 else float("-inf")))
    return probes


def from_probes(probes: Probes, steps: int) -> NDArray[np.float64]:
    """Gains [S]. Steps without any effect (a sampler's last one, of size 0) are kept apart.

    A gain so far below the typical one is rounding. They get DEAD times the smallest other gain, and leave
    their neighbours alone.
    """
    typical = np.median([gain for _, gain in probes]) if probes else 0.0
    reach = {step: max(gain for s, gain in probes if s == step) for step, _ in probes}
    dead = sorted(step for step, most in reach.items() if most < typical + np.log(DEAD))
    alive = [(step, gain) for step, gain in probes if step not in dead and np.isfinite(gain)]
    gain = np.exp(smooth(alive, steps))
    gain[dead] = DEAD * np.delete(gain, dead).min()
    return gain


def before(step: int, depth: int) -> tuple[int, ...]:
    """The last steps before this one, newest first."""
    return tuple(range(step - 1, max(step - 1 - depth, -1), -1))


def prediction_error(predictor: Predictor, step: int, gram: NDArray[np.float64]) -> float:
    """Squared error of the mixed deltas if only `step` is predicted, for a row with this Gram matrix.

    r^T K r with the residual r = sum_g m_g (sum_p w_p e_gp - e_gs).
    """
    passes = before(step, predictor.depth)
    residual = np.zeros(len(gram))
    for branch, mix in enumerate(predictor.moments.mixing):
        base = branch * predictor.num_steps
        residual[base + np.array(passes)] += mix * predictor.weights(branch, step, passes)
        residual[base + step] -= mix
    return float(residual @ gram @ residual)


def smooth(probes: Probes, steps: int) -> NDArray[np.float64]:
    """Least-squares log gains [S] of (step, log gain) probes, neighbours tied to each other."""
    if not probes:
        return np.zeros(steps)
    rows = [np.eye(steps)[step] for step, _ in probes]
    rows += [TIE * (np.eye(steps)[s] - np.eye(steps)[s + 1]) for s in range(steps - 1)]
    targets = [value for _, value in probes] + [0.0] * (steps - 1)
    solution: NDArray[np.float64] = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    return solution
