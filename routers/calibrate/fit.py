"""`calibrate --method fit`: a bundle in minutes, the backbone untouched.

1. record: what the blocks of the dense model add together at every step, as products between steps;
2. gains: what an error at one step does to the final latents;
3. routers: predict, per sample, how far the error of the next step will be from the average one;
4. moments: averages of 1 and 2, from which a plan for any budget and step count is solved at run time;
5. plans: for the calibrated number of steps, those that come out best when they are run.

Shapes: R rows, G branches, S steps, N blocks, D dim, E time embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bundle import Bundle
from ..elastic import Elastic
from ..identity import architecture, fingerprint
from ..planned.plan import Moments, Planner
from ..router import Router
from ..spec import TransformerSpec
from .choose import choose_plans
from .gains import measure_gains, prediction_error
from .record import Record, record
from .state import State
from .workload import Workload

Report = Callable[[str, int, int], None]
FLOOR = 1e-12
"""Smallest error a ratio is taken of."""


@dataclass(frozen=True)
class FitSettings:
    """probes: single predictions to measure gains with. tried: samples that plans are run on, 0 for none.
    least: smallest budget that plans are run for. hidden: router width. steps, rate: its training
    (AdamW). held_out: share of the rows that only judge the routers.
    """

    probes: int = 80
    tried: int = 8
    least: float = 0.35
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
    state: State | None = None,
) -> Bundle:
    """Fit a bundle to `transformer` on a workload. The weights are not changed.

    state: keeps the progress; a fit that continues gives the same bundle as one in one go.
    Raises NotFiniteError, and OSError if the state cannot be written.
    """
    settings = settings or FitSettings()
    elastic = Elastic(transformer, spec)
    try:
        recorded = record(elastic, workload, lambda d, t: report("record", d, t), state)
        moments = first_moments(recorded, workload.branches, guidance)
        gain = measure_gains(
            elastic, workload, recorded, moments, settings.probes, lambda d, t: report("gains", d, t), state
        )
        moments = replace(moments, gain=gain)
        plans = choose_plans(
            elastic, workload, recorded, moments, settings.tried, settings.least,
            lambda d, t: report("plans", d, t), state,
        )  # fmt: skip
        moments = replace(moments, plans=plans)
        blocks = len(elastic.blocks)
    finally:
        elastic.detach()
    planner = Planner(moments)
    routers, quality = [], []
    for n in range(blocks):
        router, score = fit_router(recorded, planner, n, settings)
        routers.append({key: value.half() for key, value in router.state_dict().items()})
        quality.append(score)
        report("routers", n + 1, blocks)
    return Bundle(
        spec=spec,
        moments=moments,
        routers=routers,
        base_model=base_model,
        architecture=architecture(transformer),
        fingerprint=fingerprint(transformer),
        num_steps=workload.num_steps,
        guidance=guidance,
        times=recorded.times,
        metadata={
            "method": "fit",
            "rows": workload.rows * workload.num_batches,
            "probes": settings.probes,
            "seed": settings.seed,
            "latent_energy": float(recorded.latents.square().mean()),
            "router_correlation": [round(q, 4) for q in quality],
        },
    )


def first_moments(recorded: Record, branches: tuple[str, ...], guidance: float) -> Moments:
    """Averages over rows; gains not yet measured are 1."""
    steps = recorded.gram.shape[1] // len(branches)
    # Classifier-free guidance gives uncond + g (cond - uncond).
    mixing = np.array([guidance, 1.0 - guidance]) if len(branches) == 2 else np.ones(len(branches))
    return Moments(branches, recorded.gram.mean(axis=0), np.ones(steps), mixing)


def fit_router(recorded: Record, planner: Planner, block: int, settings: FitSettings) -> tuple[Router, float]:
    """A router for one block, and the held-out correlation of its gate with the truth.

    Gate target: log of this row's prediction error at the next step over the average one. Held-out
    regression shrinks the gate towards 0, so a router that learned nothing changes nothing. The width
    logits stay at 0: plans of this method compute at full width (docs/notes/planning.md).
    """
    pooled, modulation, gate, rows = _examples(recorded, planner, block)
    generator = torch.Generator().manual_seed(settings.seed + block)
    held = torch.zeros(int(rows.max()) + 1, dtype=torch.bool)
    held[torch.randperm(len(held), generator=generator)[: int(settings.held_out * len(held))]] = True
    train, judge = ~held[rows], held[rows]
    torch.manual_seed(settings.seed + block)
    router = Router(pooled.shape[1], 0 if modulation is None else modulation.shape[1], settings.hidden)
    torch.nn.init.zeros_(router.gate.bias)
    torch.nn.init.zeros_(router.width.bias)
    optimiser = torch.optim.AdamW(router.parameters(), lr=settings.rate, weight_decay=0.05)

    def predict(part: Tensor) -> Tensor:
        return router.heads(pooled[part], None if modulation is None else modulation[part])[0]

    for _ in range(settings.steps):
        loss = (predict(train) - gate[train]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        router.width.weight.zero_()
        if not judge.any():
            return router, float("nan")
        predicted, truth = predict(judge), gate[judge]
        slope = float((predicted * truth).sum() / predicted.square().sum().clamp_min(1e-9))
        correlation = float(torch.corrcoef(torch.stack([predicted, truth]))[0, 1])
        shrink = min(max(slope, 0.0), 1.0)
        router.gate.weight.mul_(shrink)
        router.gate.bias.mul_(shrink)
    return router, correlation if np.isfinite(correlation) else 0.0


def _examples(recorded: Record, planner: Planner, block: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(pooled [M, D], modulation [M, E] or None, gate target [M], row number [M])."""
    pooled, modulation, gate, rows = [], [], [], []
    total = len(recorded.gram)
    for s in range(1, planner.num_steps - 1):
        error = row_errors(recorded, planner, s + 1)
        target = np.log(np.maximum(error, FLOOR) / max(float(error.mean()), FLOOR))
        for g in range(len(planner.moments.branches)):
            pooled.append(recorded.pooled[g][s][block])
            modulation.append(recorded.modulation[g][s])
            gate.append(target)
            rows.append(torch.arange(total))
    has_time = all(m is not None for m in modulation)
    return (
        torch.cat(pooled).float(),
        torch.cat([m for m in modulation if m is not None]).float() if has_time else None,
        torch.from_numpy(np.concatenate(gate)).float(),
        torch.cat(rows),
    )


def row_errors(recorded: Record, planner: Planner, step: int) -> NDArray[np.float64]:
    """Squared error [R] of predicting one step, for every recorded row."""
    return np.array([prediction_error(planner, step, gram) for gram in recorded.gram])
