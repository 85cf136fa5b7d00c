"""`calibrate --method fit`: a bundle in minutes, the backbone untouched.

1. record: the dense model's local errors and the routers' inputs;
2. gains: what a local error does to the final latents;
3. routers: predict, per sample, how far its error will be from the average one at the next step;
4. tables: averages of 1 and 2, from which a plan for any budget and step count is solved at run time.

Shapes: R rows, G branches, S steps, N blocks, D dim, E time embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bundle import Bundle, architecture, fingerprint
from ..elastic import Elastic
from ..plan import ErrorTables
from ..router import Router
from ..spec import TransformerSpec
from .gains import measure_gains
from .record import Record, record
from .workload import Workload

Report = Callable[[str, int, int], None]
FLOOR = 1e-12
"""Smallest error in a table: a delta that never changes is free to reuse, not infinitely so."""


@dataclass(frozen=True)
class FitSettings:
    """probes: single reuses to measure gains with. hidden: router width. steps, rate: its training (AdamW).
    held_out: share of the rows that only judge the routers.
    """

    probes: int = 320
    hidden: int = 16
    steps: int = 250
    rate: float = 3e-3
    held_out: float = 0.25
    seed: int = 0


def fit(
    transformer: torch.nn.Module,
    spec: TransformerSpec,
    workload: Workload,
    base_model: str,
    guidance: float,
    settings: FitSettings | None = None,
    report: Report = lambda phase, done, total: None,
) -> Bundle:
    """Fit a bundle to `transformer` on a workload. The weights are not changed."""
    settings = settings or FitSettings()
    elastic = Elastic(transformer, spec)
    try:
        recorded = record(elastic, workload, lambda d, t: report("record", d, t))
        order = better_order(recorded)
        gains = measure_gains(
            elastic,
            workload,
            recorded,
            order,
            settings.probes,
            settings.seed,
            lambda d, t: report("gains", d, t),
        )
        dims = {block.index: block for block in elastic.blocks}
    finally:
        elastic.detach()
    tables = build_tables(recorded, gains, workload.branches, order)
    routers, quality = [], []
    for n in range(len(dims)):
        router, score = fit_router(recorded, tables, n, order, settings)
        routers.append({key: value.half() for key, value in router.state_dict().items()})
        quality.append(score)
        report("routers", n + 1, len(dims))
    return Bundle(
        spec=spec,
        tables=tables,
        routers=routers,
        base_model=base_model,
        architecture=architecture(transformer),
        fingerprint=fingerprint(transformer),
        num_steps=workload.num_steps,
        guidance=guidance,
        times=recorded.times,
        order=order,
        metadata={
            "method": "fit",
            "rows": workload.rows * workload.num_batches,
            "probes": settings.probes,
            "seed": settings.seed,
            "router_correlation": [round(q, 4) for q in quality],
        },
    )


def better_order(recorded: Record) -> int:
    """The extrapolation order whose one-step reuse is closer, in the median over steps and blocks."""
    error = np.nanmean(recorded.reuse[:, :, 2:, :, 0, :], axis=0)
    return int(np.nanmedian(np.log(error[..., 1]) - np.log(error[..., 0])) < 0)


def build_tables(
    recorded: Record, gains: NDArray[np.float64], branches: tuple[str, ...], order: int
) -> ErrorTables:
    """Averages over rows; cells that could not be measured take the nearest that could."""
    reuse = _mean(recorded.reuse)[..., order]  # [G, S, N, K]
    skip = recorded.skip.mean(axis=0)
    for age in range(1, reuse.shape[-1]):  # an older delta is not assumed to be better than a newer one
        reuse[..., age] = np.fmax(reuse[..., age], reuse[..., age - 1])
    for s in range(reuse.shape[1] - 2, -1, -1):
        reuse[:, s] = np.where(np.isnan(reuse[:, s]), reuse[:, s + 1], reuse[:, s])
    width = _mean(recorded.width)
    measured = np.flatnonzero(np.isfinite(width).all(axis=(0, 2, 3)))
    if len(measured):
        nearest = measured[np.abs(np.arange(width.shape[1])[:, None] - measured[None]).argmin(axis=1)]
        width = width[:, nearest]
    else:
        width = np.full(width.shape, np.inf)
    width = np.where(np.isfinite(width), width, 1e6 * skip[..., None])
    floor = np.maximum
    return ErrorTables(
        branches, floor(reuse, FLOOR), floor(width, FLOOR), floor(skip, FLOOR), floor(gains, FLOOR)
    )


def _mean(errors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean over rows; NaN where no row was measured."""
    known = np.isfinite(errors)
    count = known.sum(axis=0)
    total = np.where(known, errors, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fit_router(
    recorded: Record, tables: ErrorTables, block: int, order: int, settings: FitSettings
) -> tuple[Router, float]:
    """A router for one block, and the held-out correlation of its gate with the truth.

    Gate target: log of this row's reuse error at the next step over the table's average. Width targets:
    the same for the three narrow widths at this step, where they were measured. Held-out regression
    shrinks the gate towards 0, so a router that learned nothing changes nothing.
    """
    pooled, modulation, gate, width, rows = _examples(recorded, tables, block, order)
    generator = torch.Generator().manual_seed(settings.seed + block)
    held = torch.zeros(int(rows.max()) + 1, dtype=torch.bool)
    held[torch.randperm(len(held), generator=generator)[: int(settings.held_out * len(held))]] = True
    train, judge = ~held[rows], held[rows]
    torch.manual_seed(settings.seed + block)
    router = Router(pooled.shape[1], 0 if modulation is None else modulation.shape[1], settings.hidden)
    torch.nn.init.zeros_(router.gate.bias)
    torch.nn.init.zeros_(router.width.bias)
    optimiser = torch.optim.AdamW(router.parameters(), lr=settings.rate, weight_decay=0.05)
    known = torch.isfinite(width)

    def logits(part: Tensor) -> tuple[Tensor, Tensor]:
        return router.heads(pooled[part], None if modulation is None else modulation[part])

    for _ in range(settings.steps):
        predicted, widths = logits(train)
        loss = (predicted - gate[train]).square().mean()
        if known[train].any():
            loss = loss + (widths[:, :3][known[train]] - width[train][known[train]]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        if not judge.any():
            return router, float("nan")
        predicted = logits(judge)[0]
        truth = gate[judge]
        slope = float((predicted * truth).sum() / predicted.square().sum().clamp_min(1e-9))
        correlation = float(torch.corrcoef(torch.stack([predicted, truth]))[0, 1])
        shrink = min(max(slope, 0.0), 1.0)
        router.gate.weight.mul_(shrink)
        router.gate.bias.mul_(shrink)
        router.width.weight[3].zero_()
        router.width.bias[3] = 0.0
    return router, correlation if np.isfinite(correlation) else 0.0


def _examples(
    recorded: Record, tables: ErrorTables, block: int, order: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """(pooled [M, D], modulation [M, E] or None, gate target [M], width targets [M, 3], row number [M])."""
    pooled, modulation, gate, width, rows = [], [], [], [], []
    total, branches, steps = recorded.reuse.shape[:3]
    for g in range(branches):
        for s in range(1, steps - 1):
            error = recorded.reuse[:, g, s + 1, block, 0, order if s + 1 > 1 else 0]
            pooled.append(recorded.pooled[g][s][block])
            modulation.append(recorded.modulation[g][s])
            gate.append(np.log(np.maximum(error, FLOOR) / tables.reuse[g, s + 1, block, 0]))
            measured = np.full((total, 3), np.nan, np.float32)
            narrow = recorded.width[:, g, s, block]
            measured[: len(narrow)] = np.log(np.maximum(narrow, FLOOR) / tables.width[g, s, block])
            width.append(measured)
            rows.append(torch.arange(total))
    has_time = all(m is not None for m in modulation)
    return (
        torch.cat(pooled).float(),
        torch.cat([m for m in modulation if m is not None]).float() if has_time else None,
        torch.from_numpy(np.concatenate(gate)).float(),
        torch.from_numpy(np.concatenate(width)).float(),
        torch.cat(rows),
    )
