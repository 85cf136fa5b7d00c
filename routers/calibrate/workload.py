"""What calibration needs from a pipeline: batches of a fixed request that end in latents."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..elastic import Elastic
from ..policy import Policy


class Workload(Protocol):
    """A fixed set of generations, runnable again and again with the same noise.

    pipe: the pipeline that runs. num_batches: how many batches. rows: samples per batch. num_steps: denoising
    steps of each run.
    branches: names of the CFG branches in the order they are called ("cond", "uncond"), or ("main",).
    Branches that share a batch are one call of branch "main", its rows one branch after the other.
    """

    pipe: Any
    num_batches: int
    rows: int
    num_steps: int
    branches: tuple[str, ...]

    def run(self, batch: int) -> Tensor:
        """Generate a batch, the transformer patched or not: final latents `[rows, ...]`, float32."""
        ...


class NotFiniteError(ArithmeticError):
    """A run gave NaN or infinite values."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"NaN or infinite values {where}; nothing was written. Another dtype (bf16, fp32) may help, "
            "or the model's weights are damaged"
        )


def run_patched(elastic: Elastic, workload: Workload, batch: int, policy: Policy, phase: str) -> Tensor:
    """Final latents `[rows, ...]` of a batch under a policy, on the host. Raises NotFiniteError."""
    with torch.no_grad(), elastic.scope(policy=policy, num_steps=workload.num_steps, samples=workload.rows):
        latents = workload.run(batch).cpu()
    require_finite(latents, f"in the final latents of batch {batch + 1} of {workload.num_batches} ({phase})")
    return latents


def require_finite(values: Tensor, where: str) -> None:
    """Raises NotFiniteError if there is a NaN or an infinity."""
    if not bool(values.isfinite().all()):
        raise NotFiniteError(where)
