"""How much of an error at one step reaches the picture: single predictions, measured to the final latents.

Every row of a batch probes another step: there it predicts what its blocks add, in all CFG branches, and
computes everything else. The squared error of its final latents over the squared error of the prediction is
the gain of that step, the one number per step that the Gram matrix does not know.

Shapes: R rows, G branches, S steps, U units, P passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..elastic import Elastic
from ..plan import Moments, Planner
from ..policy import CallInfo, OpenPolicy, RunInfo
from ..trace import REUSE, Actions
from .record import Record
from .workload import Workload

TIE = 0.5
"""How strongly the log gains of neighbouring steps are tied to each other, in units of one probe."""


class ProbePolicy(OpenPolicy):
    """Row r predicts every block at step steps[r] from the steps before; everything else computes."""

    def __init__(self, steps: Sequence[int], planner: Planner) -> None:
        self.steps, self.planner = list(steps), planner
        self.cache_depth = planner.depth

    def start(self, run: RunInfo) -> None:
        """Each segment is cached as one unit."""
        self.units = run.segments

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        """Full everywhere but in the rows whose step this is."""
        codes = super().decide(call, logits)
        assert self.units is not None
        passes = tuple(range(call.step - 1, max(call.step - 1 - self.planner.depth, -1), -1))
        self.weights = np.zeros((call.rows, len(self.units), self.planner.depth), np.float32)
        branch = self.planner.moments.index(call.branch)
        for row, step in enumerate(self.steps):
            if step == call.step and passes:
                codes[row] = REUSE
                self.weights[row, :, : len(passes)] = self.planner.weights(branch, step, passes)
        return codes


def measure_gains(
    elastic: Elastic,
    workload: Workload,
    recorded: Record,
    moments: Moments,
    probes: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """Gains [S] from `probes` single predictions, rounded up to whole batches, spread over all steps."""
    steps, rows = workload.num_steps, workload.rows
    planner = Planner(moments)
    count = -(-probes // rows) * rows
    picked = [1 + i % (steps - 1) for i in range(count)] if steps > 1 else []
    found: list[tuple[int, float]] = []
    for start in range(0, len(picked), rows):
        batch = (start // rows) % workload.num_batches
        policy = ProbePolicy(picked[start : start + rows], planner)
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=steps):
            latents = workload.run(batch).cpu()
        first = batch * rows
        dense = recorded.latents[first : first + rows]
        final = (latents - dense).float().square().flatten(1).mean(dim=1).numpy()
        for row, step in enumerate(policy.steps):
            local = prediction_error(planner, step, recorded.gram[(first + row) % len(recorded.gram)])
            if local > 0 and final[row] > 0:
                found.append((step, float(np.log(final[row] / local))))
        report(start + rows, len(picked))
    return np.exp(smooth(found, steps))


def prediction_error(planner: Planner, step: int, gram: NDArray[np.float64]) -> float:
    """Squared error of the mixed deltas if only `step` is predicted, for a row with this Gram matrix."""
    steps = planner.num_steps
    passes = tuple(range(step - 1, max(step - 1 - planner.depth, -1), -1))
    residual = np.zeros(len(gram))
    for branch, mix in enumerate(planner.moments.mixing):
        base = branch * steps
        residual[base + np.array(passes)] += mix * planner.weights(branch, step, passes)
        residual[base + step] -= mix
    return float(residual @ gram @ residual)


def smooth(found: Sequence[tuple[int, float]], steps: int) -> NDArray[np.float64]:
    """Least-squares log gains [S] of (step, log gain) probes, neighbours tied to each other."""
    rows = [np.eye(steps)[step] for step, _ in found]
    rows += [TIE * (np.eye(steps)[s] - np.eye(steps)[s + 1]) for s in range(steps - 1)]
    targets = [value for _, value in found] + [0.0] * (steps - 1)
    if not found:
        return np.zeros(steps)
    solution: NDArray[np.float64] = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    return solution
