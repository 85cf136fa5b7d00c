"""`calibrate --method fit`: a bundle in minutes, the backbone untouched.

1. record: what the blocks of the dense model add together at every step, as products between steps;
2. gains: what an error at one step does to the final latents;
3. plans: for the calibrated number of steps, those that come out best when they are run.

1 and 2 are the moments from which a plan for any budget and step count is solved at run time.

Shapes: G branches, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..attachment import architecture, fingerprint
from ..bundle import Bundle
from ..elastic import Elastic
from ..planned.prediction import Moments
from ..spec import TransformerSpec
from .choose import choose_plans
from .gains import measure_gains
from .record import Record, record
from .state import State
from .workload import Workload

Report = Callable[[str, int, int], None]
"""(phase, done, of)."""


@dataclass(frozen=True)
class FitSettings:
    """probes: single predictions to measure gains with. tried: samples that plans are run on, 0 for none.
    least: smallest budget that plans are run for. seed: of the workload, for the record.
    """

    probes: int = 80
    tried: int = 8
    least: float = 0.35
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
        recorded = record(elastic, workload, partial(report, "record"), state)
        moments = first_moments(recorded, workload.branches, guidance)
        gain = measure_gains(
            elastic, workload, recorded, moments, settings.probes, partial(report, "gains"), state
        )
        moments = replace(moments, gain=gain)
        plans = choose_plans(
            elastic, workload, recorded, moments, settings.tried, settings.least,
            partial(report, "plans"), state,
        )  # fmt: skip
    finally:
        elastic.detach()
    return Bundle(
        spec=spec,
        moments=replace(moments, plans=plans),
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
        },
    )


def first_moments(recorded: Record, branches: tuple[str, ...], guidance: float) -> Moments:
    """Averages over rows; gains not yet measured are 1."""
    steps = recorded.gram.shape[1] // len(branches)
    # Classifier-free guidance gives uncond + g (cond - uncond).
    mixing = np.array([guidance, 1.0 - guidance]) if len(branches) == 2 else np.ones(len(branches))
    return Moments(branches, recorded.gram.mean(axis=0), np.ones(steps), mixing)
