"""Re-measure a bundle: what each budget gives and takes, beside the dense model in the same run.

Shapes: R rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attachment import attach
from ..bundle import Bundle
from .workload import Workload, require_finite

RECOMMENDED_DB = 30.0
"""Latent SNR from which a budget is recommended: a thousandth of the signal's energy, below what the eye
finds in pictures of the packaged models (docs/quality.md)."""


@dataclass(frozen=True)
class Quality:
    """One budget on one workload.

    spent: mean FLOPs ratio; spent_low, spent_high: its range over samples. snr: energy of the dense final
    latents over that of the difference, dB (median over samples). time_ratio: median seconds of a batch
    over the dense median.
    """

    budget: float
    spent: float
    spent_low: float
    spent_high: float
    snr: float
    time_ratio: float


def evaluate(
    bundle: Bundle,
    workload: Workload,
    budgets: Sequence[float],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Quality]:
    """Measure `budgets` on a workload, interleaved batch by batch with the dense model."""
    budgets = list(budgets)
    seconds: dict[float, list[float]] = {b: [] for b in [*budgets, 1.0]}
    samples: dict[float, list[tuple[float, float]]] = {b: [] for b in budgets}
    workload.run(0)  # warm
    for batch in range(workload.num_batches):
        dense, taken = _timed(workload, batch)
        seconds[1.0].append(taken)
        for budget in budgets:
            latents, taken, trace = _elastic(bundle, workload, batch, budget)
            if budget != 1.0:
                seconds[budget].append(taken)
            samples[budget] += list(zip(trace.spent, latent_snr(latents, dense), strict=True))
        report(batch + 1, workload.num_batches)
    reference = statistics.median(seconds[1.0])
    rows = []
    for budget in budgets:
        spent = [s for s, _ in samples[budget]]
        snr = statistics.median(db for _, db in samples[budget])
        ratio = statistics.median(seconds[budget]) / reference
        rows.append(Quality(budget, float(np.mean(spent)), min(spent), max(spent), snr, ratio))
    return rows


def recommend(rows: Sequence[Quality], threshold: float = RECOMMENDED_DB) -> float:
    """The smallest budget without measurable loss: it and all larger reach the threshold. 1.0 if none."""
    best = 1.0
    for row in sorted(rows, key=lambda r: -r.budget):
        if row.snr < threshold:
            break
        best = row.budget
    return best


def as_metadata(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """JSON data for `bundle.json`."""
    return [{name: round(value, 4) for name, value in asdict(row).items()} for row in rows]


def _elastic(bundle: Bundle, workload: Workload, batch: int, budget: float) -> tuple[Tensor, float, Any]:
    """Latents, seconds and trace of a batch at a budget. Raises NotFiniteError."""
    elastic = attach(workload.pipe, bundle, budget=budget, force=True)
    try:
        with torch.no_grad(), elastic.scope(samples=workload.rows) as trace:
            latents, taken = _timed(workload, batch)
    finally:
        elastic.detach()
    at = f"in the latents of batch {batch + 1} of {workload.num_batches} at budget {budget:g} (measure)"
    require_finite(latents, at)
    return latents, taken, trace


def _timed(workload: Workload, batch: int) -> tuple[Tensor, float]:
    start = time.perf_counter()
    latents = workload.run(batch).cpu()  # the copy waits for an accelerator
    return latents, time.perf_counter() - start


def latent_snr(latents: Tensor, dense: Tensor) -> list[float]:
    """Energy of the dense latents over that of the difference, dB for each row of `[R, ...]`."""
    error = (latents - dense).flatten(1).square().mean(dim=1).clamp_min(1e-12)
    signal = dense.flatten(1).square().mean(dim=1)
    return [float(x) for x in 10 * torch.log10(signal / error)]
