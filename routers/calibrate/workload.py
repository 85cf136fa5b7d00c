"""What calibration needs from a pipeline: batches of a fixed request that end in latents."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Workload(Protocol):
    """A fixed set of generations, runnable again and again with the same noise.

    num_batches: how many batches. rows: samples per batch. num_steps: denoising steps of each run.
    branches: names of the CFG branches in the order they are called ("cond", "uncond"), or ("main",).
    """

    num_batches: int
    rows: int
    num_steps: int
    branches: tuple[str, ...]

    def run(self, batch: int) -> Tensor:
        """Generate a batch, the transformer patched or not: final latents `[rows, ...]`, float32."""
        ...
