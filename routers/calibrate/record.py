"""Watch the dense model: what its blocks add together at every step, and what the routers see.

Shapes: R rows, L tokens (a fixed sample of them), D dim, E time embedding dim, N blocks, S steps, G branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..elastic import Computed, Elastic
from ..policy import OpenPolicy
from .workload import Workload

TOKENS = 256
"""Tokens per row whose deltas are compared; products are means, so a sample of tokens estimates them."""


@dataclass
class Record:
    """Second moments of one workload, and the routers' inputs.

    gram [R, G * S, G * S]: per row, mean product of the residual deltas that all blocks together add to the
    first stream at two (branch, step)s, branch-major. pooled [G, S, N]: per entry `[R, D]` float16.
    modulation [G, S]: per entry `[R, E]` float16. latents: `[R, ...]` final latents of the dense runs.
    times [S]: the sampler's times.
    """

    gram: NDArray[np.float64]
    pooled: list[list[list[Tensor]]]
    modulation: list[list[Tensor | None]]
    latents: Tensor
    times: list[float]


class Recorder:
    """Observer of one dense batch: keeps the stack's deltas of a sample of tokens, nothing more."""

    def __init__(self, workload: Workload, segments: tuple[tuple[int, int], ...]) -> None:
        self.branches = workload.branches
        self.pooled: dict[tuple[int, int, int], Tensor] = {}
        self.modulation: dict[tuple[int, int], Tensor] = {}
        self.times = [0.0] * workload.num_steps
        self._starts = {first for first, _ in segments}
        self._ends = {last for _, last in segments}
        self._entry: Tensor | None = None
        self._deltas: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, seen: Computed) -> None:
        """A block was computed for every row of the batch."""
        g = self.branches.index(seen.call.info.branch)
        s, n = seen.call.info.step, seen.block.index
        before, after = seen.before[0], seen.after[0]
        if n in self._starts:
            self._entry = _sampled(before)
        if n in self._ends:
            assert self._entry is not None
            self._deltas.setdefault((g, s), []).append(_sampled(after) - self._entry)
        if g == n == 0:
            self.times[s] = float(seen.call.time.flatten()[0])
        self.pooled[g, s, n] = before.mean(dim=1).half().cpu()
        name = seen.block.spec.modulation
        if n == 0 and name:
            self.modulation[g, s] = seen.inputs[name][: before.shape[0]].half().cpu()

    def forget_deltas(self) -> None:
        """Free the memory that only `gram` needs."""
        self._deltas.clear()
        self._entry = None

    def gram(self) -> NDArray[np.float64]:
        """[R, G * S, G * S] of this batch, in float64 on the host."""
        keys = [(g, s) for g in range(len(self.branches)) for s in range(len(self.times))]
        rows = [torch.cat([d.flatten(1) for d in self._deltas[key]], dim=1) for key in keys]
        deltas_RKX = torch.stack(rows, dim=1)
        products_RKK = torch.einsum("rkx,rlx->rkl", deltas_RKX, deltas_RKX) / deltas_RKX.shape[2]
        return products_RKK.double().cpu().numpy()  # type: ignore[no-any-return]


def record(
    elastic: Elastic, workload: Workload, report: Callable[[int, int], None] = lambda done, total: None
) -> Record:
    """Run the workload densely and measure. report(done, total) is called after every batch."""
    recorders, latents, grams = [], [], []
    for batch in range(workload.num_batches):
        recorder = Recorder(workload, elastic.segments)
        elastic.observer = recorder
        try:
            with torch.no_grad(), elastic.scope(policy=OpenPolicy(), num_steps=workload.num_steps):
                latents.append(workload.run(batch).cpu())
        finally:
            elastic.observer = None
        recorders.append(recorder)
        grams.append(recorder.gram())
        recorder.forget_deltas()
        report(batch + 1, workload.num_batches)
    branches, steps, blocks = len(workload.branches), workload.num_steps, len(elastic.blocks)
    return Record(
        gram=np.concatenate(grams),
        pooled=[
            [[torch.cat([r.pooled[g, s, n] for r in recorders]) for n in range(blocks)] for s in range(steps)]
            for g in range(branches)
        ],
        modulation=[
            [
                torch.cat([r.modulation[g, s] for r in recorders])
                if (g, s) in recorders[0].modulation
                else None
                for s in range(steps)
            ]
            for g in range(branches)
        ],
        latents=torch.cat(latents),
        times=recorders[0].times,
    )


def _sampled(stream: Tensor) -> Tensor:
    """Up to TOKENS evenly spaced tokens of a stream `[R, L, D]`, float32."""
    tokens = stream.shape[1]
    index = torch.linspace(0, tokens - 1, min(TOKENS, tokens)).long().to(stream.device)
    return stream.index_select(1, index).float()
