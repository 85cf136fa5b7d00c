"""How much of a local error reaches the picture: single reuses, measured through to the final latents.

Every row of a batch probes another (branch, step, block): it reuses that one block once and computes
everything else. The squared error of its final latents over the local squared error is the gain there.
A log-additive model over (branch, step) and (branch, block) smooths the measured gains and fills the
cells that were not measured, so that a large model needs only a sample of them.

Shapes: R rows, G branches, S steps, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ..elastic import Elastic
from ..policy import CallInfo, OpenPolicy
from ..trace import REUSE, Actions
from .record import Record
from .workload import Workload

Cell = tuple[int, int, int]


class ProbePolicy(OpenPolicy):
    """Row r reuses block n in step s of branch g, for cells[r] = (g, s, n); everything else computes."""

    cache_depth, order = 2, 1

    def __init__(self, cells: list[Cell], branches: tuple[str, ...], order: int) -> None:
        self.cells, self.branches, self.order = cells, branches, order

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Actions:
        """Full everywhere but in the rows whose cell this call is."""
        codes = super().decide(call, logits)
        for row, (g, step, block) in enumerate(self.cells):
            if (self.branches[g], step) == (call.branch, call.step):
                codes[row, block] = REUSE
        return codes


def measure_gains(
    elastic: Elastic,
    workload: Workload,
    recorded: Record,
    order: int,
    probes: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """Gains [G, S, N] from about `probes` single reuses (rounded up to whole batches)."""
    branches, steps, blocks = len(workload.branches), workload.num_steps, len(elastic.blocks)
    cells = [(g, s, n) for g in range(branches) for s in range(1, steps) for n in range(blocks)]
    order_of_cells = np.random.default_rng(seed).permutation(len(cells))
    picked = [cells[i] for i in np.resize(order_of_cells, min(probes, len(cells)))]
    picked += picked[: -len(picked) % workload.rows]
    found: list[tuple[Cell, float]] = []
    for start in range(0, len(picked), workload.rows):
        batch = (start // workload.rows) % workload.num_batches
        chunk = picked[start : start + workload.rows]
        chunk += chunk[:1] * (workload.rows - len(chunk))
        policy = ProbePolicy(chunk, workload.branches, order)
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=steps):
            latents = workload.run(batch).cpu()
        first = batch * workload.rows
        dense = recorded.latents[first : first + workload.rows]
        final = (latents - dense).float().square().flatten(1).mean(dim=1).numpy()
        for row, (g, s, n) in enumerate(chunk):
            local = recorded.reuse[first + row, g, s, n, 0, order if s > 1 else 0]
            if np.isfinite(local) and local > 0 and final[row] > 0:
                found.append(((g, s, n), float(np.log(final[row] / local))))
        report(min(start + workload.rows, len(picked)), len(picked))
    return np.exp(smooth(found, (branches, steps, blocks)))


def smooth(
    found: list[tuple[Cell, float]], shape: tuple[int, int, int], ridge: float = 0.3
) -> NDArray[np.float64]:
    """Least-squares log gain = a[branch, step] + b[branch, block], then half of each cell's mean residual.

    Steps are tied to their neighbours, so that step 0, which has nothing to reuse, follows step 1.
    """
    branches, steps, blocks = shape
    unknowns = branches * (steps + blocks)
    rows, targets = [], []
    for (g, s, n), value in found:
        row = np.zeros(unknowns)
        row[g * steps + s] = row[branches * steps + g * blocks + n] = 1.0
        rows.append(row)
        targets.append(value)
    for g in range(branches):
        for s in range(steps - 1):
            row = np.zeros(unknowns)
            row[g * steps + s], row[g * steps + s + 1] = ridge, -ridge
            rows.append(row)
            targets.append(0.0)
        for n in range(blocks):
            row = np.zeros(unknowns)
            row[branches * steps + g * blocks + n] = ridge
            rows.append(row)
            targets.append(0.0)
    solution = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    per_step = solution[: branches * steps].reshape(branches, steps, 1)
    per_block = solution[branches * steps :].reshape(branches, 1, blocks)
    gains: NDArray[np.float64] = per_step + per_block
    residuals: dict[Cell, list[float]] = {}
    for cell, value in found:
        residuals.setdefault(cell, []).append(value - gains[cell])
    for cell, values in residuals.items():
        gains[cell] += 0.5 * float(np.mean(values))
    return gains
